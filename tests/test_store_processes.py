"""The store among several processes: a stage is made once, and whoever is killed loses nothing but its own work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from store_fixtures import calls, new_store, stage, tree

DRIVER = """
import sys
from pathlib import Path
from align_loop.launch import process
from align_loop.store import Stage, Store
base, module = Path(sys.argv[1]), sys.argv[2]
store = Store(base / "store", base / "run", process.run, on_event=lambda event: print(event.kind, flush=True))
made = store.run(Stage("iteration-1/sample", f"{module}:slow", {"text": "x"}, seed=0))
print(made.digest)
"""


@pytest.fixture
def start(module):
    """Starts a process that runs the slow stage; whatever still runs when the test ends is killed."""
    started = []

    def start_one() -> subprocess.Popen:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
        command = [sys.executable, "-c", DRIVER, str(module.parent), module.stem]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start_one
    for driver in started:
        driver.kill()
        driver.wait()


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_killed_in_the_middle_and_started_again(module, tmp_path, start):
    first = start()
    wait_for(module.with_suffix(".started").exists)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert list((tmp_path / "store").glob(".tmp-*"))
    assert new_store(tmp_path, dry_run=True).plan(stage(module, function="slow"))[0] == "to run"
    module.with_suffix(".go").write_text("")
    output, _ = start().communicate(timeout=30)
    assert output.split()[:2] == ["running", "ran"]
    assert calls(module) == ["iteration-1/sample"]
    [made] = (tmp_path / "store").glob("[!.]*-*")
    assert tree(made) == ["data.txt", "half.txt", "manifest.json"]
    assert sorted(os.listdir(tmp_path / "store")) == [".locks", made.name]


def test_leftovers_of_other_stages_go_too_but_not_those_of_living_processes(module, tmp_path, start):
    living = start()
    wait_for(module.with_suffix(".started").exists)
    dead = tmp_path / "store" / ".tmp-0123456789ab-1" / "out"
    dead.mkdir(parents=True)
    new_store(tmp_path).run(stage(module, "other"))
    assert not dead.parent.exists()
    module.with_suffix(".go").write_text("")
    assert living.communicate(timeout=30)[0].split()[:2] == ["running", "ran"]
    assert living.returncode == 0


def test_two_processes_on_one_stage_make_it_once(module, start):
    first = start()
    wait_for(module.with_suffix(".started").exists)
    second = start()
    assert second.stdout.readline() == "waiting\n"
    module.with_suffix(".go").write_text("")
    outputs = [worker.communicate(timeout=30)[0].split() for worker in (first, second)]
    assert outputs[0][:2] == ["running", "ran"] and outputs[1][0] == "cached"
    assert outputs[0][-1] == outputs[1][-1]
    assert calls(module) == ["iteration-1/sample"]


def test_a_waiting_process_takes_over_from_a_killed_one(module, tmp_path, start):
    first = start()
    wait_for(module.with_suffix(".started").exists)
    second = start()
    assert second.stdout.readline() == "waiting\n"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    module.with_suffix(".go").write_text("")
    assert second.communicate(timeout=30)[0].split()[:2] == ["running", "ran"]
    assert not list((tmp_path / "store").glob(".tmp-*"))
