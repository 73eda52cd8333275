"""Small reward models for the tests: a preference that can be learnt, one call that trains, one that judges pairs."""

from __future__ import annotations

import atexit
import gc
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import EOS_ID

from align_loop.engines.reward_folder import read_reward_folder
from align_loop.engines.reward_scoring import member_vectors
from align_loop.objectives.reward import preference_score
from align_loop.stage import StageContext
from align_loop.trainers.config import TrainingConfig
from align_loop.trainers.reward import train_reward
from align_loop.trainers.reward_config import RewardModel

CPU = {"device": "cpu", "dtype": "float32", "threads": 1}
TRAINING = TrainingConfig(learning_rate=2e-3, epochs=1, batch_size=8)
ENOUGH = TrainingConfig(learning_rate=2e-3, epochs=3, batch_size=16)
gc.freeze()  # each training collects garbage, which takes 0.3 s with all that was imported and 0.01 s without
atexit.register(gc.unfreeze)
GOOD = 9  # the token that makes an answer the better one


def toy_pairs(count: int, seed: int = 0, good: int = GOOD) -> list[dict[str, Any]]:
    """``count`` pairs, two a prompt: the chosen answer has the token ``good`` in it, both sides' lengths are alike."""
    source = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [source.randrange(10, 64) for _ in range(source.randint(low, high))]

    rows = []
    for number in range(count):
        chosen, rejected = words(1, 8), words(1, 8)
        chosen[source.randrange(len(chosen))] = good
        prompt = [1, 4, *words(2, 6), 5] if number % 2 == 0 else rows[-1]["prompt_ids"]
        row = {"example_id": f"e{seed}-{number:03d}", "kind": "pair", "prompt_id": f"p{seed}-{number // 2}"}
        row |= {"prompt_ids": prompt, "chosen_ids": [*chosen, EOS_ID], "rejected_ids": [*rejected, EOS_ID]}
        rows.append(row | {"q": 1.0, "m": 0.0, "w": 1.0, "beta": None})
    return rows


def train(out: Path, model_dir: Path, examples: list[dict[str, Any]], **changes: Any) -> StageContext:
    """``train_reward`` with the defaults of these tests; ``changes`` override its arguments."""
    out.mkdir(parents=True, exist_ok=True)
    context = StageContext("reward", out, quiet=True)
    arguments = {
        "model_dir": model_dir,
        "examples": examples,
        "out": out,
        "reward_model": RewardModel(),
        "training": TRAINING,
        "lora": None,
        "seed": 5,
        "hardware": CPU,
        "context": context,
    }
    train_reward(**{**arguments, **changes})
    return context


def sides(examples: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Chosen and rejected of each pair in turn, as (prompt ids, answer ids)."""
    return [(row["prompt_ids"], row[side]) for row in examples for side in ("chosen_ids", "rejected_ids")]


def margins(folder: Path, examples: list[dict[str, Any]], dtype: str = "float32") -> torch.Tensor:
    """Each member's log-odds (members, n) that the chosen answers are the better ones."""
    vectors = member_vectors(folder, sides(examples), dtype=dtype, device="cpu")
    return preference_score(vectors[:, 0::2], vectors[:, 1::2], read_reward_folder(folder).head)


def accuracy(folder: Path, examples: list[dict[str, Any]]) -> float:
    return (margins(folder, examples).mean(dim=0) > 0).float().mean().item()


def weights(directory: Path) -> torch.Tensor:
    """All weights of a saved model as one float64 vector, the head's last."""
    tensors = load_file(directory / "model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def change(start: torch.Tensor, one: Path, other: Path) -> float:
    """How differently two trainings moved the same start: ``|w - w'| / |w' - w0|``."""
    w, w1 = weights(one), weights(other)
    return ((w - w1).norm() / (w1 - start).norm()).item()
