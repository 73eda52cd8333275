"""Soft labels: how probable it is that the chosen answer is the better one, ``q`` of the pair loss.

Flip rate and smoothing act on the ``q`` that is there (1 unless another shaper came before), so they compose: with
``q`` from ``SoftLabel`` they give the loss of a soft label that was seen through noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from align_loop.groups import sigmoid
from align_loop.record import Row
from align_loop.shapers.context import ShapeContext, Shaped
from align_loop.shapers.rows import By, change, check_share, confidence, gap, is_pair, lowest_share, number, probability


@dataclass
class FlipRate:
    """``q -> (q - rate) / (1 - 2 rate)``: the label that undoes flips of known frequency; q = (1-e)/(1-2e) for q = 1.

    Robust DPO (Chowdhury et al. 2024): the loss with this ``q``, which may lie outside [0, 1], is on average over the
    flips the loss of the true labels. ``tag``: only pairs of this tag (human, self, ...), null for all.

    YAML: ``flip_rate: {_target_: align_loop.shapers.labels.FlipRate, rate: 0.1, tag: human}``
    """

    rate: float = 0.1
    tag: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 0.5:
            raise ValueError(f"FlipRate.rate={self.rate} must be in [0, 0.5): at one half a label says nothing")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        return _relabelled(examples, self.tag, lambda q: (q - self.rate) / (1 - 2 * self.rate))


@dataclass
class LabelSmoothing:
    """``q -> q (1 - rate) + (1 - q) rate``: never quite sure of a label; q = 1 - e for q = 1.

    Conservative DPO (Mitchell 2023), as RLHF Workflow uses it. ``tag``: only pairs of this tag, null for all.

    YAML: ``smoothing: {_target_: align_loop.shapers.labels.LabelSmoothing, rate: 0.1}``
    """

    rate: float = 0.1
    tag: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 0.5:
            raise ValueError(f"LabelSmoothing.rate={self.rate} must be in [0, 0.5]")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        return _relabelled(examples, self.tag, lambda q: _smooth(q, self.rate))


@dataclass
class ConfidenceSmooth:
    """Label smoothing by ``rate`` for the ``share`` of pairs in which there is the least confidence, and for no other.

    ``by``: the score gap, or the annotator's probability. Selfie's rule on annotated scores instead of on margins seen
    in training (for those: ``noise``); also what Secrets of RLHF II does with weak preferences. Ties by example id.

    YAML: ``smooth: {_target_: align_loop.shapers.labels.ConfidenceSmooth, share: 0.1, rate: 0.1, by: gap}``
    """

    share: float = 0.1
    rate: float = 0.1
    by: By = "gap"
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share(self, "share")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"ConfidenceSmooth.rate={self.rate} must be in [0, 1]")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        values = [confidence(row, context, self.by) for row in examples]
        least = lowest_share(examples, values, self.share)

        def label(row: Row) -> Row | None:
            return {"q": _smooth(number(row, "q", 1.0), self.rate)} if row["example_id"] in least else None

        return change(examples, label), {}


@dataclass
class SoftLabel:
    """``q`` = how sure the annotator was, sharpened (``temperature`` below 1) or softened (above 1). Replaces ``q``.

    ``by`` probability (OSP): sigmoid(logit(p) / temperature) of the probability ``p`` from comparing the two answers,
    kept within 1e-6 of 0 and 1; sigmoid(gap / temperature) where they were scored one by one. ``by`` gap: always the
    latter. Pairs without scores keep their label. Comes before what relabels contexts (``shapers.contexts``).

    YAML: ``soft_label: {_target_: align_loop.shapers.labels.SoftLabel, by: probability, temperature: 1.0}``
    """

    by: By = "probability"
    temperature: float = 1.0
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"SoftLabel.temperature={self.temperature} must be positive")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        def label(row: Row) -> Row | None:
            odds = self._log_odds(row, context)
            return None if odds is None else {"q": sigmoid(odds / self.temperature)}

        return change(examples, label), {}

    def _log_odds(self, row: Row, context: ShapeContext) -> float | None:
        difference = gap(row)
        if difference is None or self.by == "gap":
            return difference
        p = probability(row, context)
        if p == sigmoid(difference):  # scored, not compared: without the rounding of there and back
            return difference
        p = min(max(p, 1e-6), 1 - 1e-6)
        return math.log(p / (1 - p))


def _smooth(q: float, rate: float) -> float:
    return q * (1 - rate) + (1 - q) * rate


def _relabelled(examples: list[Row], tag: str | None, of) -> Shaped:
    def label(row: Row) -> Row | None:
        meant = is_pair(row) and (tag is None or row.get("tag") == tag)
        return {"q": of(number(row, "q", 1.0))} if meant else None

    return change(examples, label), {}
