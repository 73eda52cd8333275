"""Pairs whose order is known by how the answers were made: nobody is asked which one is better.

Counterfactual DPO, AutoPM, CST and others sample a prompt twice, plainly and under an instruction, and know which
answer is to be preferred. The pair is trained on under the plain prompt (``builders/stage.py`` renders it).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from align_loop.builders.pair import NO_ANSWER, Built, pair
from align_loop.groups import Group


@dataclass
class ConstructPair:
    """Answers of the variant ``better`` against those of ``worse``; null names the plain prompt's own answers.

    ``variant`` of ``record.ANSWERS`` says which context an answer was sampled under. The first answer of one variant
    meets the first of the other, the second the second, in the order of ``k``; scores are carried along, not read.
    """

    better: str | None
    worse: str | None = None

    def __post_init__(self) -> None:
        if self.better == self.worse:
            raise ValueError(f"ConstructPair.better={self.better} and worse={self.worse} must be two variants")

    def build(self, groups: list[Group], seed: int) -> Built:
        pairs, dropped = [], Counter()
        for group in groups:
            better, worse = _of(group, self.better), _of(group, self.worse)
            if not (better and worse):
                missing = self.worse if better else self.better
                dropped[f"no answer of variant {missing or 'plain'}" if group.answers else NO_ANSWER] += 1
            pairs += [pair(group, i, j) for i, j in zip(better, worse, strict=False)]
        return pairs, dropped


def _of(group: Group, variant: str | None) -> list[int]:
    return [i for i, answer in enumerate(group.answers) if answer.get("variant") == variant]
