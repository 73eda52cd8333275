"""The stages that make training examples: from scored answers, or from people's labels, then through the shapers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from align_loop.builders.human import from_preferences
from align_loop.groups import Group, groups_of
from align_loop.parts import part
from align_loop.record import EXAMPLES, Row, gold_by_sample, read_rows, write_table
from align_loop.render import Renderer
from align_loop.shapers.context import ShapeContext
from align_loop.stage import RowsLost, StageContext

DROPPED = pa.schema([*EXAMPLES, ("reason", pa.string())])


def on_policy(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """``config`` {builder, shapers, dtype, seed}; inputs ``prompts``, ``answers``, ``scores``, ``tokenizer``, maybe
    ``gold``, and the shapers' models as ``<shaper>.<name>``.

    Writes ``examples.parquet`` and ``dropped.parquet`` (what the shapers dropped, with reasons).
    """
    groups = groups_of(
        read_rows(inputs["prompts"]),
        read_rows(inputs["answers"] / "answers.parquet"),
        read_rows(inputs["scores"] / "scores.parquet"),
        read_rows(inputs["scores"] / "pairwise.parquet"),
    )
    examples, unused = part(config["builder"], "builder").build(groups, config["seed"])
    used = len({row["prompt_id"] for row in examples})
    context.rows("prompts", into=len(groups), out=used, dropped=dict(unused))
    if "gold" in inputs:
        gold = gold_by_sample(inputs["gold"])
        for row in examples:
            for side in ("chosen", "rejected"):
                row[f"gold_{side}"] = gold.get(row.get(f"{side}_sample_id"))
    renderer = Renderer(inputs["tokenizer"])
    _train_on_the_plain_prompt(examples, groups, renderer)
    _shape_and_write(
        examples, {group.prompt["prompt_id"]: group for group in groups}, renderer, config, inputs, context
    )


def labelled(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """``config`` {shapers, dtype, seed}; inputs ``preferences`` (a table), ``tokenizer`` (a model), and the shapers'
    models; writes as ``on_policy`` does."""
    renderer = Renderer(inputs["tokenizer"])
    examples = from_preferences(read_rows(inputs["preferences"]), renderer)
    _shape_and_write(examples, {}, renderer, config, inputs, context)


def _train_on_the_plain_prompt(examples: list[Row], groups: list[Group], renderer: Renderer) -> None:
    """Where answers were sampled under other contexts (``variant``), the examples' ids are the plain prompt's."""
    varied = {g.prompt["prompt_id"] for g in groups if any(a.get("variant") is not None for a in g.answers)}
    for row in examples:
        if row["prompt_id"] in varied:
            row["prompt_ids"] = renderer.prompt_ids(row["messages"])


def _shape_and_write(
    examples: list[Row],
    groups: dict[str, Group],
    renderer: Renderer,
    config: dict[str, Any],
    inputs: dict[str, Path],
    context: StageContext,
) -> None:
    """Apply the shapers in their order, account for every example, and write both tables."""
    kept, gone, added = examples, [], 0
    for name, node in config["shapers"].items():
        models = {key.partition(".")[2]: path for key, path in inputs.items() if key.startswith(f"{name}.")}
        surroundings = ShapeContext(renderer, config["seed"], groups, models, config["dtype"], context)
        before = {row["example_id"] for row in kept}
        kept, dropped = part(node, f"shapers.{name}").shape(kept, surroundings)
        gone += [{**row, "reason": reason} for reason, rows in dropped.items() for row in rows]
        added += _check_kept(name, before, kept, dropped)
    counts: dict[str, int] = {}
    for row in gone:
        counts[row["reason"]] = counts.get(row["reason"], 0) + 1
    context.rows("pairs", into=len(examples) + added, out=len(kept), dropped=counts)
    if added:
        context.fact("examples_added_by_shapers", added)
    write_table(context.out / "examples.parquet", kept, EXAMPLES)
    write_table(context.out / "dropped.parquet", gone, DROPPED)


def _check_kept(name: str, before: set[str], kept: list[Row], dropped: dict[str, list[Row]]) -> int:
    """How many examples the shaper added; raises ``RowsLost`` where one disappeared or an id occurs twice."""
    after = [row["example_id"] for row in kept] + [row["example_id"] for rows in dropped.values() for row in rows]
    if lost := before - set(after):
        raise RowsLost(f"shapers.{name}: {len(lost)} examples neither kept nor dropped, among them {min(lost)}")
    if len(set(after)) != len(after):
        raise RowsLost(f"shapers.{name}: an example id occurs twice in what it returned")
    return len(after) - len(before)
