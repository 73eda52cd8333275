"""Launchers: the same stage, inline or in a process of its own, with the same report and the same errors."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align_loop.errors import UserError
from align_loop.launch import inline, process
from align_loop.launch.inline import Job
from align_loop.stage import RowsLost

STAGES = """
import contextlib, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
from align_loop.errors import UserError

def echo(config, inputs, context):
    text = f"{config['text']} {inputs['data'].read_text()} {context.seed} {context.hardware['gpus']} {context.quiet}"
    (context.out / "echo.txt").write_text(text)
    config["text"] = "changed"
    context.rows("answers", into=3, out=2, dropped={"empty": 1})
    context.tokens(7)
    context.fact("rate", np.float32(0.5))
    context.log({"loss": 1.0})

def user_error(config, inputs, context):
    raise UserError("prompts.jsonl, line 3: no key 'prompt'; add it")

def broken(config, inputs, context):
    raise ValueError("shapes differ")

def loses_rows(config, inputs, context):
    context.rows("answers", into=3, out=2)

def dies(config, inputs, context):
    os.kill(os.getpid(), signal.SIGSEGV)

def leaves(config, inputs, context):
    sys.exit(0)

def spawns(config, inputs, context):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (Path(config["pids"])).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(config["seconds"])

@contextlib.contextmanager
def sink(job, settings):
    with open(settings["file"], "a") as handle:
        yield lambda metrics: handle.write(f"{job.name} {metrics['loss']}\\n")
        handle.write("closed\\n")
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Makes a job for a function of STAGES, with folders of its own."""
    (tmp_path / "launch_stages.py").write_text(STAGES)
    (tmp_path / "data.txt").write_text("data")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("launch_stages", None)

    def make(function: str, **fields) -> Job:
        out = tmp_path / f"scratch-{len(list(tmp_path.iterdir()))}" / "out"
        out.mkdir(parents=True)
        defaults = {"config": {"text": "hello"}, "inputs": {"data": str(tmp_path / "data.txt")}, "seed": 5}
        places = {"out": str(out), "scratch": str(out.parent), "hardware": {"gpus": 0}, "quiet": True}
        return Job(name="iteration-1/echo", run=f"launch_stages:{function}", **(defaults | places | fields))

    return make


@pytest.mark.parametrize("launcher", [inline.run, process.run])
def test_a_stage_gets_its_arguments_and_its_report_comes_back(job, launcher):
    made = job("echo")
    report = launcher(made)
    assert (Path(made.out) / "echo.txt").read_text() == "hello data 5 0 True"
    assert report == {
        "rows": {"answers": {"in": 3, "out": 2, "dropped": {"empty": 1}}},
        "tokens": 7,
        "facts": {"rate": 0.5},
    }
    assert made.config == {"text": "hello"}  # a stage can't change what its key was made of
    assert sorted(os.listdir(made.out)) == ["echo.txt", "train_log.jsonl"]


@pytest.mark.parametrize("launcher", [inline.run, process.run])
def test_a_users_error_stays_one(job, launcher):
    with pytest.raises(UserError, match=r"^prompts\.jsonl, line 3: no key 'prompt'; add it$"):
        launcher(job("user_error"))
    with pytest.raises(UserError, match="no function 'missing'"):
        launcher(job("missing"))


def test_lost_rows_are_refused(job):
    with pytest.raises(RowsLost, match="3 rows in, 2 out"):
        inline.run(job("loses_rows"))
    with pytest.raises(process.StageFailed, match="RowsLost: .*3 rows in, 2 out"):
        process.run(job("loses_rows"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "ended with exit status 1: ValueError: shapes differ"),
        ("dies", "was killed by SIGSEGV"),
        ("leaves", "ended with exit status 0 without a report"),
    ],
)
def test_how_a_worker_ended_is_said(job, function, message):
    with pytest.raises(process.StageFailed, match=message) as caught:
        process.run(job(function))
    if function == "broken":
        assert "in broken" in caught.value.__notes__[0]  # the worker's own traceback


def test_live_metrics_reach_the_sink(job, tmp_path):
    seen = []
    functools.partial(inline.run, log_sink=seen.append)(job("echo"))
    assert seen == [{"loss": 1.0}]
    tracking = {"target": "launch_stages:sink", "settings": {"file": str(tmp_path / "sink.txt")}}
    process.run(job("echo", tracking=tracking))
    assert (tmp_path / "sink.txt").read_text() == "iteration-1/echo 1.0\nclosed\n"


def test_code_edited_after_this_process_ran_it_is_refused_inline(job):
    inline.run(job("echo", code={"edited_part.py": "1"}))
    inline.run(job("echo", code={"edited_part.py": "1", "other_part.py": "1"}))
    with pytest.raises(UserError, match=r"edited_part\.py was edited"):
        inline.run(job("echo", code={"edited_part.py": "2"}))
    process.run(job("echo", code={"edited_part.py": "2"}))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_workers_children_end_with_it(job, tmp_path):
    process.run(job("spawns", config={"pids": str(tmp_path / "pids"), "seconds": 0}))
    _, child = map(int, (tmp_path / "pids").read_text().split())
    wait_for(lambda: not alive(child), 5)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_nothing_survives_its_parent(job, tmp_path, kind):
    pids = tmp_path / "pids"
    made = job("spawns", config={"pids": str(pids), "seconds": 60})
    script = f"from align_loop.launch import process\nfrom align_loop.launch.inline import Job\nprocess.run({made!r})"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.DEVNULL)
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    worker, child = map(int, pids.read_text().split())
    assert alive(worker) and alive(child)
    parent.send_signal(kind)
    parent.wait(20)
    wait_for(lambda: not alive(worker) and not alive(child), 5)
