"""People's labels on a few pairs, on top of any annotator for the rest.

``python -m align_loop export-pairs`` writes the pairs that an annotator was least sure of; a person fills them in; the
same run goes on with ``annotator=people annotator.file=FILE``, with the former annotator as ``base``. Labels belong to
the answers of one iteration: elsewhere, and for pairs without a label, the base decides alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from align_loop.annotators.ensemble import annotate_inside
from align_loop.annotators.job import Annotation, Job
from align_loop.annotators.judging import by_prompt, inner_roles, pair_row, score_row
from align_loop.groups import Group, groups_of
from align_loop.labels import Label, of_these, read_labels
from align_loop.parts import PART
from align_loop.record import Row

_WEIGHT = 1e6  # of a label against a base score, in the squares that are minimised


@dataclass
class People:
    """``file``: filled in (see ``labels.py``); ``base``: an annotator, or null (then only labelled answers are scored).

    In a prompt with labels the rewards are those nearest to the base's (in squares) for which the labelled answers
    differ by ``gap`` reward units (by 0 for a tie), their mean kept; several labels of one pair are averaged. With the
    Bradley-Terry model a gap of 5 says that a person is right in 99.3 %. ``record.PAIRWISE`` has 1, 0 or 1/2 for the
    labelled pairs, and the base's probability for the other pairs of those prompts.
    """

    file: str
    base: Any = field(default=None, metadata=PART)
    gap: float = 5.0

    def __post_init__(self) -> None:
        if not Path(self.file).expanduser().is_file():
            raise ValueError(f"annotator.file={self.file}: no such file; export-pairs writes one to fill in")
        if self.gap <= 0:
            raise ValueError(f"annotator.gap={self.gap} must be positive, in reward units")

    @property
    def needs_gold(self) -> bool:
        """Whether the base asks for the true quality."""
        return getattr(self.base, "needs_gold", False)

    def roles(self) -> dict[str, str]:
        """The models that the base reads."""
        return inner_roles({"base": self.base})

    def files(self) -> dict[str, str]:
        """The labels, and the files that the base reads."""
        return {"labels": self.file, **inner_roles({"base": self.base}, "files")}

    def annotate(self, job: Job) -> Annotation:
        """The base's scores with the labels put over them. ``UserError`` for labels of other texts."""
        path = job.models["labels"]
        labels = read_labels(path)
        mine = of_these(labels, job.answers)
        job.context.fact("labels", {"of these answers": len(mine), "of others": len(labels) - len(mine)})
        base = annotate_inside("base", self.base, job) if self.base is not None else Annotation([])
        by_label: dict[str, list[Label]] = {}
        for label in mine:
            by_label.setdefault(label.prompt_id, []).append(label)
        scores = {row["sample_id"]: row for row in base.scores}
        pairwise = [row for row in base.pairwise if row["prompt_id"] not in by_label]
        groups = by_prompt(job)
        for prompt, given in by_label.items():
            group = self._group(groups[prompt], given, scores, base.pairwise)
            rewards = honouring(group.rewards, self._gaps(group, given))
            for row, reward in zip(group.scores, rewards, strict=True):
                scores[row["sample_id"]] = row | {"reward": reward}
            pairwise += _complete(group, given)
        return Annotation(list(scores.values()), pairwise)

    def _group(self, answers: list[Row], labels: list[Label], scores: dict[str, Row], pairwise: list[Row]) -> Group:
        """The prompt's answers that the base scored or a label names; these start at the mean of the others, or 0."""
        named = {sample for label in labels for sample in (label.first, label.second)}
        known = [scores[a["sample_id"]]["reward"] for a in answers if a["sample_id"] in scores]
        start = fmean(known) if known else 0.0
        rows = [
            scores.get(a["sample_id"]) or score_row(a, start)
            for a in answers
            if a["sample_id"] in scores or a["sample_id"] in named
        ]
        prompt = answers[0]["prompt_id"]
        own = [row for row in pairwise if row["prompt_id"] == prompt]
        return groups_of([{"prompt_id": prompt}], answers, rows, own)[0]

    def _gaps(self, group: Group, labels: list[Label]) -> list[tuple[int, int, float]]:
        place = {answer["sample_id"]: i for i, answer in enumerate(group.answers)}
        return [(place[x.first], place[x.second], self.gap * (2 * x.p_first - 1)) for x in labels]


def honouring(rewards: Sequence[float], gaps: Sequence[tuple[int, int, float]]) -> list[float]:
    """The rewards nearest to ``rewards`` in squares with ``s[i] - s[j] = gap`` for each (i, j, gap).

    Gaps that contradict one another are met in the mean of squares.
    """
    import numpy as np

    matrix, wanted = np.eye(len(rewards)), np.array(rewards, dtype=float)
    for i, j, gap in gaps:
        direction = np.zeros(len(rewards))
        direction[[i, j]] = 1, -1
        matrix += _WEIGHT * np.outer(direction, direction)
        wanted += _WEIGHT * gap * direction
    return np.linalg.solve(matrix, wanted).tolist()


def _complete(group: Group, labels: list[Label]) -> list[Row]:
    """A comparison of every two answers, because one that is missing would count as one half."""
    said: dict[tuple[str, str], list[float]] = {}
    for label in labels:
        said.setdefault((label.first, label.second), []).append(label.p_first)
        said.setdefault((label.second, label.first), []).append(1 - label.p_first)
    rows = []
    for i, j in combinations(range(len(group.answers)), 2):
        first, second = group.answers[i], group.answers[j]
        given = said.get((first["sample_id"], second["sample_id"]))
        rows.append(pair_row(first, second, fmean(given) if given else group.probability(i, j)))
    return rows
