"""An order that is known by construction: answers of one context are better than those of another, nobody is asked.

So labelled are, among others, answers under a good and a bad principle, of a larger and a smaller prompt, before and
after an edit. Which context an answer was sampled under is its ``variant`` in ``record.ANSWERS``.
"""

from __future__ import annotations

from dataclasses import dataclass

from align_loop.annotators.job import Annotation, Job
from align_loop.annotators.judging import by_prompt, score_row
from align_loop.errors import UserError

PLAIN = "plain"  # the name here of answers without a variant


@dataclass
class Construct:
    """Reward = ``scores[variant]``; ``plain`` names answers sampled under the prompt alone (variant null)."""

    scores: dict[str, float]

    def __post_init__(self) -> None:
        if len(set(self.scores.values())) < 2:
            raise ValueError(f"annotator.scores={self.scores} orders nothing: give two variants different scores")

    def annotate(self, job: Job) -> Annotation:
        """The score of each answer's variant. Raises ``UserError`` for a variant without a score."""
        rows = []
        for answers in by_prompt(job).values():
            for row in answers:
                variant = row.get("variant") or PLAIN
                if variant not in self.scores:
                    raise UserError(
                        f"annotator.scores has no {variant!r}, the variant of answer {row['sample_id']} to prompt "
                        f"{row['prompt_id']}; it has {', '.join(self.scores)}"
                    )
                rows.append(score_row(row, self.scores[variant]))
        return Annotation(rows)
