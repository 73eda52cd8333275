"""The stages that make training pairs: from scored answers, or from people's labels, then through the shapers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from align_loop.builders.human import from_preferences
from align_loop.parts import part
from align_loop.record import EXAMPLES, Row, read_rows, write_table
from align_loop.render import Renderer
from align_loop.stage import StageContext

DROPPED = pa.schema([*EXAMPLES, ("reason", pa.string())])


def on_policy(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """``config`` {builder, shapers}; inputs ``prompts``, ``answers``, ``scores`` and maybe ``gold``.

    Writes ``examples.parquet`` and ``dropped.parquet`` (what the shapers dropped, with reasons).
    """
    prompts, answers = read_rows(inputs["prompts"]), read_rows(inputs["answers"] / "answers.parquet")
    scores = {row["sample_id"]: row["reward"] for row in read_rows(inputs["scores"] / "scores.parquet")}
    examples, unused = part(config["builder"], "builder").build(prompts, answers, scores)
    context.rows("prompts", into=len(examples) + sum(unused.values()), out=len(examples), dropped=dict(unused))
    if "gold" in inputs:
        gold = {row["sample_id"]: row["gold"] for row in read_rows(inputs["gold"] / "gold.parquet")}
        for row in examples:
            row["gold_chosen"], row["gold_rejected"] = gold[row["chosen_sample_id"]], gold[row["rejected_sample_id"]]
    _shape_and_write(examples, config["shapers"], context)


def labelled(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """``config`` {shapers}; inputs ``preferences`` (a table), ``tokenizer`` (a model); writes as ``on_policy`` does."""
    preferences = read_rows(inputs["preferences"])
    _shape_and_write(from_preferences(preferences, Renderer(inputs["tokenizer"])), config["shapers"], context)


def _shape_and_write(examples: list[Row], shapers: dict[str, Any], context: StageContext) -> None:
    """Apply the shapers in their order, account for every pair, and write both tables."""
    kept, gone = examples, []
    for name, node in shapers.items():
        kept, dropped = part(node, f"shapers.{name}").shape(kept)
        gone += [{**row, "reason": reason} for reason, rows in dropped.items() for row in rows]
    counts: dict[str, int] = {}
    for row in gone:
        counts[row["reason"]] = counts.get(row["reason"], 0) + 1
    context.rows("pairs", into=len(examples), out=len(kept), dropped=counts)
    write_table(context.out / "examples.parquet", kept, EXAMPLES)
    write_table(context.out / "dropped.parquet", gone, DROPPED)
