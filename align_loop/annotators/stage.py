"""The annotation stages: any annotator over a table of answers, and the gold reward where a setting knows it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from align_loop.annotators.job import Job
from align_loop.parts import part
from align_loop.record import GOLD, PAIRWISE, SCORES, gold_by_sample, read_rows, write_table
from align_loop.stage import StageContext


def annotate(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """The stage: writes ``scores.parquet`` and ``pairwise.parquet``.

    ``config`` {annotator, dtype, seed}; inputs: the stage ``answers``, the table ``prompts``, the annotator's models
    and files, and the stage ``gold`` where it asks for it.
    """
    answers = read_rows(inputs["answers"] / "answers.parquet")
    job = Job(
        prompts=read_rows(inputs["prompts"]),
        answers=answers,
        models={name: path for name, path in inputs.items() if name not in ("answers", "prompts", "gold")},
        dtype=config["dtype"],
        seed=config["seed"],
        context=context,
        gold=gold_by_sample(inputs["gold"]) if "gold" in inputs else None,
    )
    annotation = part(config["annotator"], "annotator").annotate(job)
    by_sample = {row["sample_id"]: row for row in annotation.scores}
    scored = [by_sample[row["sample_id"]] for row in answers if row["sample_id"] in by_sample]
    context.rows("answers", into=len(answers), out=len(scored), dropped={"not scored": len(answers) - len(scored)})
    write_table(context.out / "scores.parquet", scored, SCORES)
    write_table(context.out / "pairwise.parquet", annotation.pairwise, PAIRWISE)


def gold(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """``config`` {world: module with ``gold_rewards``}; inputs ``answers``, ``prompts``; writes ``gold.parquet``.

    For measuring; nothing that trains reads it, except an annotator that asks for it (a simulated person).
    """
    answers = read_rows(inputs["answers"] / "answers.parquet")
    rows = importlib.import_module(config["world"]).gold_rewards(read_rows(inputs["prompts"]), answers)
    context.rows("answers", into=len(answers), out=len(rows))
    write_table(context.out / "gold.parquet", rows, GOLD)
