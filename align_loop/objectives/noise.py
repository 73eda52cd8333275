"""Noisy pairs: which self-annotated labels look wrong, and what training does about them.

Source: Selfie/SPA (Kim et al., arXiv 2406.04412), section 4.2 with equations 9 to 12. A pair is suspicious when
the policy itself, decoupled from its reference by an extrapolation of the logits, prefers the *rejected* answer
most clearly: the ``share`` of pairs with the lowest margin is flagged, and flagged labels are smoothed.

Two rules. ``batch`` ranks the pairs of an optimiser step's whole global batch, so the share is exact and
depends neither on the micro-batch nor on the number of processes. ``paper_code`` is the rule of the released
code, for comparison: a window over past micro-batches, on each process, which flags more than it says.

Pure Python and pure tensors: no model, no trainer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

# Margins closer than this (in reward units) count as ties, so that float32 noise from the layout of batches
# doesn't choose the flagged pairs, in particular where policy and reference still agree and all margins are 0.
TIE_DIGITS = 5
PAPER_WINDOW = 50
LOGITS_PER_CHUNK = 2**24  # 64 MiB in float32


@dataclass
class NoiseHandling:
    """Detection of noisy pairs during training, and the action taken.

    ``alpha`` is the label smoothing of flagged pairs, ``share`` (K) the share of pairs to flag, ``warmup`` the share
    of the optimiser steps at the start without any, ``decoupling`` the extrapolation lambda of iterations 1, 2, ...
    """

    action: Literal["smooth", "drop", "none"] = "smooth"
    rule: Literal["batch", "paper_code"] = "batch"
    alpha: float = 0.1
    share: float = 0.10
    warmup: float = 0.2
    decoupling: list[float] = field(default_factory=lambda: [1 / 2, 1 / 4, 1 / 8, 1 / 16])

    def __post_init__(self) -> None:
        _check(self.action in ("smooth", "drop", "none"), "action", self.action, "smooth, drop or none")
        _check(self.rule in ("batch", "paper_code"), "rule", self.rule, "batch or paper_code")
        _check(0 <= self.alpha <= 1, "alpha", self.alpha, "in [0, 1]")
        _check(0 <= self.share < 1, "share", self.share, "in [0, 1)")
        _check(0 <= self.warmup <= 1, "warmup", self.warmup, "in [0, 1]")
        _check(all(lam >= 0 for lam in self.decoupling), "decoupling", list(self.decoupling), "0 or more everywhere")

    def decoupling_for(self, iteration: int) -> float:
        """Lambda of ``iteration`` (counted from 1). Raises ``ValueError`` where the schedule is too short."""
        if not 1 <= iteration <= len(self.decoupling):
            raise ValueError(
                f"noise.decoupling has {len(self.decoupling)} value(s) and none for iteration {iteration}: add one"
            )
        return self.decoupling[iteration - 1]

    @property
    def enabled(self) -> bool:
        """Whether anything at all is detected: smoothing by 0 and ``none`` cost no forward pass."""
        return self.action == "drop" or (self.action == "smooth" and self.alpha > 0)

    def active(self, step: int, max_steps: int) -> bool:
        """Whether flags act on the loss at optimiser step ``step`` (from 0) of ``max_steps``."""
        return self.enabled and step >= self.warmup * max_steps

    def alpha_at(self, step: int, max_steps: int) -> float:
        """The smoothing of flagged pairs at ``step``: 0 during the warm-up."""
        return self.alpha if self.active(step, max_steps) and self.action == "smooth" else 0.0


def shape_flagged(q: Tensor, w: Tensor, flags: Tensor, noise: NoiseHandling) -> tuple[Tensor, Tensor]:
    """Soft labels and weights (B,) after the action on flagged pairs; ``flags`` (B,) holds 0 or 1.

    ``smooth``: ``q' = (1 - alpha) q + alpha (1 - q)`` (equation 12 for q = 1); ``drop``: weight 0.
    """
    if noise.action == "drop":
        return q, w * (1.0 - flags)
    alpha = noise.alpha * flags
    return (1.0 - alpha) * q + alpha * (1.0 - q), w


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities (nats, float32) of ``labels`` (B, T) under ``logits`` (B, T, V); 0 where the label is -100.

    ``logits[:, t]`` predicts ``labels[:, t]``: the caller has shifted them.
    """
    return _gather_chunked(lambda rows, columns: logits[rows, columns].float(), labels, logits.shape[-1])


def extrapolated_logprobs(logits_policy: Tensor, logits_reference: Tensor, lam: float, labels: Tensor) -> Tensor:
    """Log-probabilities under the decoupled policy ``h = (1 + lam) h_theta - lam h_ref`` at every position.

    Shapes as in ``token_logprobs``. ``lam`` 0 gives the policy's own, -1 the reference's (Liu et al. 2024: a
    policy trained with a KL term smaller by that factor). Computed in float32 over chunks of positions, so the
    extrapolated (B, T, V) tensor never exists.
    """

    def rows_of(rows: Tensor, columns: Tensor) -> Tensor:
        mixed = (1.0 + lam) * logits_policy[rows, columns].float()
        return mixed.sub_(logits_reference[rows, columns].float(), alpha=lam) if lam else mixed

    return _gather_chunked(rows_of, labels, logits_policy.shape[-1])


def _gather_chunked(rows_of: Callable[[Tensor, Tensor], Tensor], labels: Tensor, vocabulary: int) -> Tensor:
    """``log_softmax(rows_of(row, column))[label]`` at each label that isn't -100, a chunk of positions at a time."""
    import torch
    from torch.nn.functional import cross_entropy

    rows, columns = (labels != -100).nonzero(as_tuple=True)
    result = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    size = max(LOGITS_PER_CHUNK // vocabulary, 1)
    for row, column in zip(rows.split(size), columns.split(size), strict=True):
        result[row, column] = -cross_entropy(rows_of(row, column), labels[row, column], reduction="none")
    return result


class BatchRankDetector:
    """Rule ``batch``: flags the lowest margins of a global batch so that the share of all pairs seen is exact.

    Call ``flag`` once for each optimiser step whose flags act, with the margins of all its pairs; pairs of the
    warm-up are never shown to it, so there is no burst of catching up when the warm-up ends.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.seen = 0
        self.flagged = 0
        self.threshold: float | None = None

    def flag(self, margins: Sequence[float], ids: Sequence[str]) -> list[bool]:
        """Flags for one global batch: the ``round(share * seen) - flagged`` lowest margins, ties by id.

        ``margins`` in reward units, in any order; the result has the same order. ``threshold`` becomes the
        highest flagged margin, or stays where nothing was flagged.
        """
        self.seen += len(margins)
        count = min(max(round(self.share * self.seen) - self.flagged, 0), len(margins))
        order = sorted(range(len(margins)), key=lambda i: (round(margins[i], TIE_DIGITS), ids[i]))
        chosen = set(order[:count])
        self.flagged += count
        if count:
            self.threshold = margins[order[count - 1]]
        return [i in chosen for i in range(len(margins))]

    def state_dict(self) -> dict[str, Any]:
        """The counters, as JSON values."""
        return {"seen": self.seen, "flagged": self.flagged, "threshold": self.threshold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.seen, self.flagged, self.threshold = state["seen"], state["flagged"], state["threshold"]


class PaperCodeDetector:
    """Rule ``paper_code``: the running threshold of the released code, with its known bias.

    A window of the last 50 micro-batch *mean* margins on this process; after each micro-batch
    ``tau = (s[d] + s[d + 1]) / 2`` with ``s`` the sorted window and ``d = int(50 * share)``, 0 until it is full.
    Single margins are compared with means of micro-batches, so the share grows with the micro-batch:
    about 13 % for single pairs where 10 % is asked for, 34 % for micro-batches of 8.
    """

    def __init__(self, share: float) -> None:
        self.rank = min(int(PAPER_WINDOW * share), PAPER_WINDOW - 2)
        self.window: deque[float] = deque(maxlen=PAPER_WINDOW)
        self.threshold = 0.0

    def flag(self, margins: Sequence[float]) -> list[bool]:
        """Flags of one micro-batch by the threshold so far, which is then updated with the micro-batch."""
        flags = [margin <= self.threshold for margin in margins]
        if margins:
            self.window.append(sum(margins) / len(margins))
        if len(self.window) == PAPER_WINDOW:
            ordered = sorted(self.window)
            self.threshold = (ordered[self.rank] + ordered[self.rank + 1]) / 2
        return flags

    def state_dict(self) -> dict[str, Any]:
        """The window and the threshold, as JSON values."""
        return {"window": list(self.window), "threshold": self.threshold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.window = deque(state["window"], maxlen=PAPER_WINDOW)
        self.threshold = state["threshold"]


def _check(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"noise.{name} must be {wanted}, got {value!r}")
