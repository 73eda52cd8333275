"""W&B tracking against the real library, offline: what lands in its files, once, and what must not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align_loop.errors import UserError
from align_loop.tracking import wandb as tracking_wandb
from align_loop.tracking.mode import resolve_mode
from align_loop.tracking.secrets import without_secrets
from align_loop.tracking.wandb import Tracking, tracking_from_dict

ROWS = [
    {"policy": "sft", "iteration": 0, "gold_reward": 0.63, "gold_reward_ci95": [0.6, 0.66], "drift": None},
    {"policy": "seed", "iteration": 0, "gold_reward": 0.71, "filter_dropped": {"tie": 3}, "seconds": 2},
    {"policy": "iteration-1", "iteration": 1, "gold_reward": 0.8, "seconds": 3},
]


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """No key from this machine, no warning left over from another test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr(tracking_wandb, "_warned", False)


def read_records(path: Path) -> list:
    """The protobuf records of a ``.wandb`` file: LevelDB's log format with a 7-byte file header."""
    from wandb.proto import wandb_internal_pb2

    data, place, part, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            records, part = [*records, record], b""
    return records


def wandb_runs(run_dir: Path) -> list[dict]:
    """Each offline run found under ``run_dir``: its name, group, id, configuration, history rows and x axis."""
    runs = []
    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        records = read_records(path)
        if not (heads := [record.run for record in records if record.HasField("run")]):
            continue  # not flushed yet
        head = heads[0]
        history = [
            {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        config = {item.key: json.loads(item.value_json) for item in head.config.update}
        axes = {record.metric.step_metric for record in records if record.HasField("metric")} - {""}
        runs.append({"name": head.display_name, "group": head.run_group, "id": head.run_id, "project": head.project,
                     "config": config, "history": history, "axes": axes, "kind": head.job_type})  # fmt: skip
    return runs


def train(tracking: Tracking, name: str = "seed-dpo", key: str = "k1", steps: int = 3) -> None:
    with tracking.stage(name, key, {"lr": 0.1, "hf_token": "hf_abc", "max_tokens": 64}) as sink:
        for step in range(steps):
            sink({"step": step, "loss": 1.0 / (step + 1), "nothing": None})


def test_a_stage_and_the_loop_are_logged_once(tmp_path):
    written = []
    for _ in range(2):  # the second command finds its stage cached and all rows logged
        tracking = Tracking("auto", "demo", "group-1", tmp_path)
        if not wandb_runs(tmp_path):
            train(tracking)
        assert tracking.replay("seed-dpo", "k1", {}, tmp_path / "train_log.jsonl") is False
        for count in range(1, len(ROWS) + 1):
            tracking.policies(ROWS[:count], {"experiment": "selfie"})
        tracking.finish()
        written.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.wandb")})
    assert written[0] == written[1]  # it opened no run at all
    stage, loop = sorted(wandb_runs(tmp_path), key=lambda run: run["name"], reverse=True)
    assert (stage["name"], stage["kind"], stage["group"], stage["project"]) == ("seed-dpo", "stage", "group-1", "demo")
    assert [(row["step"], row["_step"]) for row in stage["history"]] == [(0, 0), (1, 1), (2, 2)]
    assert [row["loss"] for row in stage["history"]] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert "nothing" not in stage["history"][0] and stage["axes"] == {"step"}
    assert stage["config"]["lr"] == 0.1 and stage["config"]["max_tokens"] == 64
    assert (loop["name"], loop["group"], loop["axes"]) == ("loop", "group-1", {"iteration"})
    assert [row["policy"] for row in loop["history"]] == ["sft", "seed", "iteration-1"]
    assert [row["iteration"] for row in loop["history"]] == [0, 0, 1]
    assert loop["history"][0]["gold_reward_ci95_low"] == 0.6 and loop["history"][1]["filter_dropped/tie"] == 3
    assert b"hf_abc" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_more_iterations_replace_the_offline_copy_of_the_loop(tmp_path):
    for rows in (ROWS[:2], ROWS):
        tracking = Tracking("offline", "demo", "g", tmp_path)
        tracking.policies(rows, {})
        tracking.finish()
    (loop,) = wandb_runs(tmp_path)
    assert [row["policy"] for row in loop["history"]] == ["sft", "seed", "iteration-1"]


def test_a_stage_that_failed_or_ran_untracked_is_replayed_from_its_file_once(tmp_path):
    tracking = Tracking("offline", "demo", "g", tmp_path)
    with pytest.raises(ZeroDivisionError), tracking.stage("sft", "k", {}) as sink:
        sink({"step": 0, "loss": 9.0})
        raise ZeroDivisionError
    log = tmp_path / "train_log.jsonl"
    log.write_text('{"loss": 2.0, "step": 10}\n{"loss": 1.0, "step": 20}\n')
    assert tracking.replay("sft", "k", {}, log) is True
    assert tracking.replay("sft", "k", {}, log) is False
    (run,) = wandb_runs(tmp_path)
    assert [(row["step"], row["loss"]) for row in run["history"]] == [(10, 2.0), (20, 1.0)]


def test_a_worker_process_logs_into_the_same_group_with_the_same_id(tmp_path):
    tracking = Tracking("offline", "demo", "g", tmp_path)
    fields = json.loads(json.dumps(tracking.to_dict()))
    code = (
        "import json, sys; from align_loop.tracking.wandb import tracking_from_dict\n"
        "with tracking_from_dict(json.loads(sys.argv[1])).stage('sft', 'k', {}) as sink: sink({'step': 4, 'loss': 1})"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(fields)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")  # silent, too
    (run,) = wandb_runs(tmp_path)
    assert run["group"] == "g" and run["history"][0]["step"] == 4
    assert Tracking("offline", "demo", "g", tmp_path).replay("sft", "k", {}, tmp_path / "wandb.json") is False


def test_a_killed_stage_keeps_its_curve_and_is_logged_once_when_it_runs_again(tmp_path):
    tracking = Tracking("offline", "p", "g", tmp_path)
    tracking.policies(ROWS[:1], {})  # the parent's W&B service is up, and must not be left holding the child's run
    code = (
        "import json, sys, time; from align_loop.tracking.wandb import tracking_from_dict\n"
        "sink = tracking_from_dict(json.loads(sys.argv[1])).stage('sft', 'k', {})\n"
        "sink({'step': 0, 'loss': 5}); sink({'step': 1, 'loss': 4}); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, json.dumps(tracking.to_dict())])
    give_up = time.monotonic() + 20
    while (
        not [run for run in wandb_runs(tmp_path) if run["name"] == "sft" and run["history"]]
        and time.monotonic() < give_up
    ):
        time.sleep(0.05)  # until the first flush
    child.send_signal(signal.SIGKILL)
    child.wait()
    (run,) = (run for run in wandb_runs(tmp_path) if run["name"] == "sft")
    assert [row["loss"] for row in run["history"]] == [5]  # the open row waits for its step's end
    train(tracking, name="sft", key="k")
    tracking.finish()
    (run,) = (run for run in wandb_runs(tmp_path) if run["name"] == "sft")
    assert [row["step"] for row in run["history"]] == [0, 1, 2]


def test_a_dead_service_warns_once_and_the_run_goes_on(tmp_path):
    # In a process of its own: W&B's service is shared by all runs of a process.
    code = """
import os, signal, sys
from align_loop.tracking.wandb import Tracking
tracking = Tracking("offline", "p", "g", sys.argv[1])
sink = tracking.stage("sft", "k", {})
for folder in os.listdir("/proc"):
    if folder.isdigit() and open(f"/proc/{folder}/stat").read().rsplit(")", 1)[1].split()[1] == str(os.getpid()):
        if "wandb-core" in open(f"/proc/{folder}/cmdline").read():
            os.kill(int(folder), signal.SIGKILL)
import time; time.sleep(0.5)
for step in range(3):
    sink({"step": step, "loss": 1.0})
sink.close()
print(sink.failed, tracking.replay("sft", "other", {}, __import__("pathlib").Path("missing")))
"""
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=alone)
    assert (done.returncode, done.stdout) == (0, "True False\n")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("W&B: ") and "run the command again" in done.stderr


def test_without_the_library_nothing_is_logged_and_nothing_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what import finds where W&B is not installed
    tracking = Tracking("offline", "p", "g", tmp_path)
    train(tracking)
    tracking.policies(ROWS, {})
    tracking.finish()
    assert capsys.readouterr().err.count("W&B:") == 1
    assert not (tmp_path / "wandb").is_dir() or not any((tmp_path / "wandb").glob("offline-run-*"))
    monkeypatch.undo()
    assert json.loads((tmp_path / "wandb.json").read_text())["logged"] == {}  # so that the next command logs it all


def test_a_server_that_cannot_be_reached_leaves_an_offline_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking_wandb, "INIT_SECONDS", 1)
    tracking = Tracking("auto", "p", "g", tmp_path)
    assert tracking.mode == "online"
    train(tracking)
    (line,) = capsys.readouterr().err.splitlines()
    assert tracking.mode == "offline" and line.endswith("logging offline.")
    assert len(wandb_runs(tmp_path)[0]["history"]) == 3


def test_off_touches_nothing(tmp_path):
    tracking = tracking_from_dict(Tracking("off", "p", "g", tmp_path).to_dict())
    train(tracking)
    tracking.policies(ROWS, {})
    tracking.finish()
    assert list(tmp_path.iterdir()) == []


def test_mode_auto_follows_the_key_and_the_environment(monkeypatch, tmp_path):
    assert resolve_mode("auto") == "offline"
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        resolve_mode("online")
    (tmp_path / "netrc").write_text("machine other.example login user password x\n")
    assert resolve_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "a" * 40 + "\n")
    assert resolve_mode("auto") == resolve_mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert (resolve_mode("auto"), resolve_mode("offline")) == ("off", "offline")
    with pytest.raises(UserError, match="'on'"):
        resolve_mode("on")


def test_secrets_are_left_out_of_a_configuration():
    config = {
        "lr": 1e-5, "max_tokens": 64, "eos_token": "</s>", "tokenizer": "word", "keyboard": 1, "url": "https://hub/x",
        "hf_token": "x", "WANDB_API_KEY": "x", "apiKey": "x", "password": "x", "aws_secret_id": "x", "token": "x",
        "nested": [{"auth_token": "x", "beta": 0.1}, "hf_" + "a" * 34], "proxy": "http://me:pw@host/",
    }  # fmt: skip
    assert without_secrets(config) == {
        "lr": 1e-5, "max_tokens": 64, "eos_token": "</s>", "tokenizer": "word", "keyboard": 1, "url": "https://hub/x",
        "nested": [{"beta": 0.1}],
    }  # fmt: skip


def test_the_cost_of_a_tracked_stage_is_small(tmp_path):
    tracking = Tracking("offline", "p", "g", tmp_path)
    train(tracking, key="first")  # pays for the import and the service
    started = time.monotonic()
    train(tracking, key="second")
    assert time.monotonic() - started < 1.5
