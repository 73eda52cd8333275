"""A run's least certain pairs for people to decide, and their labels as a table of preferences."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

from align_loop.durable import write_text
from align_loop.errors import UserError
from align_loop.groups import Group, groups_of
from align_loop.labels import COLUMNS, Label, of_these, pair_id, read_labels, suffix_of, write_pairs
from align_loop.record import Row, read_rows, short_digest
from align_loop.report.run_files import read_json, require_run, table_path
from align_loop.report.text import prompt_text, visible


def export_pairs(run_dir: Path, iteration: int, number: int, out: Path, per_prompt: int = 1) -> int:
    """Write the ``number`` pairs of an iteration with the smallest score gap; returns how many there were.

    At most ``per_prompt`` pairs of one prompt; pairs of the same text are left out. Also of an iteration that was
    stopped behind its annotation (``loop.until=iteration-1/annotate``). The order within a pair is a coin of its ids.
    """
    for name, value in (("number", number), ("per-prompt", per_prompt)):
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    suffix_of(out)
    entry = _rounds(run_dir, "scores").get(iteration)
    if entry is None:
        exist = ", ".join(map(str, sorted(_rounds(run_dir, "scores")))) or "none"
        raise UserError(f"{run_dir}: iteration {iteration} has no scores; iterations with scores: {exist}")
    found: list[tuple[float, str, Row, Row, Group]] = []
    for group in groups_of(*(read_rows(table_path(run_dir, entry[t])) for t in ("prompts", "answers", "scores"))):
        found += _least_certain(group, per_prompt)
    chosen = sorted(found, key=lambda item: item[:2])[:number]
    if not chosen:
        raise UserError(f"{run_dir}: iteration {iteration} has no two different scored answers to one prompt")
    write_pairs(out, [_row(first, second, group) for _, _, first, second, group in chosen])
    return len(chosen)


def import_labels(file: Path, run_dir: Path, out: Path) -> dict[str, int]:
    """Check every label against the run, and write them as preferences (prompt, chosen, rejected) for any setting.

    The file can be given as ``setting.preferences``. Several labels of one pair are one vote each; ties are left out.
    Returns counts: labels, preferences, ties. ``UserError`` for a row that is not filled in, names answers that the run
    does not have, or was given for other texts. An answer that was cut is written as if it had ended.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"{out}: name a file that ends in .jsonl")
    labels, answers, prompts = read_labels(file), {}, {}
    for entry in _rounds(run_dir, "answers").values():
        answers |= {row["sample_id"]: row for row in read_rows(table_path(run_dir, entry["answers"]))}
        prompts |= {row["prompt_id"]: row["messages"] for row in read_rows(table_path(run_dir, entry["prompts"]))}
    for label in labels:
        if missing := [sample for sample in (label.first, label.second) if sample not in answers]:
            raise UserError(f"{label.where}: {run_dir} has no answer {missing[0]}; was it exported from another run?")
    preferences, ties = [], 0
    for pair, said in _votes(of_these(labels, list(answers.values()))).items():
        first, second = (answers[sample] for sample in pair)
        if said == 0.5:
            ties += 1
            continue
        chosen, rejected = (first, second) if said > 0.5 else (second, first)
        preferences.append(
            {
                "prompt": prompts[first["prompt_id"]],
                "chosen": chosen["text"],
                "rejected": rejected["text"],
            }
        )
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in preferences))
    return {"labels": len(labels), "preferences": len(preferences), "ties": ties}


def _votes(labels: list[Label]) -> dict[tuple[str, str], float]:
    """(first, second) -> mean of what was said, for each pair in one direction."""
    found: dict[tuple[str, str], list[float]] = {}
    for label in labels:
        pair = tuple(sorted((label.first, label.second)))
        found.setdefault(pair, []).append(label.p_first if pair[0] == label.first else 1 - label.p_first)
    return {pair: sum(said) / len(said) for pair, said in found.items()}


def _rounds(run_dir: Path, what: str) -> dict[int, dict[str, Any]]:
    """Iteration -> where its tables are, of the iterations that have ``what``; the unfinished one is the last."""
    require_run(run_dir)
    index = read_json(run_dir, "index.json")
    entries = [*(index.get("iterations") or []), *([index["unfinished"]] if index.get("unfinished") else [])]
    return {entry["iteration"]: {"prompts": index.get("prompts")} | entry for entry in entries if entry.get(what)}


def _least_certain(group: Group, most: int) -> list[tuple[float, str, Row, Row, Group]]:
    pairs = []
    for i, j in combinations(range(len(group.answers)), 2):
        first, second = group.answers[i], group.answers[j]
        if first["text"].strip() != second["text"].strip():
            name = short_digest("order", first["sample_id"], second["sample_id"])
            ordered = (second, first) if int(name, 16) % 2 else (first, second)
            pairs.append((abs(group.rewards[i] - group.rewards[j]), name, *ordered, group))
    return sorted(pairs, key=lambda item: item[:2])[:most]


def _row(first: Row, second: Row, group: Group) -> dict[str, str]:
    values = (
        pair_id(first, second),
        "",
        prompt_text(group.prompt["messages"]),
        visible(first["text"]),
        visible(second["text"]),
        first["prompt_id"],
        first["sample_id"],
        second["sample_id"],
    )
    return dict(zip(COLUMNS, values, strict=True))
