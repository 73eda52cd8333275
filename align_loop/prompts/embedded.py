"""The embedded setting's stages: the tables of the small language, and the untrained model."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from align_loop.prompts import world
from align_loop.prompts.splits import flip_labels, in_order, prompt_sets
from align_loop.prompts.wordlevel import ModelSize, write_base_model
from align_loop.record import DEMONSTRATIONS, PREFERENCES, PROMPTS, Row, prompt_id, short_digest, write_table
from align_loop.stage import StageContext


def prepare(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """The stage: write every table of a run, as ``prompts/tables.py`` does for a user's files.

    ``config``: the fields of ``EmbeddedSetting`` beside the common splits. The coin's agreement with gold (on pairs
    whose gold differs) becomes a fact of the stage.
    """
    rng = random.Random(f"embedded-{config['seed']}")
    seen: set[str] = set()
    demonstrations = [
        _demonstration(_prompt(rng, seen), config["honour"], rng) for _ in range(config["demonstrations"])
    ]
    pairs = [_pair(_prompt(rng, seen), config, rng) for _ in range(config["pairs"])]
    evaluation = [_prompt(rng, seen) for _ in range(config["eval_prompts"])]
    labelled, unlabelled = pairs[: config["labelled"]], pairs[config["labelled"] :]
    cut = round(len(labelled) * config["heldout_share"])
    write_table(context.out / "demonstrations.parquet", demonstrations, DEMONSTRATIONS)
    write_table(context.out / "heldout.parquet", labelled[:cut], PREFERENCES)
    training = flip_labels(labelled[cut:] + unlabelled, config["flip_rate"], config["seed"])
    write_table(context.out / "seed.parquet", training[: len(labelled) - cut], PREFERENCES)
    write_table(context.out / "all_labels.parquet", training, PREFERENCES)
    write_table(context.out / "eval_prompts.parquet", evaluation, PROMPTS)
    _write_prompt_sets(unlabelled, config, context)
    context.rows("preferences", into=len(pairs), out=len(pairs))
    context.fact("coin agrees with gold", _agreement(pairs))
    context.fact("summary", _summary(config, cut, _agreement(pairs)))


def base_model(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """The stage: a randomly initialised model with its tokenizer in ``out/model``."""
    size = {f.name: config[f.name] for f in dataclasses.fields(ModelSize)}
    write_base_model(context.out / "model", ModelSize(**size), config["seed"])


def gold_rewards(prompts: list[Row], answers: list[Row]) -> list[Row]:
    """(sample_id, prompt_id, gold) of each answer, gold in [0, 1]; answers must belong to ``prompts``."""
    demands = {row["prompt_id"]: demands_of(row) for row in prompts}
    return [
        {
            "sample_id": row["sample_id"],
            "prompt_id": row["prompt_id"],
            "gold": world.gold_reward(demands[row["prompt_id"]], row["text"]),
        }
        for row in answers
    ]


def demands_of(prompt: Row) -> world.Demands:
    """What a prompt of the embedded language asks for, from its ``meta``."""
    return world.Demands(**json.loads(prompt["meta"]))


def _prompt(rng: random.Random, seen: set[str]) -> Row:
    """A prompt that was not drawn before, so that all tables are disjoint."""
    while True:
        demands = world.draw_demands(rng)
        messages = [{"role": "user", "content": world.prompt_text(demands, rng)}]
        identity = prompt_id(messages)
        if identity not in seen:
            seen.add(identity)
            return {"prompt_id": identity, "messages": messages, "meta": json.dumps(dataclasses.asdict(demands))}


def _demonstration(prompt: Row, honour: float, rng: random.Random) -> Row:
    return {**prompt, "answer": world.write_answer(demands_of(prompt), honour, rng)}


def _pair(prompt: Row, config: dict[str, Any], rng: random.Random) -> Row:
    """Two writers' answers and one person's noisy choice between them."""
    demands = demands_of(prompt)
    answers = [world.write_answer(demands, config["honour"], rng) for _ in range(2)]
    gold = [world.gold_reward(demands, answer) for answer in answers]
    first = world.prefers_first(*gold, config["sharpness"], rng)
    chosen, rejected = (0, 1) if first else (1, 0)
    return {
        **prompt,
        "example_id": short_digest(prompt["prompt_id"], answers[chosen], answers[rejected]),
        "chosen": answers[chosen],
        "rejected": answers[rejected],
        "gold_chosen": gold[chosen],
        "gold_rejected": gold[rejected],
    }


def _write_prompt_sets(pairs: list[Row], config: dict[str, Any], context: StageContext) -> None:
    """The unlabelled prompts in disjoint sets, one an iteration."""
    if not config["iterations"]:
        return
    sizes = prompt_sets({int(k): v for k, v in config["prompt_sets"].items()}, config["iterations"])
    rows = [{k: row[k] for k in PROMPTS.names} for row in in_order(pairs, config["seed"])]
    start = 0
    for number, size in enumerate(sizes, 1):
        write_table(context.out / f"prompts-{number}.parquet", rows[start : start + size], PROMPTS)
        start += size
    context.rows("prompts", into=len(rows), out=start, dropped={"not used by these iterations": len(rows) - start})


def _agreement(pairs: list[Row]) -> float:
    """The share of pairs with different gold in which the chosen answer is the better one."""
    decided = [row["gold_chosen"] > row["gold_rejected"] for row in pairs if row["gold_chosen"] != row["gold_rejected"]]
    return round(sum(decided) / len(decided), 4)


def _summary(config: dict[str, Any], heldout: int, agreement: float) -> str:
    share = config["labelled"] / config["pairs"]
    return (
        f"{config['labelled']} labelled pairs of {config['pairs']:,} ({share:.1%}; {heldout} of them held out), "
        f"the coin agrees with gold in {agreement:.0%}; {config['demonstrations']:,} demonstrations"
    )
