"""Margins: by how much, in reward units, the chosen answer has to be the better one (``m`` of the pair loss).

Both replace the ``m`` that is there, and leave pairs without scores alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from align_loop.record import Row
from align_loop.shapers.context import ShapeContext, Shaped, partition
from align_loop.shapers.rows import change, gap, probability


@dataclass
class Margin:
    """``m = scale * gap``, or with ``of`` vote ``m = scale * (2 p - 1)``: contested pairs get a small margin.

    The gap is refined DPO's external reward (Gallego) and Secrets of RLHF II's adaptive margin; the vote, with ``p``
    the probability that the annotator gave (the share of judges that agreed), is the reward-regularised model's. For
    both papers the exact formula is recalled, not confirmed.

    YAML: ``margin: {_target_: align_loop.shapers.margins.Margin, scale: 1.0, of: gap}``
    """

    scale: float = 1.0
    of: Literal["gap", "vote"] = "gap"
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale):
            raise ValueError(f"Margin.scale={self.scale} must be a number other than 0; leave the shaper out instead")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        def margin(row: Row) -> Row | None:
            p = probability(row, context)
            if p is None:
                return None
            return {"m": self.scale * (gap(row) if self.of == "gap" else 2 * p - 1)}

        return change(examples, margin), {}


@dataclass
class OffsetLogGap:
    """``m = alpha * log(gap)`` (ODPO, Amini et al. 2024): pairs whose scores are far apart must be told apart by more.

    The logarithm needs a gap above 0. As the gap goes to 0 the margin goes to minus infinity and the pair's loss to
    0, so a pair with a gap of 0 or less is dropped ("no gap in favour of the chosen answer"), which is that limit.

    YAML: ``offset: {_target_: align_loop.shapers.margins.OffsetLogGap, alpha: 1.0}``
    """

    alpha: float = 1.0
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"OffsetLogGap.alpha={self.alpha} must be positive")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        def reason(row: Row) -> str | None:
            difference = gap(row)
            return "no gap in favour of the chosen answer" if difference is not None and difference <= 0 else None

        kept, dropped = partition(examples, reason)

        def offset(row: Row) -> Row | None:
            difference = gap(row)
            return None if difference is None else {"m": self.alpha * math.log(difference)}

        return change(kept, offset), dropped
