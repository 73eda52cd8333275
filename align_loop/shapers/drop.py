"""Filters before training: pairs that teach nothing or the wrong thing are dropped and counted by reason.

What a shaper is given and gives back: ``context.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from align_loop.record import Row
from align_loop.shapers.context import ShapeContext, Shaped, partition


@dataclass
class DropIdentical:
    """Drops pairs whose two answers are the same ids, or empty on either side."""

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        return partition(examples, self._reason)

    @staticmethod
    def _reason(row: Row) -> str | None:
        if row["chosen_ids"] == row["rejected_ids"] or row["chosen"] == row["rejected"]:
            return "identical answers"
        return "empty answer" if not row["chosen"].strip() or not row["rejected"].strip() else None


@dataclass
class DropBothTruncated:
    """Drops pairs in which both answers were cut at the length limit: neither shows how it would have ended."""

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        def reason(row: Row) -> str | None:
            return "both answers cut" if row["chosen_truncated"] and row["rejected_truncated"] else None

        return partition(examples, reason)


@dataclass
class DropTooLong:
    """Drops pairs that do not fit: prompt and longer answer together above ``max_length`` tokens (null: no limit)."""

    max_length: int | None = None

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        def reason(row: Row) -> str | None:
            longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            fits = self.max_length is None or len(row["prompt_ids"]) + longest <= self.max_length
            return None if fits else "pair too long for the model"

        return partition(examples, reason)


@dataclass
class DropLeastConfident:
    """Drops the ``share`` of pairs with the smallest score gap (ties by example id); 0 drops none.

    Human pairs without scores are left alone.
    """

    share: float = 0.0
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share={self.share} must be in [0, 1)")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        scored = [row for row in examples if row.get("score_chosen") is not None]
        ranked = sorted(scored, key=lambda r: (r["score_chosen"] - r["score_rejected"], r["example_id"]))
        least = {row["example_id"] for row in ranked[: round(self.share * len(scored))]}
        return partition(examples, lambda row: "least confident" if row["example_id"] in least else None)
