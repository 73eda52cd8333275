"""What a policy's training carries besides model and optimiser: flags, trackers, a value head, also in checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from align_loop.trainers.noise_flags import NoiseFlags

HEAD = "value_head"


class ValueHead:
    """A linear head V(x) on the last hidden state of the prompt, trained with the policy (DRO).

    It is a submodule of the model while that trains, so optimiser, data parallelism and checkpoints include it; starts
    at 0; ``detach`` removes it before the model is saved.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        backbone = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
        width = model.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1, dtype=next(backbone.parameters()).dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.model, self.hidden = model, None
        model.add_module(HEAD, self.head)
        backbone.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.hidden = output.last_hidden_state

    def of_prompts(self, batch: dict[str, Tensor]) -> Tensor:
        """V (B,) of the examples' prompts, from the forward pass just made; float32. A group has none (0)."""
        last = (batch["completion_mask"].argmax(dim=1) - 1)[batch["chosen"]]
        values = self.head(self.hidden[batch["chosen"], last])[:, 0].float()
        self.hidden = None
        return torch.where(batch["chosen"] >= 0, values, 0.0)

    def detach(self) -> None:
        """Take the head off the model."""
        delattr(self.model, HEAD)


class PolicyCheckpoint(TrainerCallback):
    """Writes all this into each checkpoint: one file a process, and the head once."""

    def __init__(self, flags: NoiseFlags | None, trackers: dict[str, Any], head: ValueHead | None) -> None:
        self.flags, self.trackers, self.head = flags, trackers, head

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        content = {"trackers": {name: tracker.state_dict() for name, tracker in self.trackers.items()}}
        if self.flags is not None:
            content["flags"] = self.flags.state_dict()
        state_path(checkpoint, args.process_index).write_text(json.dumps(content), encoding="utf-8")
        if self.head is not None and args.process_index == 0:
            torch.save(self.head.head.state_dict(), checkpoint / f"{HEAD}.pt")


def load_state(
    checkpoint: Path, rank: int, flags: NoiseFlags | None, trackers: dict[str, Any], head: ValueHead | None
) -> None:
    """Continue from what ``PolicyCheckpoint`` wrote into ``checkpoint`` for process ``rank``."""
    if flags is not None or trackers:
        content = json.loads(state_path(checkpoint, rank).read_text(encoding="utf-8"))
        if flags is not None:
            flags.load_state_dict(content["flags"])
        for name, tracker in trackers.items():
            tracker.load_state_dict(content["trackers"][name])
    if head is not None:
        head.head.load_state_dict(torch.load(checkpoint / f"{HEAD}.pt", weights_only=True))


def state_path(checkpoint: Path, rank: int) -> Path:
    """Where a checkpoint keeps flags and trackers of process ``rank``."""
    return checkpoint / f"policy_state_{rank}.json"
