"""The settings of one training run: optimiser, schedule and (where asked for) the LoRA adapter.

Plain dataclasses without heavy imports: the configuration layer validates them before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# The schedules that mean the same thing at any number of steps without further arguments.
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


@dataclass
class TrainingConfig:
    """One training: AdamW with warm-up, a fresh optimiser and a fresh schedule each time.

    ``batch_size`` is the global batch of an optimiser step: pairs (or sequences, in supervised training) over all
    processes and all accumulation steps. The micro-batch belongs to the hardware (``micro_batch_size``).
    """

    learning_rate: float
    epochs: float = 1.0
    batch_size: int = 32
    warmup_ratio: float = 0.1
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    logging_steps: int = 1

    def __post_init__(self) -> None:
        _check(math.isfinite(self.learning_rate) and self.learning_rate > 0, "learning_rate", self, "a positive number")
        _check(math.isfinite(self.epochs) and self.epochs > 0, "epochs", self, "a positive number")
        _check(self.batch_size >= 1, "batch_size", self, "at least 1")
        _check(0 <= self.warmup_ratio < 1, "warmup_ratio", self, "in [0, 1)")
        _check(self.schedule in SCHEDULES, "schedule", self, f"one of {', '.join(SCHEDULES)}")
        _check(self.weight_decay >= 0, "weight_decay", self, "0 or more")
        _check(self.max_grad_norm >= 0, "max_grad_norm", self, "0 (no clipping) or more")
        _check(self.logging_steps >= 1, "logging_steps", self, "at least 1")


@dataclass
class LoraConfig:
    """A low-rank adapter (Hu et al. 2021) instead of all weights.

    ``dropout`` acts in supervised training and in reward models; DPO switches every dropout off, so that policy and
    reference compare.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        _check(self.r >= 1, "r", self, "at least 1")
        _check(self.alpha > 0, "alpha", self, "a positive number")
        _check(0 <= self.dropout < 1, "dropout", self, "in [0, 1)")


def micro_batches(batch_size: int, hardware: dict[str, Any], world_size: int) -> tuple[int, int]:
    """(micro-batch per device, accumulation steps) whose product over ``world_size`` devices is ``batch_size``.

    Without ``hardware['micro_batch_size']`` the micro-batch is the largest that fits the batch, up to 8 on a GPU and
    32 on a CPU.
    Raises ``ValueError`` when the global batch can't be divided so.
    """
    micro = hardware.get("micro_batch_size")
    if micro is None:
        share = max(batch_size // world_size, 1)
        most = 8 if hardware.get("device") == "cuda" else 32  # one micro-batch needs no second forward for the flags
        micro = max(size for size in range(1, min(share, most) + 1) if share % size == 0)
    if micro < 1 or batch_size % (micro * world_size):
        raise ValueError(
            f"batch_size {batch_size} can't be divided into micro-batches of {micro} on {world_size} device(s): "
            f"set hardware.micro_batch_size to a divisor of batch_size / devices"
        )
    return micro, batch_size // (micro * world_size)


def _check(holds: bool, name: str, config: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{type(config).__name__}.{name} must be {wanted}, got {getattr(config, name)!r}")
