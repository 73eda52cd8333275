"""Filters before training: pairs that teach nothing or the wrong thing are dropped and counted by reason.

What a shaper is given and gives back: ``context.py``. Points, demonstrations and groups are held to what applies to
them: an empty answer, a length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from align_loop.record import Row
from align_loop.shapers.context import ShapeContext, Shaped, partition
from align_loop.shapers.rows import By, answers_of, check_share, confidence, gap, is_pair, lowest_share


@dataclass
class DropIdentical:
    """Drops pairs whose two answers are the same ids, or empty on either side.

    YAML: ``identical: {_target_: align_loop.shapers.drop.DropIdentical}``
    """

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        return partition(examples, self._reason)

    @staticmethod
    def _reason(row: Row) -> str | None:
        if is_pair(row) and (row["chosen_ids"] == row["rejected_ids"] or row["chosen"] == row["rejected"]):
            return "identical answers"
        texts = [row.get(side) for side in ("chosen", "rejected")]
        return "empty answer" if any(text is not None and not text.strip() for text in texts) else None


@dataclass
class DropBothTruncated:
    """Drops pairs in which both answers were cut at the length limit: neither shows how it would have ended.

    YAML: ``both_truncated: {_target_: align_loop.shapers.drop.DropBothTruncated}``
    """

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        def reason(row: Row) -> str | None:
            return "both answers cut" if row.get("chosen_truncated") and row.get("rejected_truncated") else None

        return partition(examples, reason)


@dataclass
class DropTooLong:
    """Drops examples that do not fit: prompt and longest answer together above ``max_length`` tokens (null: no limit).

    YAML: ``too_long: {_target_: align_loop.shapers.drop.DropTooLong, max_length: "${setting.max_length}"}``
    """

    max_length: int | None = None

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        def reason(row: Row) -> str | None:
            longest = max(map(len, answers_of(row)), default=0)
            fits = self.max_length is None or len(row["prompt_ids"]) + longest <= self.max_length
            return None if fits else "pair too long for the model"

        return partition(examples, reason)


@dataclass
class DropTies:
    """Drops scored pairs whose scores differ by at most ``minimum``, in either direction; 0 drops equal scores alone.

    YAML: ``ties: {_target_: align_loop.shapers.drop.DropTies, minimum: 0.1}``
    """

    minimum: float = 0.0
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.minimum >= 0:
            raise ValueError(f"DropTies.minimum={self.minimum} must be 0 or more")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        def reason(row: Row) -> str | None:
            difference = gap(row)
            return "scores too close" if difference is not None and abs(difference) <= self.minimum else None

        return partition(examples, reason)


@dataclass
class DropLeastConfident:
    """Drops the ``share`` of pairs in which there is the least confidence (ties by example id); 0 drops none.

    ``by``: the score gap, or the probability that the annotator gave when it compared the two answers (West-of-N keeps
    pairs above a quantile of it). ``minimum``: what falls below this confidence goes as well, however many; null:
    none. Human pairs without scores are left alone.

    YAML: ``least_confident: {_target_: align_loop.shapers.drop.DropLeastConfident, share: 0.1, by: gap}``
    """

    share: float = 0.0
    by: By = "gap"
    minimum: float | None = None
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share(self, "share")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        values = [confidence(row, context, self.by) for row in examples]
        least = lowest_share(examples, values, self.share)
        if self.minimum is not None:
            pairs = zip(examples, values, strict=True)
            least |= {row["example_id"] for row, value in pairs if value is not None and value < self.minimum}
        return partition(examples, lambda row: "least confident" if row["example_id"] in least else None)
