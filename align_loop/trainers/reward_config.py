"""What a reward model is and how it is trained: a part of the configuration, without heavy imports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass
class RewardModel:
    """A reward model, or an ensemble of them, trained on pairs.

    ``head``, ``dim``: scalar (``dim`` 1) or gpm (an even ``dim``), see ``objectives.reward``. ``smoothing``: the share
    of every label that goes to the other answer. ``centring``: the coefficient of the squared sum of a pair's scores
    (Eisenstein et al. recommend 0.01). ``members``: the size of the ensemble. ``member_data``: seeds (every member
    sees all pairs, with another seed) or folds (each leaves out the prompts of one fold). ``start``: base (the
    language model, with a fresh head) or previous (the reward model before, where there is one).
    """

    head: Literal["scalar", "gpm"] = "scalar"
    dim: int = 1
    smoothing: float = 0.0
    centring: float = 0.0
    members: int = 1
    member_data: Literal["seeds", "folds"] = "seeds"
    start: Literal["base", "previous"] = "base"

    def __post_init__(self) -> None:
        self._check(self.head in ("scalar", "gpm"), "head", "scalar or gpm")
        if self.head == "scalar":
            self._check(self.dim == 1, "dim", "1 for head=scalar (head=gpm takes an even number)")
        else:
            self._check(self.dim >= 2 and self.dim % 2 == 0, "dim", "an even number of at least 2 for head=gpm")
        self._check(0 <= self.smoothing < 0.5, "smoothing", "in [0, 0.5)")
        self._check(math.isfinite(self.centring) and self.centring >= 0, "centring", "0 or more")
        self._check(
            not (self.centring and self.head == "gpm"), "centring", "0 for head=gpm, whose scores have no level"
        )
        self._check(self.members >= 1, "members", "at least 1")
        self._check(self.member_data in ("seeds", "folds"), "member_data", "seeds or folds")
        self._check(self.member_data == "seeds" or self.members > 1, "member_data", "seeds where members=1")
        self._check(self.start in ("base", "previous"), "start", "base or previous")

    def _check(self, holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise ValueError(f"RewardModel.{name} must be {wanted}, got {getattr(self, name)!r}")
