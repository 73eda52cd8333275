"""A simulated person with a budget: the true quality of answers, where a setting knows it, exact or as noisy choices.

For asking what labels are worth: how many prompts a person must see, and how sharply they must see.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Literal

from align_loop.annotators.job import Annotation, Job
from align_loop.annotators.judging import by_prompt, pair_row, score_row, scores_from_pairs
from align_loop.errors import UserError
from align_loop.groups import sigmoid
from align_loop.record import Row, short_digest


@dataclass
class Gold:
    """Labels of at most ``budget`` prompts (null: all); the answers to the others are not scored.

    ``select``: which prompts, random (by the run's seed) or first (by prompt id: the same for every seed).
    ``sharpness`` null: the reward is the true quality itself, in [0, 1]. A number: each pair of a prompt's answers gets
    one throw of a Bradley-Terry coin, P(first better) = sigmoid(sharpness * difference of quality), and the rewards are
    those that fit the throws best. (The embedded setting's own sharpness is per demand: six times that here.)
    """

    budget: int | None = None
    select: Literal["random", "first"] = "random"
    sharpness: float | None = None

    needs_gold: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"annotator.budget={self.budget} must be at least 1; null labels all prompts")
        if self.sharpness is not None and self.sharpness <= 0:
            raise ValueError(f"annotator.sharpness={self.sharpness} must be positive; null gives the exact quality")

    def annotate(self, job: Job) -> Annotation:
        """Scores within the budget, and the throws where there are any. Raises ``UserError`` without gold."""
        if job.gold is None:
            raise UserError("annotator: the quality of these answers is not known; take a setting that has gold")
        groups = by_prompt(job)
        if self.select == "random":
            asked = sorted(groups, key=lambda prompt: short_digest("gold", job.seed, prompt))[: self.budget]
        else:
            asked = sorted(groups)[: self.budget]
        job.context.rows(
            "prompts", into=len(groups), out=len(asked), dropped={"outside the budget": len(groups) - len(asked)}
        )
        chosen = {prompt: groups[prompt] for prompt in sorted(asked)}
        if self.sharpness is None:
            return Annotation([score_row(a, job.gold[a["sample_id"]]) for rows in chosen.values() for a in rows])
        pairs = [pair for rows in chosen.values() for pair in combinations(rows, 2)]
        pairwise = [pair_row(*pair, float(self._throw(*pair, job))) for pair in pairs]
        return Annotation(scores_from_pairs(chosen, pairwise), pairwise)

    def _throw(self, first: Row, second: Row, job: Job) -> bool:
        """Whether the coin says that the first answer is better: a function of the seed and the two answers alone."""
        ids = [first["sample_id"], second["sample_id"]]
        probability = sigmoid(self.sharpness * (job.gold[ids[0]] - job.gold[ids[1]]))
        return int(short_digest("coin", job.seed, *ids), 16) / 2**64 < probability
