"""The closing table and the verdict: what they say, and what the intervals don't let them say."""

from __future__ import annotations

import pytest
from fake_run import fake_run, write_metrics

from align_loop.errors import UserError
from align_loop.report.run_files import read_json, read_metrics
from align_loop.report.table import closing_table, verdict


def row(policy: str, gold: float | None = None, half: float | None = 0.02, **more) -> dict:
    interval = None if gold is None or half is None else [gold - half, gold + half]
    return {"policy": policy, "iteration": 0, "gold_reward": gold, "gold_reward_ci95": interval, "good": True, **more}


def test_table_is_aligned_within_100_columns_and_without_empty_columns(tmp_path):
    rows = read_metrics(fake_run(tmp_path, drift_at=4))
    lines = closing_table(rows).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[3:9]] == [r["policy"] for r in rows]
    assert {line.rfind(".") for line in lines[3:5]} != {-1} and len({len(line) for line in lines[2:9]}) == 1
    assert "0.630 [.61, .65]" in lines[3] and "76%" in lines[4]
    assert "filter" not in lines[0]  # null in every row
    assert lines[8].startswith("iteration-4 !") and "! drift at iteration-4: answers cut off" in lines[9]


def test_the_judge_shows_its_interval_where_there_is_no_gold(tmp_path):
    text = closing_table(read_metrics(fake_run(tmp_path, gold=False)))
    assert "gold" not in text and "0.84 [.80, .88]" in text


def test_table_of_nothing_and_of_nulls():
    assert closing_table([]) == "no policy was evaluated"
    assert closing_table([{"policy": "sft", "gold_reward": None}]).splitlines()[-1] == "sft"


def test_one_more_policy_does_not_move_a_value_to_another_column():
    text = closing_table([row("sft", 0.5, tokens=12), row("seed", 0.6, label_accuracy=0.8)])
    head, numbers = text.splitlines()[0:2], text.splitlines()[-1]
    assert numbers.index("80%") + 3 == head[0].index("labels") + 6
    assert numbers.rstrip().endswith("-")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("sft", 0.63), row("seed", 0.71), row("iteration-1", 0.88)],
         "Gold reward rose from 0.63 (sft) to 0.88 (iteration-1), above the seed policy's 0.71 with intervals apart."),
        ([row("sft", 0.63), row("seed", 0.86), row("iteration-1", 0.88)],
         "Gold reward rose from 0.63 (sft) to 0.88 (iteration-1), "
         "not measurably different from the seed policy's 0.86 (intervals overlap)."),
        ([row("sft", 0.63), row("seed", 0.90), row("iteration-1", 0.80)],
         "Gold reward rose from 0.63 (sft) to 0.80 (iteration-1), below the seed policy's 0.90 with intervals apart."),
        ([row("sft", 0.63), row("dpo", 0.66)],
         "No measurable change in gold reward: from 0.63 (sft) to 0.66 (dpo), intervals overlap."),
        ([row("sft", 0.63), row("dpo", 0.61)],
         "No measurable change in gold reward: from 0.63 (sft) to 0.61 (dpo), intervals overlap."),
        ([row("sft", 0.63), row("dpo", 0.51)], "Got worse: gold reward fell from 0.63 (sft) to 0.51 (dpo)."),
        ([row("sft", 0.63, None), row("dpo", 0.9)],
         "Gold reward went from 0.63 (sft) to 0.90 (dpo); without intervals this may be chance."),
        ([row("sft", 0.63)], "Gold reward 0.63 [0.61, 0.65] (sft); nothing to compare it with."),
        ([row("sft")], "The quality of the answers was not measured (there is no gold reward here), "
         "nor was the judge: read the answers side by side."),
        ([row("sft"), row("seed", judge_accuracy=0.7, judge_accuracy_ci95=[0.68, 0.72]),
          row("iteration-1", judge_accuracy=0.8, judge_accuracy_ci95=[0.78, 0.82])],
         "The quality of the answers was not measured (there is no gold reward here); "
         "judge accuracy rose from 0.70 (seed) to 0.80 (iteration-1)."),
        ([], "No policy was evaluated."),
    ],
)  # fmt: skip
def test_verdict(rows, expected):
    assert verdict(rows, {}) == expected


def test_verdict_counts_the_policy_in_final_not_the_last_row():
    rows = [row("sft", 0.6), row("iteration-1", 0.8), row("iteration-2", 0.9)]
    assert "to 0.80 (iteration-1)" in verdict(rows, {"final_policy": "iteration-1"})


def test_verdict_after_drift():
    rows = [row("sft", 0.63), row("iteration-1", 0.8), {**row("iteration-2", 0.4), "good": False, "drift": "Too long."}]
    assert verdict(rows, {}) == (
        "Got worse: gold reward fell from 0.80 (iteration-1) to 0.40 (iteration-2); drift at iteration-2 (Too long); "
        "final/ is iteration-1, the policy before the drift; up to there, gold reward rose from 0.63 (sft) to 0.80 "
        "(iteration-1)."
    )
    unmeasured = [{**r, "gold_reward": None, "gold_reward_ci95": None} for r in rows]
    text = verdict(unmeasured, {})
    assert text.startswith("The loop was stopped; drift at iteration-2") and "worse" not in text
    assert "not measured" in text


def test_broken_files_are_named_with_their_line(tmp_path):
    write_metrics(tmp_path, [row("sft", 0.6)])
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"policy": \n')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2"):
        read_metrics(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary.json: not valid JSON"):
        read_json(tmp_path, "summary.json")


def test_nan_in_metrics_counts_as_missing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"policy": "sft", "gold_reward": NaN, "gold_reward_ci95": [NaN, 0.1]}\n')
    assert read_metrics(tmp_path) == [{"policy": "sft", "gold_reward": None, "gold_reward_ci95": None}]
