"""Paging through a run: its training pairs and sampled answers as blocks of text for a terminal."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align_loop.errors import UserError
from align_loop.report.run_files import read_json, require_run, table_path
from align_loop.report.text import prompt_text, visible

Row = dict[str, Any]
PAIR_COLUMNS = ["example_id", "kind", "tag", "prompt_id", "messages", "chosen", "rejected", "chosen_truncated",
                "rejected_truncated", "score_chosen", "score_rejected", "gold_chosen", "gold_rejected", "q", "m",
                "w"]  # fmt: skip
_WRAP: dict[str, Any] = {"width": 96, "break_long_words": False, "break_on_hyphens": False, "tabsize": 4}
ANSWER_COLUMNS = ["sample_id", "prompt_id", "k", "text", "token_ids", "finish_reason"]


def show(
    run_dir: Path,
    what: str,
    iteration: int | None = None,
    flagged: bool = False,
    limit: int = 10,
    page: int = 1,
) -> Iterator[str]:
    """Blocks of text: a heading, then ``limit`` pairs, or all answers to ``limit`` prompts, of one page.

    ``what``: "pairs" or "answers"; ``iteration``: None for the last one made; ``flagged``: only the pairs that the
    noise detector flagged in some pass; ``page`` counts from 1. Raises ``UserError`` at once (not while the
    blocks are read) where the run, the iteration or the page doesn't exist, naming those that do.
    """
    run_dir = Path(run_dir)
    if what not in ("pairs", "answers"):
        raise UserError(f"show {what!r}: choose 'pairs' or 'answers'")
    if limit < 1 or page < 1:
        raise UserError(f"show: limit {limit} and page {page} must both be at least 1")
    require_run(run_dir)
    entry = _iteration(run_dir, what, iteration)
    if what == "pairs":
        return _pairs(run_dir, entry, flagged, limit, page)
    if flagged:
        raise UserError("show answers: only pairs are flagged; use 'show pairs' with flagged")
    return _answers(run_dir, entry, limit, page)


def print_blocks(blocks: Iterable[str]) -> None:
    """Print the blocks: through ``$PAGER`` (else ``less``) on a terminal, plainly elsewhere.

    A reader who stops early (``q``, ``| head``) ends it quietly.
    """
    pager = os.environ.get("PAGER", "less" if shutil.which("less") else "")
    if not (sys.stdout.isatty() and pager):
        _write(blocks, sys.stdout)
        return
    environment = {"LESS": "FRX", **os.environ}  # short output stays on the screen
    options = {"stdin": subprocess.PIPE, "text": True, "encoding": "utf-8", "env": environment}
    with subprocess.Popen(pager, shell=True, **options) as reader:  # a shell, because PAGER may hold options
        _write(blocks, reader.stdin)


def _write(blocks: Iterable[str], stream: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        for block in blocks:
            stream.write(block + "\n\n")
        stream.flush()


def _iteration(run_dir: Path, what: str, iteration: int | None) -> Row:
    made = {entry["iteration"]: entry for entry in read_json(run_dir, "index.json").get("iterations") or []}
    made = {number: entry for number, entry in made.items() if entry.get(what)}
    if not made:
        raise UserError(f"{run_dir}: no {what} made yet; run the command until its first iteration is through")
    if iteration is None:
        return made[max(made)]
    if iteration not in made:
        exist = ", ".join(str(number) for number in sorted(made))
        raise UserError(f"{run_dir}: iteration {iteration} has no {what} (yet); there are {exist}")
    return made[iteration]


def _pairs(run_dir: Path, entry: Row, flagged: bool, limit: int, page: int) -> Iterator[str]:
    table = pq.read_table(table_path(run_dir, entry["pairs"]), columns=PAIR_COLUMNS)
    flags = _flags(run_dir, entry)
    if flagged:
        if flags is None:
            number = entry["iteration"]
            raise UserError(f"{run_dir}: iteration {number} has no flags: its training ran without a noise detector")
        wanted = [example_id for example_id, passes in flags.items() if any(p["flagged"] for p in passes)]
        table = table.filter(pc.is_in(table["example_id"], pa.array(wanted, pa.string())))
    name = "flagged pairs" if flagged else "pairs"
    start, heading = _page(table.num_rows, limit, page, name, entry["iteration"])
    rows = table.slice(start, limit).to_pylist()
    return _blocks(heading, (_pair(row, start + i, flags) for i, row in enumerate(rows, start=1)))


def _flags(run_dir: Path, entry: Row) -> dict[str, list[Row]] | None:
    """The detector's decisions for each example, in the order of the passes; None where there was no detector."""
    if not entry.get("flags"):
        return None
    flags: dict[str, list[Row]] = {}
    rows = pq.read_table(table_path(run_dir, entry["flags"])).to_pylist()
    for row in sorted(rows, key=lambda row: row["step"] or 0):
        flags.setdefault(row["example_id"], []).append(row)
    return flags


def _pair(row: Row, number: int, flags: dict[str, list[Row]] | None) -> str:
    notes = []
    if None not in (row["gold_chosen"], row["gold_rejected"]) and row["gold_chosen"] < row["gold_rejected"]:
        notes.append("WRONG LABEL")
    passes = (flags or {}).get(row["example_id"], [])
    if count := sum(bool(p["flagged"]) for p in passes):
        margin = _number(passes[-1]["detector_margin"])
        notes.append(f"FLAGGED in {count} of {len(passes)} passes (last detector margin {margin})")
    fields = [f"{name} {row[name]:g}" for name in ("q", "m", "w") if row[name] is not None]
    head = " | ".join([f"pair {number}  {row['example_id']}", *([row["tag"]] if row["tag"] else []), *fields, *notes])
    chosen, rejected = (_side(row, side) for side in ("chosen", "rejected"))
    return "\n".join([_rule(head), _labelled("prompt", prompt_text(row["messages"])), chosen, rejected])


def _side(row: Row, side: str) -> str:
    facts = [f"score {_number(row[f'score_{side}'])}"] if row[f"score_{side}"] is not None else []
    facts += [f"gold {_number(row[f'gold_{side}'])}"] if row[f"gold_{side}"] is not None else []
    facts += ["cut off"] if row[f"{side}_truncated"] else []
    return _labelled(f"{side}{' (' + ', '.join(facts) + ')' if facts else ''}", visible(row[side]))


def _answers(run_dir: Path, entry: Row, limit: int, page: int) -> Iterator[str]:
    table = pq.read_table(table_path(run_dir, entry["answers"]), columns=ANSWER_COLUMNS)
    table = table.append_column("tokens", pc.list_value_length(table["token_ids"])).drop_columns(["token_ids"])
    prompt_ids = list(dict.fromkeys(table["prompt_id"].to_pylist()))
    start, heading = _page(len(prompt_ids), limit, page, "prompts", entry["iteration"])
    shown = prompt_ids[start : start + limit]
    rows = table.filter(pc.is_in(table["prompt_id"], pa.array(shown, pa.string()))).to_pylist()
    prompts = _prompts(run_dir, entry, set(shown))
    rewards, gold = (_values(run_dir, entry, *column) for column in (("scores", "reward"), ("gold", "gold")))

    def block(number: int, prompt_id: str) -> str:
        answers = sorted((row for row in rows if row["prompt_id"] == prompt_id), key=lambda row: row["k"] or 0)
        lines = [_labelled("prompt", prompts.get(prompt_id, "(its text is not in this run's tables)"))]
        lines += [_answer(row, rewards.get(row["sample_id"]), gold.get(row["sample_id"])) for row in answers]
        return "\n".join([_rule(f"prompt {number}  {prompt_id}"), *lines])

    return _blocks(heading, (block(start + i, prompt_id) for i, prompt_id in enumerate(shown, start=1)))


def _answer(row: Row, reward: float | None, gold: float | None) -> str:
    facts = [str(row["finish_reason"]), f"{row['tokens'] or 0} tokens"]
    facts += [f"reward {_number(reward)}"] if reward is not None else []
    facts += [f"gold {_number(gold)}"] if gold is not None else []
    return _labelled(f"answer {row['k']} ({', '.join(facts)})", visible(row["text"]))


def _prompts(run_dir: Path, entry: Row, wanted: set[str]) -> dict[str, str]:
    """Prompt id -> text, from the iteration's own prompts, else from its pairs, else from the evaluation prompts."""
    sources = [entry.get("prompts"), entry.get("pairs"), read_json(run_dir, "index.json").get("prompts")]
    known: dict[str, str] = {}
    for path in sources:
        if not path or wanted <= set(known):
            continue
        table = pq.read_table(table_path(run_dir, path), columns=["prompt_id", "messages"])
        missing = pa.array(sorted(wanted - set(known)), pa.string())
        rows = table.filter(pc.is_in(table["prompt_id"], missing)).to_pylist()
        known |= {row["prompt_id"]: prompt_text(row["messages"]) for row in rows}
    return known


def _values(run_dir: Path, entry: Row, name: str, column: str) -> dict[str, float]:
    """Sample id -> value of ``column`` in the iteration's table ``name``, where the index lists one."""
    if not entry.get(name):
        return {}
    table = pq.read_table(table_path(run_dir, entry[name]), columns=["sample_id", column])
    return dict(zip(table["sample_id"].to_pylist(), table[column].to_pylist(), strict=True))


def _page(total: int, limit: int, page: int, name: str, iteration: int) -> tuple[int, str]:
    """Where the page starts (from 0), and the heading that says so; ``UserError`` past the last page."""
    if total == 0:
        return 0, f"iteration {iteration}: no {name}"
    pages = math.ceil(total / limit)
    if page > pages:
        raise UserError(f"show: page {page} does not exist; {total:,} {name} make {pages} pages of {limit}")
    start = (page - 1) * limit
    last = min(start + limit, total)
    return start, f"iteration {iteration}: {name} {start + 1:,} to {last:,} of {total:,} (page {page} of {pages})"


def _blocks(heading: str, rest: Iterable[str]) -> Iterator[str]:
    yield heading
    yield from rest


def _labelled(label: str, text: str) -> str:
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, **_WRAP) or [""]]
    return f"{label}:\n" + "\n".join(f"    {line}".rstrip() for line in (lines if text else ["(empty)"]))


def _rule(text: str) -> str:
    return f"── {text} ".ljust(100, "─").rstrip()


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
