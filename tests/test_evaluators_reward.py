"""Metrics of a reward model against hand computation, and its evaluation on labelled preferences."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from reward_fixtures import ENOUGH, toy_pairs, train
from tiny import tiny_llama

from align_loop.builders.human import from_preferences
from align_loop.engines.reward_scoring import reward_scores
from align_loop.errors import UserError
from align_loop.evaluators.reward import by_margin, evaluate_reward, measure_reward, read_reward_evaluation
from align_loop.evaluators.statistics import calibration_error, correlation, wilson_interval
from align_loop.record import PREFERENCES, write_table
from align_loop.render import Renderer
from align_loop.stage import StageContext
from align_loop.trainers.reward_config import RewardModel


def logit(p: float) -> float:
    return math.log(p / (1 - p))


# --- statistics -------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    """Confidences .52, .53 (one right), .81, .84, .83 (two right) and .97 (right), in parts of 0.05."""
    signed = [logit(0.52), -logit(0.53), logit(0.81), logit(0.84), -logit(0.83), logit(0.97)]
    expected = 2 / 6 * abs(1 / 2 - 0.525) + 3 / 6 * abs(2 / 3 - (0.81 + 0.84 + 0.83) / 3) + 1 / 6 * abs(1 - 0.97)
    assert calibration_error(signed) == pytest.approx(expected)
    assert calibration_error(signed[::-1]) == pytest.approx(expected)
    one_part = abs(4 / 6 - (0.52 + 0.53 + 0.81 + 0.84 + 0.83 + 0.97) / 6)
    assert calibration_error(signed, bins=1) == pytest.approx(one_part)
    assert calibration_error([m * 3 for m in signed]) != pytest.approx(expected)


def test_calibration_error_at_the_ends() -> None:
    assert calibration_error([]) is None
    assert calibration_error([1e4, 1e4]) == 0 and calibration_error([-1e4]) == 1
    assert calibration_error([0.0, 0.0]) == 0.5  # no preference is no agreement
    calibrated = [logit(0.75)] * 75 + [-logit(0.75)] * 25
    assert calibration_error(calibrated) == pytest.approx(0, abs=1e-12)


def test_correlation() -> None:
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1) and correlation([1, 2, 3], [3, 2, 1]) == -1
    assert correlation([1, 2, 4], [5, 0, 1]) == pytest.approx(statistics.correlation([1, 2, 4], [5, 0, 1]))
    assert correlation([1, 1], [1, 2]) is None and correlation([1], [2]) is None and correlation([], []) is None


def test_accuracy_by_margin() -> None:
    parts = by_margin([3.0, -0.1, 0.2, -4.0, 1.0, 0.5, -0.6, 8.0, 9.0])
    assert [(p["from"], p["to"], p["pairs"]) for p in parts] == [
        (0.1, 0.2, 2),
        (0.5, 0.6, 2),
        (1.0, 3.0, 2),
        (4.0, 9.0, 3),
    ]
    assert [p["accuracy"] for p in parts] == [0.5, 0.5, 1.0, pytest.approx(2 / 3)]
    assert parts[3]["accuracy_ci95"] == wilson_interval(2, 3)
    assert [p["pairs"] for p in by_margin([1.0, -2.0])] == [1, 1] and by_margin([]) == []


# --- the metrics ------------------------------------------------------------------------------------------------

HELDOUT = [{"example_id": e} for e in "abc"]


def test_measure() -> None:
    margins = [[2.0, -1.0, 0.0], [4.0, -1.0, 0.0]]
    scores, lengths = [2.0, -1.0, 0.0, 1.0, 3.0, 3.0], [5, 2, 3, 3, 1, 4]
    found = measure_reward(HELDOUT, margins, scores, lengths)
    assert found["heldout"] == {"a": 1.0, "b": 0.0, "c": 0.0} and found["margins"] == {"a": 3.0, "b": -1.0, "c": 0.0}
    assert (found["pairs"], found["accuracy"], found["mean_margin"]) == (3, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found["accuracy_ci95"] == wilson_interval(1, 3) and found["ece"] == calibration_error([3.0, -1.0, 0.0])
    assert found["margin_sd"] == pytest.approx(math.sqrt(2) / 3)
    assert (found["mean_score_chosen"], found["mean_score_rejected"]) == (pytest.approx(5 / 3), 1)
    assert found["score_length_correlation"] == correlation(scores, lengths)
    assert found["margin_length_correlation"] == correlation([3.0, -1.0, 0.0], [3, 0, -3])
    loss = -sum(math.log(1 / (1 + math.exp(-u))) for u in (3.0, -1.0, 0.0)) / 3
    assert found["log_loss"] == pytest.approx(loss)
    json.dumps(found, allow_nan=False)


def test_what_is_not_known_is_null() -> None:
    vector = measure_reward(HELDOUT, [[2.0, -1.0, 0.0]], None, [5, 2, 3, 3, 1, 4])
    assert vector["mean_score_chosen"] is None and vector["score_length_correlation"] is None
    assert vector["margin_sd"] is None and vector["accuracy"] == pytest.approx(1 / 3)
    empty = {"pairs": 0, "accuracy_by_margin": [], "heldout": {}, "margins": {}}
    nothing = measure_reward([], [[], []], [], [])
    assert {k: v for k, v in nothing.items() if v is not None} == empty
    huge = measure_reward(HELDOUT, [[1e5, -1e5, 0.0]], None, [1] * 6)
    assert math.isfinite(huge["log_loss"])


# --- the stage --------------------------------------------------------------------------------------------------


def preferences(count: int, seed: int) -> list[dict]:
    """The learnable preference as text."""
    return [
        {
            "example_id": row["example_id"],
            "prompt_id": row["prompt_id"],
            "messages": [{"role": "user", "content": words(row["prompt_ids"][2:-1])}],
            "chosen": words(row["chosen_ids"][:-1]),
            "rejected": words(row["rejected_ids"][:-1]),
            "gold_chosen": None,
            "gold_rejected": None,
        }
        for row in toy_pairs(count, seed)
    ]


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), seed=0)


def evaluated(folder: Path, heldout: list[dict], out: Path) -> dict:
    out.mkdir()
    write_table(out / "heldout.parquet", heldout, PREFERENCES)
    context = StageContext("evaluate", out, hardware={"device": "cpu", "score_token_budget": 200}, quiet=True)
    evaluate_reward({"dtype": "float32"}, {"reward_model": folder, "heldout": out / "heldout.parquet"}, context)
    assert context.report["rows"]["held-out labels"]["in"] == len(heldout)
    return read_reward_evaluation(out)


@pytest.mark.parametrize("kind", [RewardModel(members=2), RewardModel(head="gpm", dim=4)], ids=["scalar", "gpm"])
def test_a_model_trained_on_preferences_agrees_with_held_out_ones(tmp_path, base, kind) -> None:
    examples = from_preferences(preferences(200, 1), Renderer(base))
    train(tmp_path / "model", base, examples, reward_model=kind, training=ENOUGH)
    heldout = preferences(40, 2)
    found = evaluated(tmp_path / "model", heldout, tmp_path / "out")
    assert (
        found["accuracy"] > 0.9 and found["pairs"] == 40 and set(found["heldout"]) == {r["example_id"] for r in heldout}
    )
    assert (found["head"], found["dim"], found["members"]) == (kind.head, kind.dim, kind.members)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in heldout]
    against = evaluated(tmp_path / "model", turned, tmp_path / "against")
    assert against["accuracy"] == pytest.approx(1 - found["accuracy"])
    assert against["ece"] > 0.5 > found["ece"] and against["mean_margin"] == pytest.approx(-found["mean_margin"])
    if kind.head == "gpm":
        assert found["mean_score_chosen"] is None and found["margin_sd"] is None
        return
    renderer = Renderer(base)
    sides = [
        (renderer.prompt_ids(r["messages"]), renderer.answer_ids(r[s])) for r in heldout for s in ("chosen", "rejected")
    ]
    scores, _ = reward_scores(tmp_path / "model", sides, dtype="float32", device="cpu")
    expected = {r["example_id"]: a - b for r, a, b in zip(heldout, scores[::2], scores[1::2], strict=True)}
    assert found["margins"] == pytest.approx(expected, abs=1e-4) and found["margin_sd"] > 0
    assert found["mean_score_chosen"] == pytest.approx(statistics.fmean(scores[::2]), abs=1e-4)
    assert found["score_length_correlation"] == pytest.approx(correlation(scores, [len(a) for _, a in sides]), abs=1e-4)


def test_labels_that_can_not_be_scored_are_named(tmp_path, base) -> None:
    train(tmp_path / "model", base, toy_pairs(8))
    assert evaluated(tmp_path / "model", [], tmp_path / "none")["accuracy"] is None
    long = preferences(1, 2)[0] | {"example_id": "long", "rejected": words([20] * 300)}
    with pytest.raises(UserError, match="held-out label long, rejected: .* tokens, the reward model takes 256"):
        evaluated(tmp_path / "model", [*preferences(2, 2), long], tmp_path / "out")
    with pytest.raises(UserError, match="no reward model"):
        evaluated(base, preferences(2, 2), tmp_path / "base")
