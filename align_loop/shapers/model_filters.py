"""Filters that ask a model about the pairs: how far apart, how alike, how hard to learn it finds their answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from align_loop.record import Row
from align_loop.shapers.context import ShapeContext, Shaped, partition
from align_loop.shapers.models import hidden_sums, key, logprobs
from align_loop.shapers.rows import check_share, gap, is_pair, lowest_share, number


@dataclass
class ReferenceGap:
    """Keeps the ``keep`` share of pairs with the largest gap between their answers' log-probs under ``reference``.

    "Clear Preferences Leave Traces" keeps the 30 to 50 % whose answers the reference separates most clearly; which tail
    that is was not confirmed. ``gap`` absolute (the default here): the distance, whichever answer
    is the likelier; largest or smallest: chosen minus rejected, with its sign. ``per_token`` takes the mean log-prob of
    an answer's tokens instead of their sum, which favours no length. Needs no scores. Ties by example id.

    YAML: ``reference_gap: {_target_: align_loop.shapers.model_filters.ReferenceGap, keep: 0.5, gap: absolute}``
    """

    keep: float = 0.5
    gap: Literal["absolute", "largest", "smallest"] = "absolute"
    per_token: bool = False
    reference: str = "initial"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"ReferenceGap.keep={self.keep} must be in (0, 1]")

    def roles(self) -> dict[str, str]:
        """The model that it reads."""
        return {"reference": self.reference}

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        pairs = [row for row in examples if is_pair(row)]
        known = logprobs(context.models["reference"], pairs, context)
        values = [self._value(row, known) for row in pairs]
        kept = lowest_share(pairs, values, self.keep)
        gone = {row["example_id"] for row in pairs} - kept
        return partition(examples, lambda r: "answers not clearly apart" if r["example_id"] in gone else None)

    def _value(self, row: Row, known: dict) -> float:
        """What is small for the pairs to be kept."""
        chosen, rejected = (
            known[key(row, side)] / (max(1, len(row[f"{side}_ids"])) if self.per_token else 1)
            for side in ("chosen", "rejected")
        )
        difference = chosen - rejected
        return {"absolute": -abs(difference), "largest": -difference, "smallest": difference}[self.gap]


@dataclass
class Ches:
    """Drops the ``share`` of pairs whose answers are most alike inside ``model``: training on them lowers both.

    The centred hidden embedding similarity (Razin et al. 2024, "Unintentional Unalignment") is ``<H_w, H_l> - |H_w|^2``
    with ``H`` the sum of the last hidden states from which an answer's tokens are predicted. ``normalised``: each ``H``
    divided by its answer's length first. Needs no scores. Ties by example id.

    YAML: ``ches: {_target_: align_loop.shapers.model_filters.Ches, share: 0.1, normalised: false}``
    """

    share: float = 0.1
    normalised: bool = False
    model: str = "initial"

    def __post_init__(self) -> None:
        check_share(self, "share")

    def roles(self) -> dict[str, str]:
        """The model that it reads."""
        return {"model": self.model}

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        pairs = [row for row in examples if is_pair(row)] if self.share else []
        known = hidden_sums(context.models["model"], pairs, context)
        gone = lowest_share(pairs, [-self.similarity(row, known) for row in pairs], self.share)
        return partition(examples, lambda r: "answers too alike to the model" if r["example_id"] in gone else None)

    def similarity(self, row: Row, known: dict) -> float:
        """The CHES score of a pair from its answers' sums (``models.hidden_sums``), in float64."""
        chosen, rejected = (
            known[key(row, side)].double() / (max(1, len(row[f"{side}_ids"])) if self.normalised else 1)
            for side in ("chosen", "rejected")
        )
        return float(chosen @ rejected - chosen @ chosen)


@dataclass
class DropTopLoss:
    """Drops the ``share`` of pairs with the highest pair loss: those whose labels the policy contradicts most (ROPO).

    The loss is ``-q log s(u) - (1 - q) log s(-u)``; with ``q`` 1 any loss that falls with ``u``, ROPO's among them,
    gives the same order. ``by`` models: ``u = beta * [log-ratio of policy to reference, chosen - rejected] - m``
    (``beta``: the example's own, else this field; set it to the objective's). ``by`` scores: ``u = gap - m`` from what
    the annotator gave, no model is read, and pairs without scores are left alone. Ties by example id.

    YAML: ``top_loss: {_target_: align_loop.shapers.model_filters.DropTopLoss, share: 0.1, beta: "${objective.beta}"}``
    """

    share: float = 0.1
    by: Literal["models", "scores"] = "models"
    beta: float = 0.1
    reference: str = "initial"

    def __post_init__(self) -> None:
        check_share(self, "share")
        if not self.beta > 0:
            raise ValueError(f"DropTopLoss.beta={self.beta} must be positive")

    def roles(self) -> dict[str, str]:
        """The models that it reads."""
        return {"policy": "policy", "reference": self.reference} if self.by == "models" else {}

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        pairs = [row for row in examples if is_pair(row)] if self.share else []
        gaps = self._model_gaps(pairs, context) if self.by == "models" else [gap(row) for row in pairs]
        losses = [None if g is None else _loss(row, g) for row, g in zip(pairs, gaps, strict=True)]
        gone = lowest_share(pairs, [None if loss is None else -loss for loss in losses], self.share)
        return partition(examples, lambda r: "highest loss" if r["example_id"] in gone else None)

    def _model_gaps(self, pairs: list[Row], context: ShapeContext) -> list[float]:
        """The implicit reward of the chosen minus that of the rejected answer."""
        policy = logprobs(context.models["policy"], pairs, context)
        reference = logprobs(context.models["reference"], pairs, context)

        def ratio(row: Row, side: str) -> float:
            return policy[key(row, side)] - reference[key(row, side)]

        return [number(row, "beta", self.beta) * (ratio(row, "chosen") - ratio(row, "rejected")) for row in pairs]


def _loss(row: Row, difference: float) -> float:
    """The logistic pair loss at margin ``difference - m`` with the example's soft label."""
    u, q = difference - number(row, "m", 0.0), number(row, "q", 1.0)
    return q * _softplus(-u) + (1 - q) * _softplus(u)


def _softplus(value: float) -> float:
    """log(1 + exp(value)) without overflow."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
