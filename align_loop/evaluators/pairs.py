"""How good a round's self-made labels were, and what noise handling caught: measured against gold where it is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align_loop.evaluators.statistics import precision_recall
from align_loop.record import Row, read_rows


def measure_pairs(pairs: Path, train: Path | None) -> dict[str, Any]:
    """The row of metrics for the pairs in stage ``pairs`` and the flags of stage ``train`` (null without gold)."""
    examples, dropped = read_rows(pairs / "examples.parquet"), read_rows(pairs / "dropped.parquet")
    reasons: dict[str, int] = {}
    for row in dropped:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    metrics = {
        "pairs": len(examples),
        "label_accuracy": label_accuracy(examples),
        "filter_dropped": reasons,
        "filter_precision": precision_recall({r["example_id"] for r in dropped}, wrong_labels(dropped))[0]
        if _gold_known(dropped)
        else None,
    }
    return metrics | (measure_flags(examples, read_rows(train / "flags.parquet")) if train else {})


def label_accuracy(examples: list[Row]) -> float | None:
    """The share of pairs with different gold whose chosen answer is the better one; None without any."""
    decided = [
        r["gold_chosen"] > r["gold_rejected"] for r in examples if _gold(r) and r["gold_chosen"] != r["gold_rejected"]
    ]
    return sum(decided) / len(decided) if decided else None


def wrong_labels(examples: list[Row]) -> set[str]:
    """Ids of the pairs whose rejected answer is the better one by gold."""
    return {r["example_id"] for r in examples if _gold(r) and r["gold_chosen"] < r["gold_rejected"]}


def measure_flags(examples: list[Row], flags: list[Row]) -> dict[str, Any]:
    """Share flagged among the pairs seen after the warm-up, precision and recall of the flag against gold."""
    active = [f for f in flags if f["alpha_active"]]
    marked = {f["example_id"] for f in active if f["flagged"]}
    seen = {f["example_id"] for f in active}
    precision, recall = (
        precision_recall(marked, wrong_labels(examples) & seen) if _gold_known(examples) else (None, None)
    )
    share = sum(f["flagged"] for f in active) / len(active) if active else None
    return {"flag_share": share, "flag_precision": precision, "flag_recall": recall}


def _gold(row: Row) -> bool:
    return row["gold_chosen"] is not None and row["gold_rejected"] is not None


def _gold_known(rows: list[Row]) -> bool:
    return any(_gold(row) for row in rows)
