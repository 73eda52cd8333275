"""Best against one that is not the worst: with many answers a prompt the worst is an outlier that teaches little.

Source: Sweet Spot ("Finding the Sweet Spot: Preference Data Construction for Scaling Preference Optimization"): pairs
of maximum and minimum get worse as the number of answers grows; an answer two standard deviations below the mean, or
the worst of five random ones, stays useful.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, pstdev

from align_loop.builders.pair import Built, best_against
from align_loop.chance import chance
from align_loop.groups import Group


@dataclass
class BestMu2s:
    """The best against the worse answer whose reward is nearest ``mean - deviations * sd`` of the prompt's answers.

    ``sd``: the population standard deviation of the prompt's rewards; of two equally near the better one is taken.
    """

    deviations: float = 2.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.deviations):
            raise ValueError(f"BestMu2s.deviations={self.deviations} must be a finite number")

    def build(self, groups: list[Group], seed: int) -> Built:
        def nearest(group: Group, worse: list[int]) -> int:
            target = fmean(group.rewards) - self.deviations * pstdev(group.rewards)
            return min(worse, key=lambda i: abs(group.rewards[i] - target))

        return best_against(groups, nearest)


@dataclass
class BestMinOfK:
    """The best against the worst of ``k`` random ones among the worse answers (all of them where there are fewer)."""

    k: int = 5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"BestMinOfK.k={self.k} must be at least 1")

    def build(self, groups: list[Group], seed: int) -> Built:
        def worst_of_some(group: Group, worse: list[int]) -> int:
            places = _draw(group, seed).sample(range(len(worse)), min(self.k, len(worse)))
            return worse[max(places)]  # ranked from best to worst

        return best_against(groups, worst_of_some)


@dataclass
class BestRandom:
    """The best against a random one of the worse answers (an option of RLHF Workflow's)."""

    def build(self, groups: list[Group], seed: int) -> Built:
        return best_against(groups, lambda group, worse: _draw(group, seed).choice(worse))


def _draw(group: Group, seed: int):
    return chance("rejected", seed, group.prompt["prompt_id"])
