"""The training stages: from tables and checkpoints to a new checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align_loop.engines.base import release_engines
from align_loop.engines.reward_folder import is_reward_model
from align_loop.errors import UserError
from align_loop.parts import build, part
from align_loop.record import Row, read_rows
from align_loop.render import Renderer
from align_loop.stage import StageContext
from align_loop.trainers.config import LoraConfig, TrainingConfig

TOO_LONG = "demonstration too long for the model"


def sft(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """``config`` {training, lora, dtype, max_length, seed}; inputs ``model``, ``demonstrations``; writes ``model/``."""
    from align_loop.trainers.sft import train_sft

    renderer = Renderer(inputs["model"])
    rows = read_rows(inputs["demonstrations"])
    rendered = [(renderer.prompt_ids(row["messages"]), renderer.answer_ids(row["answer"])) for row in rows]
    fitting = [(p, a) for p, a in rendered if len(p) + len(a) <= config["max_length"]]
    context.rows("rendered", into=len(rows), out=len(fitting), dropped={TOO_LONG: len(rows) - len(fitting)})
    train_sft(
        model_dir=inputs["model"],
        demonstrations=fitting,
        out=context.out,
        **_common(config, context),
    )


def pairs(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """``config`` {training, objective, noise, iteration, lora, dtype, seed}; writes ``model/`` and ``flags.parquet``.

    Inputs: the model folders ``policy`` and ``reference``, the stages ``pairs``, ``pairs-...`` (trained on as one) and,
    with LoRA, ``base`` (the SFT model that the adapter sits on) and, after the first round, ``adapter``.
    """
    from align_loop.trainers.policy import Folders, PolicyTraining, train_policy

    common = _common(config, context)
    train_policy(
        Folders(inputs["policy"], inputs["reference"], inputs.get("base"), inputs.get("adapter")),
        examples_of(inputs),
        context.out,
        PolicyTraining(
            objective=part(config["objective"], "objective"),
            noise=part(config["noise"], "noise") if config["noise"] else None,
            iteration=config["iteration"],
            **{name: common[name] for name in ("training", "lora", "seed", "hardware")},
        ),
        context,
    )


def reward(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """``config`` {training, reward_model, lora, dtype, seed}; writes what ``reward.train_reward`` does.

    Inputs: ``model`` (the language model, or with ``reward_model.start=previous`` the reward model before) and the
    stages ``pairs``, ``pairs-...`` (trained on as one: people's labels, synthetic ones, or both).
    """
    from align_loop.trainers.reward import train_reward

    wanted = part(config["reward_model"], "reward_model")
    if wanted.start == "base" and is_reward_model(inputs["model"]):
        raise UserError(f"reward_model.start=base, but {inputs['model']} is a reward model: take start=previous")
    train_reward(
        model_dir=inputs["model"],
        examples=examples_of(inputs),
        out=context.out,
        reward_model=wanted,
        **_common(config, context),
    )


def examples_of(inputs: dict[str, Path]) -> list[Row]:
    """The examples of every input stage called ``pairs`` or ``pairs-...``, in the order of these names."""
    stages = [inputs[name] for name in sorted(inputs) if name.partition("-")[0] == "pairs"]
    if not stages:
        raise UserError(f"a training on pairs needs an input named pairs; there are {', '.join(sorted(inputs))}")
    return [row for stage in stages for row in read_rows(stage / "examples.parquet")]


def _common(config: dict[str, Any], context: StageContext) -> dict[str, Any]:
    release_engines()  # a sampler of an earlier stage must not hold memory beside a training
    return {
        "training": build(TrainingConfig, config["training"], "training"),
        "lora": build(LoraConfig, config["lora"], "lora") if config["lora"] else None,
        "seed": config["seed"],
        "hardware": {**context.hardware, "dtype": config["dtype"]},
        "context": context,
    }
