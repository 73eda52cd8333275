"""Best against worst: of each prompt's scored answers, the highest and the lowest reward make a pair."""

from __future__ import annotations

from dataclasses import dataclass

from align_loop.builders.pair import Built, best_against
from align_loop.groups import Group


@dataclass
class BestWorst:
    """One pair a prompt. Prompts with one answer, and those whose best and worst score alike, make none.

    Equal rewards are ordered by ``k``, so the result depends on no order of rows.
    """

    def build(self, groups: list[Group], seed: int) -> Built:
        """(rows of ``record.EXAMPLES`` in prompt order, prompts that made no pair by reason)."""
        return best_against(groups, lambda group, worse: worse[-1])
