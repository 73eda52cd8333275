"""What a loss has to know about a whole optimiser step before it is taken: baselines, and beta-DPO's statistics.

A tracker measures every example without gradient, sees the values of the step's global batch at once, in the order of
the training's table, and keeps what it remembers from step to step. So neither the micro-batch nor the number of
processes changes anything, and a checkpoint can hold its state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from align_loop.objectives.batch import ExampleBatch

BaselineName = Literal["none", "batch", "running", "mismatch", "head"]


class Baseline:
    """The mean score (nats) of answers, detached: the baseline of KTO and BCO.

    ``batch``: over the answers of the global batch that the term reads. ``running``: over all those seen so far, this
    batch included. ``mismatch``: over answers to other prompts (KTO's estimate of the KL to the reference, section 4.1
    of Ethayarajh et al. 2024: ``log pi(y'|x) - log pi_ref(y'|x)`` with y' another example's answer).
    ``floor``: the least value, 0 for KTO, whose KL can't be negative.
    """

    width: ClassVar[int] = 2  # a pair has two answers

    def __init__(self, rule: str, score: str, floor: float | None) -> None:
        self.rule, self.score, self.floor = rule, score, floor
        self.reads = "mismatch" if rule == "mismatch" else "examples"
        self.value, self.total, self.count = 0.0, 0.0, 0

    def measure(self, batch: ExampleBatch) -> Tensor:
        """The scores (n, 2) of the examples' answers; NaN where there is no second."""
        import torch

        chosen = batch.side(batch.chosen).score(self.score)
        both = torch.full((len(chosen), 2), math.nan, dtype=chosen.dtype, device=chosen.device)
        both[:, 0] = chosen
        rows = (batch.rejected >= 0).nonzero()[:, 0]
        if len(rows):
            both[rows, 1] = batch.side(batch.rejected[rows]).score(self.score)
        return both

    def settle(self, indices: Sequence[int], values: Tensor) -> None:
        """Take in a global batch: ``values`` (n, 2), float64, of the examples ``indices``."""
        found = values[~values.isnan()]
        total, count = found.sum().item(), len(found)
        self.total, self.count = self.total + total, self.count + count
        mean = self.total / max(self.count, 1) if self.rule == "running" else total / max(count, 1)
        self.value = mean if self.floor is None else max(mean, self.floor)

    def metrics(self) -> dict[str, float]:
        """For the log."""
        return {"baseline": self.value}

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as JSON values."""
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.total, self.count = state["total"], state["count"]


@dataclass
class AdaptiveBeta:
    """Beta-DPO (Wu et al. 2024): beta follows how clearly a batch's pairs are told apart; outlying pairs are left out.

    With the gap of a pair its raw log-ratio difference (nats, without beta), M and s moving averages of its mean and
    standard deviation: pairs are drawn without replacement with weight ``exp(-((gap - M) / s)^2 / 2)`` until the share
    ``keep`` of the global batch is reached, then ``beta = beta_0 (1 + alpha (mean gap of the kept - M))``, at least
    ``floor``. The loss is the mean over the kept pairs.

    Where the sources leave it open: M and s start with the first batch's own values and take in a batch after it was
    used (``M <- momentum M + (1 - momentum) mean``), s is the moving average of the batches' standard deviations, and
    the draw depends on the number of batches seen alone.
    """

    alpha: float = 0.6
    keep: float = 0.8
    momentum: float = 0.9
    floor: float = 1e-3

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("alpha", math.isfinite(self.alpha), "a finite number"),
            ("keep", 0 < self.keep <= 1, "in (0, 1]"),
            ("momentum", 0 <= self.momentum <= 1, "in [0, 1]"),
            ("floor", math.isfinite(self.floor) and self.floor > 0, "a positive number"),
        ):
            if not holds:
                raise ValueError(f"AdaptiveBeta.{name} must be {wanted}, got {getattr(self, name)!r}")


class BetaTracker:
    """The state of ``AdaptiveBeta``: ``factor`` multiplies beta_0, ``kept`` holds the kept examples' indices."""

    reads: ClassVar[str] = "examples"
    width: ClassVar[int] = 1

    def __init__(self, rule: AdaptiveBeta, score: str) -> None:
        self.rule, self.score = rule, score
        self.mean: float | None = None
        self.deviation, self.batches, self.factor, self.share = 1.0, 0, 1.0, 1.0
        self.kept: set[int] = set()

    def measure(self, batch: ExampleBatch) -> Tensor:
        """The pairs' gaps (n, 1)."""
        chosen, rejected = batch.side(batch.chosen), batch.side(batch.rejected)
        return (chosen.score(self.score) - rejected.score(self.score)).unsqueeze(1)

    def settle(self, indices: Sequence[int], values: Tensor) -> None:
        """Take in a global batch: ``values`` (n, 1), float64, of the examples ``indices``."""
        gaps = values[:, 0]
        if len(gaps) == 0:
            return
        mean, deviation = gaps.mean().item(), gaps.std(correction=0).item()
        if self.mean is None:
            self.mean, self.deviation = mean, deviation
        rows = self._draw(gaps)
        self.kept, self.share = {indices[row] for row in rows}, len(rows) / len(gaps)
        self.factor = 1.0 + self.rule.alpha * (gaps[rows].mean().item() - self.mean)
        slow = self.rule.momentum
        self.mean = slow * self.mean + (1 - slow) * mean
        self.deviation = slow * self.deviation + (1 - slow) * deviation
        self.batches += 1

    def _draw(self, gaps: Tensor) -> list[int]:
        """The kept rows: the largest of ``log weight + Gumbel noise`` are a weighted draw without replacement."""
        import torch

        count = max(round(self.rule.keep * len(gaps)), 1)
        generator = torch.Generator().manual_seed(self.batches)
        noise = -torch.log(-torch.log(torch.rand(len(gaps), generator=generator, dtype=torch.float64)))
        weight = -0.5 * ((gaps.cpu() - self.mean) / max(self.deviation, 1e-12)) ** 2
        return (weight + noise).topk(count).indices.sort().values.tolist()

    def betas(self, beta: Tensor) -> Tensor:
        """The step's beta (n,) from beta_0 (n,)."""
        return (beta * self.factor).clamp(min=self.rule.floor)

    def weights(self, index: Tensor) -> Tensor:
        """0 for pairs left out, and for the others what makes the loss a mean over the kept (n,)."""
        import torch

        kept = [(1.0 / self.share) * (row in self.kept) for row in index.tolist()]
        return torch.tensor(kept, device=index.device)

    def metrics(self) -> dict[str, float]:
        """For the log."""
        return {"beta_factor": self.factor, "gap_mean": self.mean or 0.0, "kept": self.share}

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as JSON values."""
        return {"mean": self.mean, "deviation": self.deviation, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.mean, self.deviation, self.batches = state["mean"], state["deviation"], state["batches"]
