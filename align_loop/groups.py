"""A prompt with its scored answers: what builders and shapers work on.

Annotators give one score an answer, or compare answers in pairs, or both; here the two become one another. A matrix
``P[i][j]`` is the probability that answer ``i`` is better than answer ``j``; scores are the rank-one case,
``P[i][j] = sigmoid(r_i - r_j)`` (Bradley and Terry 1952).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from align_loop.record import Row

Matrix = list[list[float]]


@dataclass
class Group:
    """One prompt and its scored answers, in the order of ``k``.

    ``scores``: rows of ``record.SCORES``, one an answer. ``compared``: (n, n) probabilities where the annotator
    compared answers in pairs, else None.
    """

    prompt: Row
    answers: list[Row]
    scores: list[Row]
    compared: Matrix | None = None

    @property
    def rewards(self) -> list[float]:
        """The score of each answer; higher is better."""
        return [row["reward"] for row in self.scores]

    def probability(self, first: int, second: int) -> float:
        """That answer ``first`` is better than answer ``second``: as compared, else from the scores."""
        if self.compared is not None:
            return self.compared[first][second]
        return sigmoid(self.scores[first]["reward"] - self.scores[second]["reward"])

    def ranked(self) -> list[int]:
        """Indices of the answers from best to worst; equal scores in the order of ``k``."""
        return sorted(range(len(self.answers)), key=lambda i: (-self.scores[i]["reward"], i))


def groups_of(prompts: list[Row], answers: list[Row], scores: list[Row], pairwise: Sequence[Row] = ()) -> list[Group]:
    """One group a prompt, in prompt order; answers without a score are left out. Joined by id, in any row order.

    ``pairwise``: rows of ``record.PAIRWISE``. A comparison that is missing for two answers is one half.
    """
    scored = {row["sample_id"]: row for row in scores}
    members: dict[str, list[Row]] = {}
    for row in sorted(answers, key=lambda a: a["k"]):
        if row["sample_id"] in scored:
            members.setdefault(row["prompt_id"], []).append(row)
    compared: dict[str, list[Row]] = {}
    for row in pairwise:
        compared.setdefault(row["prompt_id"], []).append(row)
    groups = []
    for prompt in prompts:
        group = members.get(prompt["prompt_id"], [])
        ids = [row["sample_id"] for row in group]
        rows = compared.get(prompt["prompt_id"])
        groups.append(Group(prompt, group, [scored[i] for i in ids], matrix_of(ids, rows) if rows else None))
    return groups


def matrix_of(ids: Sequence[str], rows: Sequence[Row]) -> Matrix:
    """The (n, n) matrix of rows of ``record.PAIRWISE``; both directions of one comparison are averaged."""
    place = {sample: i for i, sample in enumerate(ids)}
    seen: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row["first_sample_id"] in place and row["second_sample_id"] in place:
            i, j = place[row["first_sample_id"]], place[row["second_sample_id"]]
            seen.setdefault((i, j), []).append(row["p_first"])
            seen.setdefault((j, i), []).append(1 - row["p_first"])
    n = len(ids)
    return [[fmean(seen[i, j]) if (i, j) in seen else 0.5 for j in range(n)] for i in range(n)]


def matrix_from_scores(rewards: Sequence[float]) -> Matrix:
    """``P[i][j] = sigmoid(r_i - r_j)``."""
    return [[sigmoid(a - b) for b in rewards] for a in rewards]


def scores_from_matrix(matrix: Matrix) -> list[float]:
    """Rewards (n,) of mean 0 whose Bradley-Terry probabilities come closest to ``matrix`` in likelihood.

    Exact where the matrix is of that form. Newton's method on a concave likelihood, its steps limited to 2;
    probabilities are kept within 1e-6 of 0 and 1, so that the result is finite. Without answers: an empty list.
    """
    import numpy as np

    n = len(matrix)
    if n < 2:
        return [0.0] * n
    wanted = np.clip(np.array(matrix, dtype=float), 1e-6, 1 - 1e-6)
    rewards = np.zeros(n)
    for _ in range(100):
        now = 1 / (1 + np.exp(rewards[None, :] - rewards[:, None]))
        gradient = (wanted - now).sum(axis=1) - np.diag(wanted - now)
        curvature = now * (1 - now) * (1 - np.eye(n))
        hessian = np.diag(curvature.sum(axis=1)) - curvature
        step = np.linalg.solve(hessian + 1 / n, gradient)  # 1 / n fixes the mean, which is free
        rewards = rewards + step * min(1.0, 2.0 / max(abs(step).max(), 1e-300))
        if abs(step).max() < 1e-10:
            break
    return (rewards - rewards.mean()).tolist()


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)) without overflow."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return math.exp(value) / (1 + math.exp(value))
