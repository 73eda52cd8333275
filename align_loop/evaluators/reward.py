"""Evaluation of a reward model on held-out labelled preferences: how often it agrees, and whether it knows when."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from align_loop.durable import write_json
from align_loop.engines.reward_folder import RewardFolder, read_reward_folder
from align_loop.evaluators.statistics import calibration_error, correlation, wilson_interval
from align_loop.record import Row, read_rows
from align_loop.render import Renderer
from align_loop.stage import StageContext

QUARTERS = 4
FILE = "reward_evaluation.json"


def evaluate_reward(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """The stage: writes ``reward_evaluation.json`` (see ``measure_reward``).

    ``config`` {dtype}; inputs ``reward_model`` (its folder) and ``heldout`` (a table of ``record.PREFERENCES``).
    """
    model, heldout = read_reward_folder(inputs["reward_model"]), read_rows(inputs["heldout"])
    renderer = Renderer(model.members[0])
    sequences = [
        (renderer.prompt_ids(row["messages"]), renderer.answer_ids(row[side]))
        for row in heldout
        for side in ("chosen", "rejected")
    ]
    names = [f"held-out label {row['example_id']}, {side}" for row in heldout for side in ("chosen", "rejected")]
    with context.progress(len(model.members) * len(sequences), "answers") as progress:
        margins, scores = _score(model, sequences, names, config["dtype"], context, progress.update)
    context.rows("held-out labels", into=len(heldout), out=len(heldout))
    context.tokens(len(model.members) * sum(len(p) + len(a) for p, a in sequences))
    measured = measure_reward(heldout, margins, scores, [len(answer) for _, answer in sequences])
    described = {"head": model.head, "dim": model.dim, "members": len(model.members)}
    write_json(context.out / FILE, described | measured)


def measure_reward(
    heldout: list[Row], margins: list[list[float]], scores: list[float] | None, lengths: list[int]
) -> dict[str, Any]:
    """The metrics of one reward model on ``n`` labelled pairs; null where something is not defined.

    ``margins``: for each member the n log-odds that the chosen side is better; ``scores``: the chosen and rejected
    side's score of each pair in turn (2n, means over the members), None for a head without scores; ``lengths``: their
    answers' tokens (2n).

    An ensemble's margin is its members' mean. A pair agrees where its margin is above 0. ``ece``: expected calibration
    error of sigmoid(margin), see ``statistics.calibration_error``. ``accuracy_by_margin``: the pairs in four parts of
    equal size (give or take one) by |margin|, smallest first. ``margin_sd``: the members' disagreement, the mean over
    pairs of the standard deviation (n - 1) of their margins. Correlations are Pearson's: of score with tokens over all
    answers, and of margin with the difference in tokens. ``heldout`` and ``margins``: example id -> 1.0 where it
    agrees, else 0.0; and its margin.
    """
    mean = [fmean(column) for column in zip(*margins, strict=True)]
    agreed = [margin > 0 for margin in mean]
    right, total = sum(agreed), len(mean)
    longer = [a - b for a, b in zip(lengths[::2], lengths[1::2], strict=True)]
    return {
        "pairs": total,
        "accuracy": right / total if total else None,
        "accuracy_ci95": wilson_interval(right, total) if total else None,
        "ece": calibration_error(mean),
        "log_loss": fmean(max(-u, 0.0) + math.log1p(math.exp(-abs(u))) for u in mean) if total else None,
        "accuracy_by_margin": by_margin(mean),
        "mean_margin": fmean(mean) if total else None,
        "margin_sd": fmean(stdev(c) for c in zip(*margins, strict=True)) if total and len(margins) > 1 else None,
        "mean_score_chosen": fmean(scores[::2]) if scores else None,
        "mean_score_rejected": fmean(scores[1::2]) if scores else None,
        "score_length_correlation": correlation(scores, lengths) if scores else None,
        "margin_length_correlation": correlation(mean, longer),
        "heldout": {row["example_id"]: float(a) for row, a in zip(heldout, agreed, strict=True)},
        "margins": {row["example_id"]: m for row, m in zip(heldout, mean, strict=True)},
    }


def by_margin(margins: Sequence[float]) -> list[dict[str, Any]]:
    """Accuracy with its Wilson interval in each quarter of the pairs by |margin|, smallest first."""
    order = sorted(margins, key=abs)
    parts = [order[len(order) * k // QUARTERS : len(order) * (k + 1) // QUARTERS] for k in range(QUARTERS)]
    return [
        {
            "from": abs(part[0]),
            "to": abs(part[-1]),
            "pairs": len(part),
            "accuracy": fmean(m > 0 for m in part),
            "accuracy_ci95": wilson_interval(sum(m > 0 for m in part), len(part)),
        }
        for part in parts
        if part
    ]


def read_reward_evaluation(stage: Path) -> dict[str, Any]:
    """What ``evaluate_reward`` wrote."""
    return json.loads((stage / FILE).read_text(encoding="utf-8"))


def _score(
    model: RewardFolder, sequences: list, names: list[str], dtype: str, context: StageContext, on_done: Any
) -> tuple[list[list[float]], list[float] | None]:
    """The members' margins, and the mean scores of all sides where the head has scores."""
    from align_loop.engines.reward_scoring import member_vectors  # imports torch
    from align_loop.objectives.reward import preference_score

    vectors = member_vectors(
        model,
        sequences,
        dtype=dtype,
        device=context.hardware.get("device") or "cpu",
        token_budget=context.hardware.get("score_token_budget") or 16384,
        names=names,
        on_done=on_done,
    ).double()
    margins = preference_score(vectors[:, 0::2], vectors[:, 1::2], model.head).tolist()
    return margins, vectors[:, :, 0].mean(dim=0).tolist() if model.head == "scalar" else None
