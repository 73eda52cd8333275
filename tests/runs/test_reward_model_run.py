"""Whole runs in which a reward model is trained and judges."""

from __future__ import annotations

import json

import pytest

from runs.conftest import TINY, align, metrics


@pytest.fixture(scope="module")
def selfie_rm(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("rm") / "run"
    return run_dir, align("+experiment=selfie_rm", *TINY, f"run_dir={run_dir}")


def test_the_reward_model_is_measured_beside_the_implicit_reward(selfie_rm):
    run_dir, done = selfie_rm
    rows = metrics(run_dir)
    assert [row["reward_model_accuracy"] is None for row in rows] == [True] + [False] * 5  # the first is before it
    assert "On the held-out labels" in done.stdout and "reward_model: accuracy on held-out labels" in done.stdout
    (line,) = [json.loads(text) for text in (run_dir / "reward_models.jsonl").read_text().splitlines()]
    assert line["reward_model"] == "reward_model" and line["pairs"] == 48
    assert line["reward_model_accuracy"] == rows[-1]["reward_model_accuracy"]
    assert "calibration error" in (run_dir / "report.html").read_text()


def test_its_scores_label_the_pairs(selfie_rm):
    from align_loop.record import read_rows

    run_dir, _ = selfie_rm
    (pairs,) = (run_dir / "store").glob("iteration-1-pairs-*")
    (scores,) = (run_dir / "store").glob("iteration-1-annotate-*")
    by_sample = {row["sample_id"]: row for row in read_rows(scores / "scores.parquet")}
    rows = read_rows(pairs / "examples.parquet")
    assert rows and all(row["logp_policy"] is None for row in by_sample.values())
    for row in rows:
        assert row["score_chosen"] == by_sample[row["chosen_sample_id"]]["reward"] > row["score_rejected"]


def test_the_saved_reward_model_is_a_plain_folder(selfie_rm):
    from transformers import AutoModelForSequenceClassification

    folder = selfie_rm[0] / "reward_model" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
    assert model.config.num_labels == 1
    assert list(folder.glob("*.safetensors")) and not list(folder.glob("*.bin"))


def test_another_builder_or_shaper_samples_and_annotates_nothing_again(selfie_rm):
    run_dir, _ = selfie_rm
    changed = ["shapers.least_confident.share=0.2", f"run_dir={run_dir}"]
    lines = align("plan", "+experiment=selfie_rm", *TINY, *changed).stdout.splitlines()
    status = {line.split()[0]: line.split()[1] for line in lines if "/" in line.split()[0]}
    for stage in ("sample", "gold", "annotate"):
        assert status[f"iteration-1/{stage}"] == "cached"
    assert status["iteration-1/pairs"] == "stale" and status["iteration-1/train"] != "cached"


def test_a_reward_model_alone(tmp_path):
    done = align("+experiment=rm_bt", *TINY, f"run_dir={tmp_path / 'run'}")
    assert (tmp_path / "run" / "reward_model" / "reward_model.json").is_file() and "reward model: " in done.stdout
    assert [row["policy"] for row in metrics(tmp_path / "run")] == ["sft"]
