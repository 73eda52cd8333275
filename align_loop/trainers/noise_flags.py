"""Which pairs of an optimiser step are flagged, over all its micro-batches and processes, and the record of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from align_loop.objectives.noise import BatchRankDetector, NoiseHandling, PaperCodeDetector


class NoiseFlags:
    """Decides flags for one training run and remembers every decision (rows of ``record.FLAGS``).

    ``ids``: example ids by index. ``gather``: concatenates a tensor (N,) of every process, in process order; with one
    process the identity. Every process decides from the same gathered margins, so all hold the same record.
    """

    def __init__(self, noise: NoiseHandling, ids: Sequence[str], gather: Callable[[Tensor], Tensor]) -> None:
        self.noise, self.ids, self.gather = noise, ids, gather
        paper = noise.rule == "paper_code"
        self.detector = PaperCodeDetector(noise.share) if paper else BatchRankDetector(noise.share)
        self.rows: list[dict[str, Any]] = []

    def wants_margins(self, step: int, max_steps: int) -> bool:
        """Whether this step needs detector margins: while flags act, and always for the window of the paper's code."""
        return self.noise.active(step, max_steps) or self.noise.rule == "paper_code"

    def decide(self, indices: list[Tensor], margins: list[Tensor] | None, step: int, max_steps: int) -> list[Tensor]:
        """Flags (0 or 1, float32, (B,)) of each micro-batch of this process that act on the loss of ``step``.

        ``indices`` (B,) per micro-batch, -1 for padding; ``margins`` (B,) in reward units, None where
        ``wants_margins`` said no. Appends one row per pair of the global batch to ``rows``.
        """
        active = self.noise.active(step, max_steps)
        everyone = self.gather(torch.cat(indices)).tolist()
        if margins is None:
            values, flagged = [None] * len(everyone), {}
        else:
            values = self.gather(torch.cat(margins)).tolist()
            by_rank = self.noise.rule == "batch"
            flagged = self._by_rank(everyone, values) if by_rank else self._by_window(indices, margins)
        for index, value in sorted(zip(everyone, values, strict=True), key=lambda pair: pair[0]):
            if index >= 0:
                row = {"example_id": self.ids[index], "step": step, "detector_margin": value}
                self.rows.append({**row, "flagged": flagged.get(index, False), "alpha_active": active})
        acting = {index for index, flag in flagged.items() if flag} if active else set()
        return [
            torch.tensor([float(i in acting) for i in batch.tolist()], dtype=torch.float32, device=batch.device)
            for batch in indices
        ]

    def _by_rank(self, indices: list[int], margins: list[float]) -> dict[int, bool]:
        real = [(index, margin) for index, margin in zip(indices, margins, strict=True) if index >= 0]
        flags = self.detector.flag([margin for _, margin in real], [self.ids[index] for index, _ in real])
        return {index: flag for (index, _), flag in zip(real, flags, strict=True)}

    def _by_window(self, indices: list[Tensor], margins: list[Tensor]) -> dict[int, bool]:
        """Flags by this process's own window, then the union of all processes' (their pairs are disjoint)."""
        local: list[float] = []
        for batch, values in zip(indices, margins, strict=True):
            real = (batch >= 0).tolist()
            flags = iter(self.detector.flag([m for m, keep in zip(values.tolist(), real, strict=True) if keep]))
            local += [float(keep and next(flags)) for keep in real]
        everyone = self.gather(torch.cat(indices)).tolist()
        flags_of_all = self.gather(torch.tensor(local, device=indices[0].device)).tolist()
        return {index: flag > 0 for index, flag in zip(everyone, flags_of_all, strict=True) if index >= 0}

    def state_dict(self) -> dict[str, Any]:
        """Detector and record so far, as JSON values: part of the trainer's checkpoint."""
        return {"detector": self.detector.state_dict(), "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.detector.load_state_dict(state["detector"])
        self.rows = state["rows"]
