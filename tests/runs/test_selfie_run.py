"""What a caller can rely on: outputs, repetition, plan, resumption after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from align_loop.digest import DigestCache, folder_digest
from runs.conftest import TINY, align, command, environment, metrics

POLICIES = ["sft", "seed", "iteration-1", "iteration-2", "iteration-3", "iteration-4"]
KEYS = "policy iteration gold_reward gold_reward_ci95 win_rate_vs_sft judge_accuracy label_accuracy mean_answer_tokens"


def tables(run_dir: Path) -> dict[str, str]:
    """Digest of every table that the run made, by stage and file."""
    cache = DigestCache()
    return {
        f"{manifest.parent.name}/{name}": digest
        for manifest in sorted((run_dir / "store").glob("*/manifest.json"))
        for name, digest in json.loads(manifest.read_text())["entries"].items()
    } | {"final": folder_digest(run_dir / "final", cache)}


def test_the_outputs_are_the_documented_ones(selfie):
    run_dir, done = selfie
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["policy"] for row in rows] == POLICIES
    assert [row["iteration"] for row in rows] == [0, 0, 1, 2, 3, 4]
    for row in rows:
        assert set(KEYS.split()) <= set(row)
        assert 0 <= row["gold_reward_ci95"][0] <= row["gold_reward"] <= row["gold_reward_ci95"][1] <= 1
        assert row["seconds"] > 0
    assert rows[0]["judge_accuracy"] is None and rows[0]["win_rate_vs_sft"] is None
    assert all(0 <= row["judge_accuracy"] <= 1 for row in rows[1:])
    assert [row["label_accuracy"] is None for row in rows] == [True, True, False, False, False, False]
    assert (run_dir / "config.yaml").is_file() and "iteration-4" in (run_dir / "report.html").read_text()
    assert "iteration-4" in done.stdout and "gold reward" in done.stdout


def test_the_noise_flag_takes_its_share(selfie):
    rows = metrics(selfie[0])[2:]
    assert all(0.05 <= row["flag_share"] <= 0.15 for row in rows if row["flag_share"] is not None)
    assert any(row["flag_share"] is not None for row in rows)


def test_final_loads_in_transformers_without_peft(selfie):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = selfie[0] / "final"
    model = AutoModelForCausalLM.from_pretrained(final, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(final, local_files_only=True)
    prompt = [{"role": "user", "content": "write a sad poem about the river"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
    assert not list(final.rglob("*.bin")) and list(final.glob("*.safetensors"))


def test_the_same_command_runs_nothing_again(selfie):
    run_dir, _ = selfie
    before = metrics(run_dir)
    started = time.monotonic()
    again = align("+experiment=selfie_iter4", *TINY, f"run_dir={run_dir}")
    assert "nothing to run" in again.stdout
    assert metrics(run_dir) == before
    assert time.monotonic() - started < 60  # 15 s on an idle machine


def test_plan_says_what_is_cached_and_which_key_changed(selfie):
    run_dir, _ = selfie
    lines = align("plan", "+experiment=selfie_iter4", *TINY, f"run_dir={run_dir}").stdout.splitlines()
    assert all(" cached " in f"{line} " for line in lines[:-1]) and lines[-1].endswith("0 to run")
    changed = align("plan", "+experiment=selfie_iter4", *TINY, f"run_dir={run_dir}", "noise.alpha=0.3").stdout
    first = next(line for line in changed.splitlines() if "stale" in line)
    assert first.startswith("iteration-1/train") and "noise.alpha 0.1 -> 0.3" in first
    assert "iteration-1/sample " in changed and "iteration-2/sample" in changed.split("waits for", 1)[0] + changed


def test_plan_creates_nothing(tmp_path):
    align("plan", "+experiment=selfie_iter4", *TINY, f"run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_rows_are_accounted_for_in_every_manifest(selfie):
    for manifest in (selfie[0] / "store").glob("*/manifest.json"):
        content = json.loads(manifest.read_text())
        for table in content["rows"].values():
            assert table["in"] == table["out"] + sum(table["dropped"].values())
        assert {"versions", "git", "seconds", "tokens", "config", "inputs", "code"} <= set(content)


def test_show_pages_through_pairs_and_answers(selfie):
    run_dir, _ = selfie
    pairs = align("show", str(run_dir), "pairs", "--iteration", "2", "--limit", "3").stdout
    assert "dear" in pairs or "chosen" in pairs.lower()
    answers = align("show", str(run_dir), "answers", "--iteration", "1").stdout
    assert "write a" in answers or "i need" in answers or "please" in answers
    wrong = align("show", str(run_dir), "pairs", "--iteration", "9", check=False)
    assert wrong.returncode == 2 and "9" in wrong.stderr and "Traceback" not in wrong.stderr


def test_until_stops_after_a_stage_and_the_rest_follows_later(selfie, tmp_path):
    run_dir = tmp_path / "run"
    stopped = align("+experiment=selfie_iter4", *TINY, f"run_dir={run_dir}", "loop.until=iteration-1/pairs")
    assert "stopped after iteration-1/pairs" in stopped.stdout
    assert [row["policy"] for row in metrics(run_dir)] == ["sft", "seed"]
    align("+experiment=selfie_iter4", *TINY, f"run_dir={run_dir}")
    assert metrics(run_dir) == metrics(selfie[0])


@pytest.mark.parametrize("line", ["sft/train", "iteration-1/sample", "iteration-3/train"])
def test_a_killed_run_ends_like_an_undisturbed_one(selfie, tmp_path, line):
    """SIGKILL shortly after ``line`` was printed, in the middle of the stage that follows."""
    run_dir = tmp_path / "run"
    arguments = command("+experiment=selfie_iter4", *TINY, f"run_dir={run_dir}")
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    for printed in process.stdout:
        if f"+ {line}" in printed:
            break
    time.sleep(0.15)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = align("+experiment=selfie_iter4", *TINY, f"run_dir={run_dir}")
    assert "nothing to run" not in done.stdout
    assert metrics(run_dir) == metrics(selfie[0])
    assert tables(run_dir) == tables(selfie[0])
    assert not list((run_dir / "store").glob(".tmp-*"))


def test_two_processes_on_one_run_directory(selfie):
    run_dir, _ = selfie
    from filelock import FileLock

    with FileLock(run_dir / ".owner.lock"):
        refused = align("+experiment=selfie_iter4", *TINY, f"run_dir={run_dir}", check=False)
    assert refused.returncode == 2 and "another process" in refused.stderr


def test_recipes_share_their_stages_through_one_store(selfie, tmp_path):
    run_dir, _ = selfie
    done = align("+experiment=dpo_full_labels", *TINY, f"run_dir={tmp_path / 'full'}", f"store_dir={run_dir / 'store'}")
    assert "sft/train" not in done.stdout and "dpo/train" in done.stdout
    rows = metrics(tmp_path / "full")
    assert [row["policy"] for row in rows] == ["sft", "dpo"]
    assert rows[0] == metrics(run_dir)[0]


def test_dropped_instead_of_smoothed(selfie, tmp_path):
    run_dir, _ = selfie
    store = tmp_path / "store"
    shutil.copytree(run_dir / "store", store)
    align("+experiment=selfie_filter", *TINY, f"run_dir={tmp_path / 'filter'}", f"store_dir={store}")
    rows = metrics(tmp_path / "filter")
    assert rows[:2] == metrics(run_dir)[:2]
    assert all(row["filter_dropped"]["least confident"] >= 2 for row in rows[2:])
    assert rows[2]["pairs"] < metrics(run_dir)[2]["pairs"]
