"""AdamW for bfloat16 weights: float32 master copies, without which small learning rates train nothing.

A bfloat16 weight of 0.02 has neighbours 1e-4 away, and one AdamW step at learning rate 5e-7 moves it by 5e-7:
rounded to nearest, every update would be lost. The master copies take the updates, the model gets their rounded values
(as DeepSpeed's bfloat16 optimiser does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import Trainer


class MasterAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` on float32 copies of the parameters, written back to them after each step.

    Parameter groups, learning-rate schedules and gradient clipping act on the model's own parameters as usual.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        copies = [{**g, "params": [p.detach().float().clone() for p in g["params"]]} for g in self.param_groups]
        self.inner = torch.optim.AdamW(copies)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One AdamW step on the master copies with the gradients of the parameters."""
        loss = None if closure is None else closure()
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner["lr"] = group["lr"]
            for parameter, master in zip(group["params"], inner["params"], strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self.inner.step()
        self._write_back()
        return loss

    def _write_back(self) -> None:
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            for parameter, master in zip(group["params"], inner["params"], strict=True):
                parameter.copy_(master)
                master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Groups, moments and master copies: a resumed run goes on from the unrounded weights."""
        masters = [list(group["params"]) for group in self.inner.param_groups]
        return {**super().state_dict(), "inner": self.inner.state_dict(), "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.inner.load_state_dict(state_dict["inner"])
        for group, saved in zip(self.inner.param_groups, state_dict["masters"], strict=True):
            for master, value in zip(group["params"], saved, strict=True):
                master.copy_(value)


def keep_master_weights(trainer: Trainer) -> None:
    """Give ``trainer`` the optimiser above where it trains bfloat16 weights itself (DeepSpeed has its own masters)."""
    trained = [parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad]
    if torch.bfloat16 in trained and not trainer.is_deepspeed_enabled:
        arguments = trainer.args
        betas = (arguments.adam_beta1, arguments.adam_beta2)
        settings = {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}
        trainer.optimizer_cls_and_kwargs = (MasterAdamW, settings)
