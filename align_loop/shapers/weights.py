"""Weights: how much an example counts in the loss (``w``)."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from align_loop.groups import sigmoid
from align_loop.record import Row
from align_loop.shapers.context import ShapeContext, Shaped
from align_loop.shapers.rows import change, gap, number


@dataclass
class WeightGap:
    """``w`` times a factor that grows with the score gap and is 1 on average over the scored pairs (OPTune).

    ``temperature`` null: the factor is proportional to the gap (0 where the chosen answer scores less); a number: to
    sigmoid(gap / temperature). The paper's exact form isn't confirmed. Pairs without scores keep their weight, and
    so do all where no gap is above 0.

    YAML: ``weight_gap: {_target_: align_loop.shapers.weights.WeightGap, temperature: 1.0}``
    """

    temperature: float | None = 1.0
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"WeightGap.temperature={self.temperature} must be positive, or null")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        factors = [factor for row in examples if (factor := self._factor(row)) is not None]
        mean = fmean(sorted(factors)) if factors else 0.0  # sorted: the same sum in any order of rows
        if not mean:
            return list(examples), {}

        def weight(row: Row) -> Row | None:
            factor = self._factor(row)
            return None if factor is None else {"w": number(row, "w", 1.0) * factor / mean}

        return change(examples, weight), {}

    def _factor(self, row: Row) -> float | None:
        difference = gap(row)
        if difference is None:
            return None
        return max(difference, 0.0) if self.temperature is None else sigmoid(difference / self.temperature)
