"""Which rows serve as labels, as held-out labels, as evaluation prompts and as each iteration's prompts.

Pure functions of rows and a seed. Rows are put in the order of a digest of (seed, prompt id) and cut
from there, so a split depends on what the rows are and never on the order of the file. The order is one
for all cuts: with the same seed, a smaller share is part of a larger one, which a label-budget study wants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from align_loop.errors import UserError
from align_loop.record import Row, short_digest

IN_SEED, LEFT_OVER = "in the labelled seed", "beyond the prompt sets"


@dataclass(frozen=True)
class PromptSplit:
    """Disjoint parts of a table of prompts: ``evaluation``, one list an iteration, and counts of the rest."""

    evaluation: list[Row]
    sets: list[list[Row]]
    dropped: dict[str, int]


def in_order(rows: Iterable[Row], seed: int) -> list[Row]:
    """``rows`` by digest of (seed, prompt id); rows of one prompt stay together, by example id or answer."""

    def key(row: Row) -> tuple[str, str, str]:
        return short_digest(seed, row["prompt_id"]), row["prompt_id"], row.get("example_id") or row.get("answer", "")

    return sorted(rows, key=key)


def take_share(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(the first ``share`` of ``rows`` in the seed's order, the rest), with no prompt in both.

    The first part gets whole prompts until it has ``round(share * len(rows))`` rows, so it is larger than that
    by less than one prompt's rows. ``share`` lies in [0, 1].
    """
    target = round(share * len(rows))
    taken: list[Row] = []
    rest: list[Row] = []
    for _, group in groupby(in_order(rows, seed), key=lambda row: row["prompt_id"]):
        (taken if len(taken) < target else rest).extend(group)
    return taken, rest


def flip_labels(rows: Iterable[Row], rate: float, seed: int) -> list[Row]:
    """``rows`` of preferences in which a share ``rate`` has chosen and rejected exchanged: noise of known frequency.

    Which rows, is a function of (seed, example id) alone, and those of a smaller rate are among those of a larger one.
    """
    return [_flipped(row) if _uniform("flip", seed, row["example_id"]) < rate else row for row in rows]


def _uniform(*parts: Any) -> float:
    return int(short_digest(*parts), 16) / 16**16


def _flipped(row: Row) -> Row:
    new = dict(row)
    for kind in ("", "gold_"):
        new[f"{kind}chosen"], new[f"{kind}rejected"] = row.get(f"{kind}rejected"), row.get(f"{kind}chosen")
    return new


def prompt_sets(sizes: Mapping[Any, Sequence[int]], iterations: int) -> list[int]:
    """The sizes of ``iterations`` prompt sets, from a table "schedule length -> sizes" like {3: [8, 20, 30]}.

    Takes the entry with the smallest key >= ``iterations`` and of it the first ``iterations`` sizes, so that a
    shorter run is the beginning of a longer one. Keys may be text, as they are in JSON. Raises ``UserError``
    where no entry is long enough, and for an entry that is not a list of positive whole numbers.
    """
    lengths = {_schedule_length(key): value for key, value in sizes.items()}
    enough = [length for length in lengths if length >= iterations]
    if not enough:
        most = max(lengths, default=0)
        remedy = f"lower loop.iterations or add an entry '{iterations}' to prompt_sets"
        raise UserError(f"loop.iterations={iterations}, but prompt_sets has sizes for at most {most}; {remedy}")
    chosen = lengths[min(enough)]
    if not isinstance(chosen, Sequence) or isinstance(chosen, str) or not all(_is_size(size) for size in chosen):
        raise UserError(f"prompt_sets.{min(enough)}={chosen!r} must be a list of positive whole numbers")
    if len(chosen) < iterations:
        wanted = f"it needs one for each of loop.iterations={iterations}"
        raise UserError(f"prompt_sets.{min(enough)}={list(chosen)} has {len(chosen)} sizes; {wanted}")
    return list(chosen[:iterations])


def split_prompts(
    rows: Sequence[Row],
    *,
    evaluation: int,
    iterations: int,
    sizes: Sequence[int] | None,
    seed: int,
    labelled: set[str],
) -> PromptSplit:
    """Cut prompts (each once) into ``evaluation`` held-out ones and ``iterations`` disjoint training sets.

    ``sizes``: one an iteration, or None for equal parts (the first ones larger by one where it doesn't divide).
    ``labelled``: ids of prompts with labels, which are taken out. ``len(rows)`` equals the rows of all parts
    plus ``dropped``. Raises ``UserError`` where there are too few prompts, with both numbers.
    """
    pool = [row for row in in_order(rows, seed) if row["prompt_id"] not in labelled]
    if sizes is None:
        sizes = _equal_parts(max(len(pool) - evaluation, 0), iterations)
    needed = evaluation + sum(sizes)
    if needed > len(pool) or (iterations and 0 in sizes):
        raise UserError(_too_few(needed, evaluation, sizes, len(pool), len(rows)))
    sets, start = [], evaluation
    for size in sizes:
        sets.append(pool[start : start + size])
        start += size
    dropped = {IN_SEED: len(rows) - len(pool), LEFT_OVER: len(pool) - needed}
    return PromptSplit(pool[:evaluation], sets, dropped)


def _equal_parts(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _too_few(needed: int, evaluation: int, sizes: Sequence[int], there: int, given: int) -> str:
    if 0 in sizes:
        wanted = f"{evaluation:,} prompts for evaluation and at least one for each of {len(sizes)} iterations"
    else:
        wanted = f"{needed:,} prompts ({evaluation:,} for evaluation, {sum(sizes):,} in {len(sizes)} sets)"
    remedy = "give more prompts, or lower prompt_sets, eval_prompts or loop.iterations"
    return f"{wanted} asked for, but {there:,} are there ({given - there:,} more are in the labelled seed); {remedy}"


def _schedule_length(key: Any) -> int:
    try:
        return int(key)
    except (TypeError, ValueError):
        raise UserError(f"prompt_sets has the key {key!r}; its keys are numbers of iterations") from None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
