"""From rows to a run's tables: what ``local`` and ``hub`` both do once their rows are read.

Nothing of the evaluation is ever trained on: held-out labels and evaluation prompts are taken out of the
seed, of all labels, of the demonstrations and of every iteration's prompts.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from align_loop.errors import UserError
from align_loop.prompts import formats, splits
from align_loop.record import DEMONSTRATIONS, PREFERENCES, PROMPTS, Row, write_table
from align_loop.stage import StageContext

HELD_OUT, EVALUATION = "held out", "evaluation prompt"
UNLABELLED, NOT_ASKED_FOR = "used without its label", "full_labels is off"

# ``seed_fraction``: the share of the preferences whose labels are used, where no prompts are given (the others
# then serve as prompts). ``heldout_share``: the share of those labels kept out of training to measure the judge.
DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "seed_fraction": 1.0,
    "heldout_share": 0.2,
    "eval_prompts": 0,
    "iterations": 1,
    "prompt_sets": None,
    "full_labels": True,
    "flip_rate": 0.0,
    "bad_rows": "stop",
}


@dataclass(frozen=True)
class Given:
    """The rows that a user gave, each with its dropped counts; ``None`` for what was not given."""

    preferences: formats.Table | None
    prompts: formats.Table | None
    demonstrations: formats.Table | None


def settings(config: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """``config`` over the defaults and ``extra`` defaults; ``UserError`` for an unknown key or a value out of range."""
    known = {**DEFAULTS, **extra}
    for key in config.keys() - known.keys():
        near = difflib.get_close_matches(key, known, n=1)
        raise UserError(f"prompts: unknown key '{key}'; {f'did you mean {near[0]!r}?' if near else sorted(known)}")
    values = {**known, **config}
    _check_number(values, "seed_fraction", 0, 1, (int, float))
    _check_number(values, "heldout_share", 0, 1, (int, float))
    _check_number(values, "flip_rate", 0, 1, (int, float))
    for key in ("eval_prompts", "iterations"):
        _check_number(values, key, 0, float("inf"), (int,))
    return values


def write(given: Given, values: dict[str, Any], context: StageContext) -> None:
    """Split what was given, write every table into ``context.out`` and account for every row.

    Tables: seed, heldout, all_labels, demonstrations, eval_prompts and prompts-1 to prompts-T (``.parquet``);
    empty where nothing was given.
    """
    preferences = _unpack(given.preferences, "preferences", context)
    labelled, unlabelled = _labelled(preferences, given, values)
    heldout, seed = splits.take_share(labelled, values["heldout_share"], values["seed"])
    if labelled and not seed:
        remedy = "lower heldout_share or give more labels"
        raise UserError(f"heldout_share={values['heldout_share']} of {len(labelled)} labels leaves no seed; {remedy}")
    source = given.prompts if given.prompts is not None else formats.prompts_of(unlabelled)
    parts = _split(source, labelled, values)

    evaluation = {row["prompt_id"] for row in parts.evaluation}
    kept_out = {**dict.fromkeys(evaluation, EVALUATION), **{row["prompt_id"]: HELD_OUT for row in heldout}}
    seed = splits.flip_labels(seed, values["flip_rate"], values["seed"])
    _write(context, "seed", seed, PREFERENCES)
    _write(context, "heldout", heldout, PREFERENCES)
    context.rows("labels", into=len(preferences), out=len(seed) + len(heldout), dropped={UNLABELLED: len(unlabelled)})
    ordered = splits.flip_labels(splits.in_order(preferences, values["seed"]), values["flip_rate"], values["seed"])
    _write_training(context, "all_labels", ordered, kept_out, PREFERENCES, values["full_labels"])
    demonstrations = splits.in_order(_unpack(given.demonstrations, "demonstration rows", context), values["seed"])
    shown = _write_training(context, "demonstrations", demonstrations, kept_out, DEMONSTRATIONS)
    _write_prompts(context, parts, source)
    context.fact("summary", _summary(len(preferences), len(seed), len(heldout), shown, parts))


def _unpack(table: formats.Table | None, what: str, context: StageContext) -> list[Row]:
    """The rows of ``table``, their reading accounted for."""
    rows, dropped = table if table is not None else ([], {})
    context.rows(what, into=len(rows) + sum(dropped.values()), out=len(rows), dropped=dropped)
    return rows


def _labelled(preferences: list[Row], given: Given, values: dict[str, Any]) -> tuple[list[Row], list[Row]]:
    """(preferences used with their labels, preferences used as prompts only)."""
    if given.prompts is not None or not preferences:
        return preferences, []
    labelled, rest = splits.take_share(preferences, values["seed_fraction"], values["seed"])
    if not labelled:
        found = f"seed_fraction={values['seed_fraction']} of {len(preferences)} preferences"
        raise UserError(f"{found} is not one label; raise seed_fraction or give more preferences")
    if not rest and (values["iterations"] or values["eval_prompts"]):
        found = f"seed_fraction={values['seed_fraction']} leaves no preferences to serve as prompts"
        raise UserError(f"{found}; lower seed_fraction or give a file of prompts")
    return labelled, rest


def _split(source: formats.Table, labelled: list[Row], values: dict[str, Any]) -> splits.PromptSplit:
    sizes, iterations = values["prompt_sets"], values["iterations"]
    if sizes is not None and not isinstance(sizes, Mapping):
        raise UserError(f"prompts: prompt_sets={sizes!r} must be null or like {{3: [8000, 20000, 30000]}}")
    return splits.split_prompts(
        source[0],
        evaluation=values["eval_prompts"],
        iterations=iterations,
        sizes=None if sizes is None else splits.prompt_sets(sizes, iterations),
        seed=values["seed"],
        labelled={row["prompt_id"] for row in labelled},
    )


def _write_training(
    context: StageContext, name: str, rows: list[Row], kept_out: dict[str, str], schema: Any, wanted: bool = True
) -> int:
    """Write the rows that may be trained on: those whose prompt is not in ``kept_out`` (id -> reason); their number."""
    reasons = [kept_out.get(row["prompt_id"]) if wanted else NOT_ASKED_FOR for row in rows]
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    _write(context, name, kept, schema)
    dropped = Counter(reason for reason in reasons if reason is not None)
    context.rows(name, into=len(rows), out=len(kept), dropped=dropped)
    return len(kept)


def _write_prompts(context: StageContext, parts: splits.PromptSplit, source: formats.Table) -> None:
    _write(context, "eval_prompts", parts.evaluation, PROMPTS)
    for number, rows in enumerate(parts.sets, 1):
        _write(context, f"prompts-{number}", rows, PROMPTS)
    rows, dropped = source
    out = len(parts.evaluation) + sum(map(len, parts.sets))
    context.rows("prompts", into=len(rows) + sum(dropped.values()), out=out, dropped={**dropped, **parts.dropped})


def _write(context: StageContext, name: str, rows: Iterable[Row], schema: Any) -> None:
    write_table(context.out / f"{name}.parquet", rows, schema)


def _summary(preferences: int, seed: int, heldout: int, demonstrations: int, parts: splits.PromptSplit) -> str:
    sets = ", ".join(f"{len(rows):,}" for rows in parts.sets) or "none"
    unused = preferences - seed - heldout
    labels = f"{preferences:,} preferences: {seed:,} seed, {heldout:,} held out"
    labels += f", {unused:,} without their labels" if unused else ""
    prompts = f"prompts: {sets} to train on, {len(parts.evaluation):,} for evaluation"
    return f"{labels}; {prompts}; {demonstrations:,} demonstrations"


def _check_number(values: dict[str, Any], key: str, low: float, high: float, types: tuple[type, ...]) -> None:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, types) or not low <= value <= high:
        kind = "whole number from 0" if types == (int,) else f"number from {low} to {high}"
        raise UserError(f"prompts: {key}={value!r} must be a {kind}")
