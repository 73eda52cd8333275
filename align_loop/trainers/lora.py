"""LoRA: one adapter carried through the loop, merged copies for everything outside training.

The base is the SFT model. In training the reference is a frozen copy of the adapter as it was at the start
(reference ``previous``) or the adapter switched off (reference ``initial``). What leaves a training is the
adapter alone and a merged plain folder, proved by the log-probabilities of a few probe sequences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel, set_seed

from align_loop.objectives.noise import token_logprobs
from align_loop.trainers.config import LoraConfig

REFERENCE_ADAPTER = "ref"  # the name that TRL gives to the frozen copy
PROBES = 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats, over a whole probe sequence


def with_adapter(
    model: PreTrainedModel, lora: LoraConfig, adapter_dir: Path | None, seed: int, task: str = "CAUSAL_LM"
) -> peft.PeftModel:
    """``model`` with the adapter of ``adapter_dir``, trainable; a fresh one (no effect yet) where that is None.

    ``task`` "SEQ_CLS": a model with a score head, which peft then trains in full beside the adapter.
    """
    if adapter_dir is not None:
        return peft.PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=True)
    set_seed(seed)  # the adapter's first factor starts at random
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type=task,
        ),
    )


def save_adapter(model: peft.PeftModel, directory: Path) -> None:
    """Write the trained adapter alone to ``directory``, in one level: the frozen reference copy stays out."""
    model.peft_config["default"].base_model_name_or_path = ""  # no path of this machine; the caller knows the base
    model.save_pretrained(str(directory), selected_adapters=["default"])
    (directory / "README.md").unlink(missing_ok=True)  # an empty model card


@torch.no_grad()
def probe_logprobs(model: torch.nn.Module, probes: list[list[int]]) -> list[float]:
    """The summed log-probability (nats) of each probe sequence given its first token."""
    device = next(model.parameters()).device
    totals = []
    for ids in probes:
        row = torch.tensor([ids], device=device)
        logits = model(input_ids=row, use_cache=False).logits
        totals.append(float(token_logprobs(logits[:, :-1], row[:, 1:]).sum()))
    return totals


def prove_merge(adapted: list[float], merged: list[float], dtype: torch.dtype) -> float:
    """The largest difference between the two lists of probe log-probs (nats).

    Raises ``RuntimeError`` where it exceeds 1e-3 (float32) or 0.1 (bfloat16): the merged copy, from which the loop
    samples, would be another policy than the one that was trained.
    """
    difference = max(abs(a - b) for a, b in zip(adapted, merged, strict=True))
    if not difference <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"the merged model's log-probs differ from the adapted model's by {difference:.3g} nats "
            f"(allowed: {TOLERANCE[dtype]}): the merge is not exact for this model"
        )
    return difference


def probes_of(rows: list[dict[str, Any]]) -> list[list[int]]:
    """A few short whole sequences (prompt and chosen answer) to compare models on."""
    sequences = [list(row["prompt_ids"]) + list(row["chosen_ids"]) for row in rows]
    return sorted(sequences, key=len)[:PROBES]
