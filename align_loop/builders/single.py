"""Examples of one answer: points (good or bad, without a partner) and demonstrations to imitate."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from align_loop.builders.pair import NO_ANSWER, TIE, Built, about, side, undecided
from align_loop.groups import Group
from align_loop.record import Row, short_digest

TOO_LOW = "no answer scores enough"


@dataclass
class Unpaired:
    """The ``top`` share of each prompt's answers as points of label +1, the ``bottom`` share as points of label -1.

    Counts are rounded down, but at least one where the share isn't 0; those between get no label, and neither do
    answers whose equal scores lie on both sides. PMPO takes two and two of four; NPO the bottom alone (``top`` 0).
    """

    top: float = 0.5
    bottom: float = 0.5

    def __post_init__(self) -> None:
        if min(self.top, self.bottom) < 0 or not 0 < self.top + self.bottom <= 1:
            raise ValueError(
                f"Unpaired.top={self.top} and bottom={self.bottom} must be shares, together above 0 and at most 1"
            )

    def build(self, groups: list[Group], seed: int) -> Built:
        points, dropped = [], Counter()
        for group in groups:
            reason = undecided(group)
            good, bad = ([], []) if reason else self._sides(group)
            if not (good or bad):
                dropped[reason or TIE] += 1
            points += [point(group, i, 1.0) for i in good] + [point(group, i, -1.0) for i in bad]
        return points, dropped

    def _sides(self, group: Group) -> tuple[list[int], list[int]]:
        order, rewards = group.ranked(), group.rewards
        good = order[: _count(self.top, len(order))]
        bad = order[len(order) - _count(self.bottom, len(order)) :]
        both = {rewards[i] for i in good} & {rewards[i] for i in bad}
        return [i for i in good if rewards[i] not in both], [i for i in bad if rewards[i] not in both]


@dataclass
class Demo:
    """The ``count`` best answers of a prompt as demonstrations (best of n; ALMoST's RMSP, STaR).

    ``least``: the reward that a demonstration must reach; null for none. Equal rewards are taken by ``k``.
    """

    count: int = 1
    least: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"Demo.count={self.count} must be at least 1")

    def build(self, groups: list[Group], seed: int) -> Built:
        demos, dropped = [], Counter()
        for group in groups:
            best = [i for i in group.ranked()[: self.count] if self.least is None or group.rewards[i] >= self.least]
            if not best:
                dropped[TOO_LOW if group.answers else NO_ANSWER] += 1
            demos += [_one(group, i, "demo") for i in best]
        return demos, dropped


def point(group: Group, index: int, label: float) -> Row:
    """The example that answer ``index`` of ``group`` is good (``label`` 1) or bad (-1)."""
    return _one(group, index, "point") | {"label": label}


def _one(group: Group, index: int, kind: str) -> Row:
    answer = group.answers[index]
    row = about(group, answer, short_digest(kind, answer["sample_id"]))
    return row | {"kind": kind} | side(group, "chosen", index)


def _count(share: float, answers: int) -> int:
    return max(1, math.floor(share * answers + 1e-9)) if share else 0
