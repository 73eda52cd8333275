"""The loop with real vLLM in it, and one process a stage."""

from __future__ import annotations

import json

import pytest

from runs.conftest import TINY, align, metrics


def test_vllm_samples_in_the_loop_and_trainers_run_beside_it(tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["+experiment=selfie_iter4", *TINY, "loop.iterations=1", f"run_dir={run_dir}"]
    done = align(*arguments, "sampler.engine=auto")
    assert "vllm on cpu" in done.stdout
    sampled = [json.loads(m.read_text()) for m in (run_dir / "store").glob("iteration-1-sample-*/manifest.json")]
    assert [m["facts"]["engine"].split()[0] for m in sampled] == ["vllm"]
    rows = metrics(run_dir)
    assert [row["policy"] for row in rows] == ["sft", "seed", "iteration-1"]
    # vLLM loads the trained policy itself: its answers are those of the policy, not noise.
    assert rows[-1]["mean_answer_tokens"] > 5


@pytest.mark.full
def test_a_process_for_each_stage_gives_the_same_run(selfie, tmp_path):
    align("+experiment=selfie_iter4", *TINY, f"run_dir={tmp_path / 'run'}", "hardware.launcher=process", timeout=900)
    assert metrics(tmp_path / "run") == metrics(selfie[0])
