"""Files in which people say which of two answers is better: written by ``export-pairs``, read by whatever uses them.

JSONL or CSV, one pair a row. A person fills in ``better``: 1, 2 or tie. Which answer stands first is by chance, and no
score is shown, so neither says anything. The ids say which answers they are, and ``pair_id`` also what they say: labels
of one run can't be taken for those of another whose answers happen to have the same ids.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_loop.durable import write_text
from align_loop.errors import UserError
from align_loop.record import Row, short_digest

COLUMNS = ("pair_id", "better", "prompt", "answer_1", "answer_2", "prompt_id", "sample_id_1", "sample_id_2")
_IDS = ("pair_id", "prompt_id", "sample_id_1", "sample_id_2")
_BETTER = {"1": 1.0, "2": 0.0, "tie": 0.5}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


@dataclass(frozen=True)
class Label:
    """One person's word on two answers. ``p_first``: 1, 0 or 1/2 (tie); ``where``: file and row, for messages."""

    where: str
    pair_id: str
    prompt_id: str
    first: str
    second: str
    p_first: float


def pair_id(first: Row, second: Row) -> str:
    """The identity of two answers (rows of ``record.ANSWERS``) in this order, texts included."""
    parts = [part for row in (first, second) for part in (row["sample_id"], row["text"])]
    return short_digest("label", first["prompt_id"], *parts)


def suffix_of(path: Path) -> str:
    """``.jsonl`` or ``.csv``; ``UserError`` for any other file."""
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{path}: name a file that ends in .jsonl or .csv")
    return path.suffix


def write_pairs(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with ``COLUMNS``; in a CSV, texts that a spreadsheet would run as formulas get an apostrophe before.

    ``UserError`` where the file exists: it may hold somebody's work.
    """
    suffix = suffix_of(path)
    if path.exists():
        raise UserError(f"{path} exists and may hold labels; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    with open(path, "x", encoding="utf-8-sig", newline="") as handle:  # the mark by which spreadsheets know UTF-8
        writer = csv.DictWriter(handle, COLUMNS)
        writer.writeheader()
        writer.writerows({k: f"'{v}" if str(v).startswith(_FORMULA) else v for k, v in row.items()} for row in rows)


def read_labels(path: Path) -> list[Label]:
    """Every row of a filled-in file. ``UserError`` naming file and row for a missing id or an unreadable ``better``."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; export-pairs writes one")
    labels = [_label(f"{path}, row {number}", row) for number, row in enumerate(_rows(path), start=1)]
    if not labels:
        raise UserError(f"{path}: no labels in it")
    return labels


def of_these(labels: Sequence[Label], answers: Sequence[Row]) -> list[Label]:
    """The labels of which both answers are among ``answers``; ``UserError`` where an id now stands for another text."""
    by_sample = {row["sample_id"]: row for row in answers}
    found = []
    for label in labels:
        if label.first in by_sample and label.second in by_sample:
            first, second = by_sample[label.first], by_sample[label.second]
            if pair_id(first, second) != label.pair_id or first["prompt_id"] != label.prompt_id:
                raise UserError(f"{label.where}: given for other answers than these; take the file of this very run")
            found.append(label)
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    if suffix_of(path) == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as handle:
            return list(csv.DictReader(handle))
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise UserError(f"{path}, line {number}: not a JSON object; mend or delete it") from None
    return rows


def _label(where: str, row: Mapping[str, Any]) -> Label:
    for name in _IDS:
        if not row.get(name):
            raise UserError(f"{where}: {name} is missing; keep the columns of export-pairs as they were")
    better = row.get("better")
    text = str(better if better is not None else "").strip().lower()
    if text not in _BETTER:
        said = f"better={text!r}" if text else "better is empty"
        raise UserError(f"{where}: {said}; fill in 1, 2 or tie, or delete the row")
    return Label(where, row["pair_id"], row["prompt_id"], row["sample_id_1"], row["sample_id_2"], _BETTER[text])
