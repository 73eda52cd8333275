"""The annotation stages: any annotator over a table of answers, and the gold reward where a setting knows it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pyarrow as pa

from align_loop.parts import part
from align_loop.record import SCORES, read_rows, write_table
from align_loop.stage import StageContext

GOLD = pa.schema([("sample_id", pa.string()), ("prompt_id", pa.string()), ("gold", pa.float64())])


def annotate(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """The stage: writes ``scores.parquet``.

    ``config`` {annotator, dtype}; inputs: the stage ``answers`` and the annotator's models.
    """
    answers = read_rows(inputs["answers"] / "answers.parquet")
    models = {name: path for name, path in inputs.items() if name != "answers"}
    rows = part(config["annotator"], "annotator").annotate(answers, models, config["dtype"], context)
    by_sample = {row["sample_id"]: row for row in rows}
    scored = [by_sample[row["sample_id"]] for row in answers if row["sample_id"] in by_sample]
    context.rows("answers", into=len(answers), out=len(scored), dropped={"not scored": len(answers) - len(scored)})
    write_table(context.out / "scores.parquet", scored, SCORES)


def gold(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """``config`` {world: module with ``gold_rewards``}; inputs ``answers``, ``prompts``; writes ``gold.parquet``.

    For measuring only: nothing that trains reads it.
    """
    answers = read_rows(inputs["answers"] / "answers.parquet")
    rows = importlib.import_module(config["world"]).gold_rewards(read_rows(inputs["prompts"]), answers)
    context.rows("answers", into=len(answers), out=len(rows))
    write_table(context.out / "gold.parquet", rows, GOLD)
