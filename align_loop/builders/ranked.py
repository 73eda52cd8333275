"""Several pairs out of one ranking: neighbours in it, or every two answers that score differently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from align_loop.builders.pair import Built, pair, undecided
from align_loop.chance import chance
from align_loop.groups import Group

TOO_FEW = "no two answers that far apart in the ranking score differently"


@dataclass
class RankedPairs:
    """Each answer against the one ``gap`` places below it in the ranking; pairs with equal scores are left out.

    The ranked pairing of OSP (Online Self-Preferring Language Models): n - gap pairs from n answers, on which a soft
    label can say how sure each is (``shapers.labels.SoftLabel``).
    """

    gap: int = 1

    def __post_init__(self) -> None:
        if self.gap < 1:
            raise ValueError(f"RankedPairs.gap={self.gap} must be at least 1 place in the ranking")

    def build(self, groups: list[Group], seed: int) -> Built:
        def neighbours(group: Group) -> list[tuple[int, int]]:
            order = group.ranked()
            return list(zip(order, order[self.gap :], strict=False))

        return _pairs(groups, neighbours)


@dataclass
class AllPairs:
    """Every two answers of a prompt that score differently, the better one chosen; at most ``limit`` a prompt.

    Which ones remain under a limit is drawn by (seed, prompt id); null takes all (FactTune, Orca-Math).
    """

    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"AllPairs.limit={self.limit} must be at least 1, or null for no limit")

    def build(self, groups: list[Group], seed: int) -> Built:
        def some(group: Group) -> list[tuple[int, int]]:
            found = list(_different(group, combinations(group.ranked(), 2)))
            if self.limit is None or len(found) <= self.limit:
                return found
            places = chance("pairs", seed, group.prompt["prompt_id"]).sample(range(len(found)), self.limit)
            return [found[i] for i in sorted(places)]

        return _pairs(groups, some)


def _different(group: Group, pairs) -> Iterator[tuple[int, int]]:
    return ((i, j) for i, j in pairs if group.rewards[i] > group.rewards[j])


def _pairs(groups: list[Group], places) -> Built:
    """The pairs at ``places(group)`` (indices, the better one first) that score differently."""
    pairs, dropped = [], Counter()
    for group in groups:
        found = [] if (reason := undecided(group)) else list(_different(group, places(group)))
        if not found:
            dropped[reason or TOO_FEW] += 1
        pairs += [pair(group, i, j) for i, j in found]
    return pairs, dropped
