"""The stage that trains a reward model: from tables of pairs and a checkpoint to a new reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align_loop.engines.base import release_engines
from align_loop.engines.reward_folder import is_reward_model
from align_loop.errors import UserError
from align_loop.parts import build, part
from align_loop.record import read_rows
from align_loop.stage import StageContext
from align_loop.trainers.config import LoraConfig, TrainingConfig


def reward(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """``config`` {training, reward_model, lora, dtype, seed}; writes what ``trainers.reward.train_reward`` does.

    Inputs: ``model`` (the language model, or with ``reward_model.start=previous`` the reward model before) and one or
    more stages with ``examples.parquet``, named ``pairs`` or ``pairs`` and anything: their tables are put together in
    the order of these names (people's labels, synthetic ones, or both).
    """
    from align_loop.trainers.reward import train_reward

    release_engines()  # a sampler of an earlier stage must not hold memory beside a training
    wanted = part(config["reward_model"], "reward_model")
    if wanted.start == "base" and is_reward_model(inputs["model"]):
        raise UserError(f"reward_model.start=base, but {inputs['model']} is a reward model: take start=previous")
    tables = {name: read_rows(inputs[name] / "examples.parquet") for name in sorted(inputs) if name.startswith("pairs")}
    if not tables:
        raise UserError(f"a reward model needs an input named pairs; there are {', '.join(sorted(inputs))}")
    context.fact("tables", {name: len(rows) for name, rows in tables.items()})
    train_reward(
        model_dir=inputs["model"],
        examples=[row for rows in tables.values() for row in rows],
        out=context.out,
        reward_model=wanted,
        training=build(TrainingConfig, config["training"], "training"),
        lora=build(LoraConfig, config["lora"], "lora") if config["lora"] else None,
        seed=config["seed"],
        hardware={**context.hardware, "dtype": config["dtype"]},
        context=context,
    )
