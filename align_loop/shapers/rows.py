"""What shapers ask about a row, and how they pick a share of the rows: independent of the rows' order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from align_loop.groups import sigmoid
from align_loop.record import Row
from align_loop.shapers.context import ShapeContext

By = Literal["gap", "probability"]  # what confidence in a pair is measured by

_SIDES = ("{}_sample_id", "{}", "{}_ids", "{}_truncated", "score_{}", "gold_{}", "{}_weights")


def is_pair(row: Row) -> bool:
    """Whether the row is a pair; a row without a kind is one."""
    return row.get("kind") in (None, "pair")


def number(row: Row, name: str, default: float) -> float:
    """A field that shapes the loss, with its neutral value where it is missing or null."""
    value = row.get(name)
    return default if value is None else value


def answers_of(row: Row) -> list[list[int]]:
    """The token ids of every answer in a row of any kind."""
    sides = [row.get("chosen_ids"), row.get("rejected_ids")]
    return [ids for ids in [*sides, *(row.get("group_ids") or [])] if ids is not None]


def gap(row: Row) -> float | None:
    """Score of the chosen minus score of the rejected answer; None for what is no pair, or has no scores."""
    if not is_pair(row) or row.get("score_chosen") is None or row.get("score_rejected") is None:
        return None
    return row["score_chosen"] - row["score_rejected"]


def probability(row: Row, context: ShapeContext) -> float | None:
    """That the chosen answer of a scored pair is the better one: as the annotator compared them, else sigmoid(gap)."""
    difference = gap(row)
    group = context.groups.get(row["prompt_id"])
    if difference is None or group is None or group.compared is None:
        return None if difference is None else sigmoid(difference)
    places = {answer["sample_id"]: i for i, answer in enumerate(group.answers)}
    chosen, rejected = places.get(row.get("chosen_sample_id")), places.get(row.get("rejected_sample_id"))
    if chosen is None or rejected is None:
        return sigmoid(difference)
    return group.probability(chosen, rejected)


def confidence(row: Row, context: ShapeContext, by: By) -> float | None:
    """The score gap (reward units) or the probability that the label is right; None for pairs without scores."""
    return gap(row) if by == "gap" else probability(row, context)


def lowest(rows: list[Row], values: Sequence[float | None], count: int) -> set[str]:
    """Ids of the ``count`` rows with the smallest values, ties by example id; rows of value None don't take part."""
    known = sorted((v, row["example_id"]) for v, row in zip(values, rows, strict=True) if v is not None)
    return {example_id for _, example_id in known[:count]}


def lowest_share(rows: list[Row], values: Sequence[float | None], share: float) -> set[str]:
    """As ``lowest``, for a share of the rows that have a value, rounded."""
    return lowest(rows, values, round(share * sum(v is not None for v in values)))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie, interpolated linearly between the nearest two."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, rest = math.floor(place), place - math.floor(place)
    if not rest:
        return ordered[low]
    return ordered[low] + rest * (ordered[low + 1] - ordered[low])


def change(rows: list[Row], of: Callable[[Row], Row | None]) -> list[Row]:
    """The rows with the fields that ``of(row)`` gives changed; None leaves a row alone. Nothing is changed in place."""
    return [{**row, **(of(row) or {})} for row in rows]


def swapped(row: Row) -> Row:
    """The two answers of a pair with everything that is known about each, chosen and rejected exchanged."""
    turned = dict(row)
    for name in _SIDES:
        for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
            if name.format(one) in row or name.format(other) in row:
                turned[name.format(one)] = row.get(name.format(other))
    return turned


def check_share(part: object, *names: str) -> None:
    """Raise ``ValueError`` for a field that is no share in [0, 1); null is none either way."""
    for name in names:
        value = getattr(part, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{type(part).__name__}.{name}={value} must be in [0, 1)")
