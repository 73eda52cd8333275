"""The terms of an objective: which examples each reads, and the loss it makes of their scores.

Every term has a ``weight`` and, where it reads the examples of one tag alone, a ``tag``. A term gives one loss an
example; the objective adds them up. Examples' own columns (q, m, beta, beta_rejected, label, token weights) come before
the fields of the same name here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from align_loop.objectives import group, pair, point
from align_loop.objectives.batch import ExampleBatch, filled
from align_loop.objectives.scores import WITH_REFERENCE, ScoreName
from align_loop.objectives.trackers import AdaptiveBeta, Baseline, BaselineName, BetaTracker

if TYPE_CHECKING:
    from torch import Tensor

    from align_loop.objectives.scores import Side

Row = Mapping[str, Any]
Kind = Literal["pair", "point", "demo"]


@dataclass
class Term:
    """What all terms share. A term of your own derives from it and gives ``kinds``, ``needs_reference``, ``losses``."""

    weight: float = 1.0
    tag: str | None = None

    needs_reference: ClassVar[bool] = False
    needs_value: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check(math.isfinite(self.weight), "weight", "a finite number")

    def reads(self, row: Row) -> bool:
        """Whether this term has a loss for a row of ``record.EXAMPLES``."""
        return (row.get("kind") or "pair") in self.kinds and self.tag in (None, row.get("tag") or "")

    def problem(self, row: Row) -> str | None:
        """Why a row that the term reads can't be trained on; None where it can."""
        return None

    def tracker(self) -> Baseline | BetaTracker | None:
        """The state that this term carries through a training, if any."""
        return None

    def reward(self, batch: ExampleBatch, side: Side, beta: float) -> Tensor:
        """The reward (n,) that the log reports for one side of the examples."""
        return filled(batch.beta, self.own_beta(beta)) * side.score(getattr(self, "score", "mean_log_prob"))

    def own_beta(self, beta: float) -> float:
        """The term's beta, or the objective's."""
        own = getattr(self, "beta", None)
        return beta if own is None else own

    def _check(self, holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}.{name} must be {wanted}, got {getattr(self, name)!r}")

    def _check_beta(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._check(value is None or (math.isfinite(value) and value > 0), name, "a positive number or null")


@dataclass
class PairTerm(Term):
    """A pair loss (see ``pair.py``) on examples of kind pair.

    ``links``: link -> c_k. ``beta`` (null: the objective's) and ``beta_rejected`` (null: as ``beta``; Flex-DPO, Yan et
    al. 2024) scale the scores of the two answers. ``margin``, in reward units, adds to the examples' m (SimPO's gamma).
    ``smoothing`` e: ``q -> (1 - e) q + e (1 - q)``, for q = 1 conservative DPO (Mitchell 2023). ``flip_rate`` e:
    ``q -> (q - e) / (1 - 2e)``, which makes the loss unbiased where a share e of the labels is flipped (robust DPO,
    Chowdhury et al. 2024). ``positive`` lambda: ``u -= lambda beta max(0, -S(y_w))``, DPO-positive (Pal et al. 2024).
    ``adaptive``: beta-DPO.
    """

    links: dict[str, float] = field(default_factory=lambda: {"logistic": 1.0})
    score: ScoreName = "log_ratio"
    beta: float | None = None
    beta_rejected: float | None = None
    margin: float = 0.0
    smoothing: float = 0.0
    flip_rate: float = 0.0
    positive: float = 0.0
    adaptive: AdaptiveBeta | None = None

    kinds: ClassVar[tuple[str, ...]] = ("pair",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(bool(self.links) and set(self.links) <= set(pair.LINKS), "links", f"among {', '.join(pair.LINKS)}")
        self._check(all(math.isfinite(c) for c in self.links.values()), "links", "finite coefficients")
        self._check_beta("beta", "beta_rejected")
        self._check(math.isfinite(self.margin), "margin", "a finite number")
        self._check(0 <= self.smoothing <= 1, "smoothing", "in [0, 1]")
        self._check(0 <= self.flip_rate < 0.5, "flip_rate", "in [0, 0.5)")
        self._check(math.isfinite(self.positive) and self.positive >= 0, "positive", "0 or more")

    @property
    def needs_reference(self) -> bool:
        """Whether the score is held against a reference."""
        return self.score in WITH_REFERENCE

    def tracker(self) -> BetaTracker | None:
        """Beta-DPO's statistics."""
        return BetaTracker(self.adaptive, self.score) if self.adaptive else None

    def losses(self, batch: ExampleBatch, beta: float, tracker: BetaTracker | None) -> Tensor:
        """The loss (n,) of n pairs."""
        chosen, rejected = batch.side(batch.chosen).score(self.score), batch.side(batch.rejected).score(self.score)
        betas = filled(batch.beta, self.own_beta(beta))
        own_rejected = betas if self.beta_rejected is None else self.beta_rejected
        betas_rejected = filled(batch.beta_rejected, own_rejected)
        if tracker is not None:
            factored = tracker.betas(betas)
            betas, betas_rejected = factored, betas_rejected * (factored / betas)
        u = pair.pair_logits(chosen, rejected, betas, batch.m + self.margin, betas_rejected)
        if self.positive:
            u = u - self.positive * betas * (-chosen).clamp(min=0.0)
        losses = pair.pair_loss(u, self.labels(batch.q), self.links, betas)
        return losses if tracker is None else losses * tracker.weights(batch.index).to(losses.dtype)

    def labels(self, q: Tensor) -> Tensor:
        """The soft labels after ``smoothing`` and ``flip_rate``."""
        if self.smoothing:
            q = (1.0 - self.smoothing) * q + self.smoothing * (1.0 - q)
        return (q - self.flip_rate) / (1.0 - 2.0 * self.flip_rate) if self.flip_rate else q


# The baseline of each loss in its paper, and the others that make sense for it.
BASELINES: dict[str, tuple[str, ...]] = {
    "kto": ("mismatch", "batch", "running", "none"),
    "bco": ("running", "batch", "mismatch", "none"),
    "dro": ("head", "none"),
    "dro_v": ("head", "none"),
}


@dataclass
class PointTerm(Term):
    """A point loss (see ``point.py``) on labelled answers: points, both sides of pairs (+1, -1), demonstrations (+1).

    ``kinds``: which of these. A pair's loss is the sum over its two answers. With a soft label q an answer's loss is
    ``q l(label) + (1 - q) l(-label)``. ``positive_weight`` and ``negative_weight`` multiply the losses of answers with
    a label above and below 0. ``baseline`` null takes the paper's: ``mismatch`` for kto (KL to the reference, clamped
    at 0), ``running`` for bco (the mean reward of all answers so far; the paper's mean of the two classes' means is the
    same where both are as frequent), ``head`` for dro: a linear value head on the prompt's last hidden state, trained
    jointly and not saved with the model.
    """

    loss: point.LossName = "kto"
    kinds: list[Kind] = field(default_factory=lambda: ["point", "pair"])
    score: ScoreName = "log_ratio"
    beta: float | None = None
    baseline: BaselineName | None = None
    positive_weight: float = 1.0
    negative_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_beta("beta")
        self._check(bool(self.kinds), "kinds", "one or more of point, pair, demo")
        known = BASELINES.get(self.loss, ("none",))
        self.baseline = known[0] if self.baseline is None else self.baseline
        self._check(self.baseline in known, "baseline", f"{' or '.join(known)} for loss={self.loss}")
        for name in ("positive_weight", "negative_weight"):
            self._check(math.isfinite(getattr(self, name)), name, "a finite number")

    @property
    def needs_reference(self) -> bool:
        """Whether the score is held against a reference."""
        return self.score in WITH_REFERENCE

    @property
    def needs_value(self) -> bool:
        """Whether the loss reads a value head."""
        return self.baseline == "head"

    def reads(self, row: Row) -> bool:
        """As in ``Term``; npo has nothing to say about good answers."""
        good = row.get("kind") == "demo" or (row.get("kind") == "point" and (row.get("label") or 0.0) > 0)
        return super().reads(row) and not (self.loss == "npo" and good)

    def problem(self, row: Row) -> str | None:
        """A point without a label, or with one that has no sign where the sign is all that counts."""
        if row.get("kind") != "point":
            return None
        if row.get("label") is None:
            return "a point needs a label (+1 or -1, or a score)"
        graded = self.loss in ("sppo", "dro", "dro_v")
        return "label 0 is neither good nor bad: give +1 or -1" if row["label"] == 0 and not graded else None

    def tracker(self) -> Baseline | None:
        """The baseline, where it is a mean over a batch."""
        if self.baseline in ("none", "head"):
            return None
        return Baseline(self.baseline, self.score, 0.0 if self.loss == "kto" else None)

    def losses(self, batch: ExampleBatch, beta: float, tracker: Baseline | None) -> Tensor:
        """The loss (n,) of n examples."""
        import torch

        losses = self._one_side(batch, batch.chosen, filled(batch.label, 1.0), beta, tracker)
        rows = (batch.rejected >= 0).nonzero()[:, 0]
        if len(rows):
            pairs = batch.select(rows)
            rejected = self._one_side(pairs, pairs.rejected, -torch.ones_like(pairs.q), beta, tracker)
            losses = losses.index_add(0, rows, rejected)
        return losses

    def _one_side(
        self, batch: ExampleBatch, answers: Tensor, label: Tensor, beta: float, tracker: Baseline | None
    ) -> Tensor:
        score = batch.side(answers).score(self.score)
        betas = filled(batch.beta, self.own_beta(beta))
        baseline = batch.value if self.needs_value else 0.0 if tracker is None else betas * tracker.value
        both = [self._labelled(score, sign * label, betas, baseline) for sign in (1.0, -1.0)]
        return batch.q * both[0] + (1.0 - batch.q) * both[1]

    def _labelled(self, score: Tensor, label: Tensor, betas: Tensor, baseline: Tensor | float) -> Tensor:
        good = (label > 0).to(score.dtype)
        weights = self.positive_weight * good + self.negative_weight * (1.0 - good)
        return weights * point.point_loss(self.loss, score, label, betas, baseline)


@dataclass
class SftTerm(Term):
    """Minus the log-likelihood of an answer (nats): of demonstrations, of a pair's ``side``, of points (any label).

    ``reduce``: ``mean`` over the answer's tokens (then over examples, not over all tokens of a batch) or ``sum``.
    """

    kinds: list[Kind] = field(default_factory=lambda: ["demo", "pair"])
    side: Literal["chosen", "rejected"] = "chosen"
    reduce: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(bool(self.kinds), "kinds", "one or more of point, pair, demo")
        self._check(self.side == "chosen" or list(self.kinds) == ["pair"], "side", "chosen unless kinds=[pair]")

    def losses(self, batch: ExampleBatch, beta: float, tracker: None) -> Tensor:
        """The loss (n,) of n examples."""
        answers = batch.chosen if self.side == "chosen" else batch.rejected
        return -batch.side(answers).score("mean_log_prob" if self.reduce == "mean" else "log_prob")


@dataclass
class KlTerm(Term):
    """A pull to the reference on the examples' answers (see ``point.kl_loss``), on both sides of pairs."""

    kinds: list[Kind] = field(default_factory=lambda: ["demo", "point", "pair"])
    level: Literal["token", "sequence"] = "token"

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(bool(self.kinds), "kinds", "one or more of point, pair, demo")

    def losses(self, batch: ExampleBatch, beta: float, tracker: None) -> Tensor:
        """The loss (n,) of n examples."""
        losses = self._one_side(batch.side(batch.chosen))
        rows = (batch.rejected >= 0).nonzero()[:, 0]
        return losses.index_add(0, rows, self._one_side(batch.side(batch.rejected[rows]))) if len(rows) else losses

    def _one_side(self, side: Side) -> Tensor:
        return point.kl_loss(side.token_ratios(), side.weights, self.level)


@dataclass
class GroupTerm(Term):
    """A group loss (see ``group.py``) on examples of kind group: n answers to one prompt with their scores.

    ``weighting`` belongs to ``contrast``.
    """

    loss: group.LossName = "plackett_luce"
    score: ScoreName = "log_ratio"
    beta: float | None = None
    weighting: group.Weighting = "uniform"

    kinds: ClassVar[tuple[str, ...]] = ("group",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_beta("beta")
        other = self.loss != "contrast" and self.weighting != "uniform"
        self._check(not other, "weighting", f"uniform for loss={self.loss}")

    @property
    def needs_reference(self) -> bool:
        """Whether the score is held against a reference."""
        return self.score in WITH_REFERENCE

    def problem(self, row: Row) -> str | None:
        """A group without a comparison, or without a score for each answer."""
        answers, scores = row.get("group_ids") or [], row.get("group_scores") or []
        return None if len(answers) == len(scores) >= 2 else "a group needs two or more answers, each with a score"

    def losses(self, batch: ExampleBatch, beta: float, tracker: None) -> Tensor:
        """The loss (n,) of n groups."""
        import torch

        members = (batch.owner >= 0).nonzero()[:, 0]
        owner, scores = batch.owner[members], batch.member_score[members]
        rewards = filled(batch.beta, self.own_beta(beta))[owner] * batch.side(members).score(self.score)
        return torch.stack([self._one(rewards[owner == i], scores[owner == i]) for i in range(len(batch.index))])

    def _one(self, rewards: Tensor, scores: Tensor) -> Tensor:
        if self.loss == "plackett_luce":
            return group.plackett_luce(rewards, scores)
        if self.loss == "contrast":
            return group.group_contrast(rewards, scores, self.weighting)
        return group.regress(rewards, scores)
