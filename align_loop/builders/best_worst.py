"""Best against worst: of each prompt's scored answers, the highest and the lowest reward make a pair."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from align_loop.builders.pair import NO_ANSWER, ONE_ANSWER, TIE, pair
from align_loop.groups import Group
from align_loop.record import Row


@dataclass
class BestWorst:
    """One pair a prompt. Prompts with one answer, and those whose best and worst score alike, make none."""

    def build(self, groups: list[Group], seed: int) -> tuple[list[Row], Counter[str]]:
        """(rows of ``record.EXAMPLES`` in prompt order, prompts that made no pair by reason).

        Equal rewards are ordered by ``k``, so the result depends on no order of rows.
        """
        pairs, dropped = [], Counter()
        for group in groups:
            order, rewards = group.ranked(), group.rewards
            if len(order) < 2:
                dropped[ONE_ANSWER if order else NO_ANSWER] += 1
            elif rewards[order[0]] == rewards[order[-1]]:
                dropped[TIE] += 1
            else:
                pairs.append(pair(group, order[0], order[-1]))
        return pairs, dropped
