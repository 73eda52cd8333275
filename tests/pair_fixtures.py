"""Small trainings for the trainer tests: made-up pairs, a context, one call that trains and returns what it wrote."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import EOS_ID

from align_loop.objectives.noise import NoiseHandling
from align_loop.objectives.objective import Objective
from align_loop.stage import StageContext
from align_loop.trainers.config import TrainingConfig
from align_loop.trainers.models import load_tokenizer
from align_loop.trainers.policy import Folders, PolicyTraining, build_trainer, load_start, train_policy
from align_loop.trainers.policy_trainer import PolicyTrainer

CPU = {"device": "cpu", "dtype": "float32", "threads": 1}
TRAINING = TrainingConfig(learning_rate=2e-3, epochs=1, batch_size=8)


def some_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` rows of the record with random words; lengths vary, so that batches have padding."""
    source = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [source.randrange(7, 64) for _ in range(source.randint(low, high))]

    return [
        {
            "example_id": f"e{number:03d}",
            "prompt_ids": [1, *words(2, 8)],
            "chosen_ids": [*words(1, 9), EOS_ID],
            "rejected_ids": [*words(1, 9), EOS_ID],
            "q": 1.0,
            "m": 0.0,
            "w": 1.0,
            "beta": None,
        }
        for number in range(count)
    ]


def some_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` rows of all kinds in turn: pair, point, demo, group."""
    rows = some_pairs(2 * count, seed)
    for number, (row, other) in enumerate(zip(rows[:count], rows[count:], strict=True)):
        kind = ("pair", "point", "demo", "group")[number % 4]
        row["kind"] = kind
        if kind == "group":
            row["group_ids"] = [row.pop("chosen_ids"), row.pop("rejected_ids"), other["chosen_ids"]]
            row["group_scores"] = [1.0, 0.2, 0.5]
        elif kind != "pair":
            del row["rejected_ids"]
        if kind == "point":
            row["label"] = 1.0 if number % 8 == 1 else -1.0
    return rows[:count]


def context_for(out: Path) -> StageContext:
    out.mkdir(parents=True, exist_ok=True)
    return StageContext("train", out, quiet=True)


def how(**changes: Any) -> PolicyTraining:
    """The training of these tests: DPO, without noise handling; ``changes`` override its fields."""
    fields = {"objective": Objective(), "noise": None, "iteration": 1, "training": TRAINING, "lora": None, "seed": 5}
    return PolicyTraining(**{**fields, "hardware": {**CPU, "micro_batch_size": 8}, **changes})


def train(
    out: Path,
    policy: Path,
    examples: list[dict[str, Any]],
    micro: int = 8,
    reference: Path | None = None,
    base: Path | None = None,
    adapter: Path | None = None,
    **changes: Any,
) -> StageContext:
    """``train_policy`` with the defaults of these tests; ``changes`` override the training's fields."""
    context = context_for(out)
    folders = Folders(policy, reference or policy, base, adapter)
    settings = how(**{"hardware": {**CPU, "micro_batch_size": micro}, **changes})
    train_policy(folders, examples, out, settings, context)
    return context


def trainer_for(
    out: Path,
    policy: Path,
    reference: Path,
    examples: list[dict[str, Any]],
    noise: NoiseHandling | None = None,
    micro: int = 8,
    training: TrainingConfig = TRAINING,
    objective: Objective | None = None,
    **overrides: Any,
) -> PolicyTrainer:
    """The trainer that ``train_policy`` would use, not yet run."""
    hardware = {**CPU, "micro_batch_size": micro}
    settings = how(noise=noise, training=training, hardware=hardware, objective=objective or Objective())
    start = load_start(Folders(policy, reference), settings)
    return build_trainer(start, load_tokenizer(policy), examples, out, settings, **overrides)


def weights(directory: Path) -> torch.Tensor:
    """All weights of a saved model as one float64 vector."""
    tensors = load_file(directory / "model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def change(start: Path, one: Path, other: Path) -> float:
    """How differently two trainings moved the same start: ``|w - w'| / |w' - w0|``."""
    w0, w, w1 = weights(start), weights(one), weights(other)
    return ((w - w1).norm() / (w1 - w0).norm()).item()
