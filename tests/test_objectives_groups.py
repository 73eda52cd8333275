"""Group losses equal the papers' formulas; wrong formulas are told apart."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from algebra import Case, N, batch_of, check, numbers, sigmoid
from torch import Tensor

from align_loop.objectives.group import contrast
from align_loop.objectives.objective import Objective
from align_loop.objectives.terms import GroupTerm

B = 0.3


def grouped(**fields: object) -> Objective:
    return Objective(B, {"group": GroupTerm(**fields)})


def per_group(x: SimpleNamespace, loss) -> Tensor:
    rewards, scores = B * (x.p - x.r), x.member_score
    return torch.stack([loss(rewards[3 * i : 3 * i + 3], scores[3 * i : 3 * i + 3]) for i in range(N)])


def ranking(rewards: Tensor, scores: Tensor, worst_first: bool = False) -> Tensor:
    order = sorted(range(3), key=lambda i: scores[i].item(), reverse=not worst_first)
    probability = 1.0
    for k in range(3):
        weights = torch.exp(rewards[order[k:]])
        probability = probability * weights[0] / weights.sum()
    return -torch.log(probability)


def contrasts(rewards: Tensor, scores: Tensor, weigh) -> Tensor:
    pairs = [(i, j) for i, j in itertools.permutations(range(3), 2) if scores[i] > scores[j]]
    weights = weigh(scores, pairs)
    return sum(w * -torch.log(sigmoid(rewards[i] - rewards[j])) for w, (i, j) in zip(weights, pairs, strict=True))


def dcg(scores: Tensor, pairs: list[tuple[int, int]]) -> list[float]:
    rank = {i: 1 + sum(other > scores[i] for other in scores).item() for i in range(3)}
    return [
        abs(2 ** scores[i] - 2 ** scores[j]) * abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
        for i, j in pairs
    ]


def gap_weights(scores: Tensor, pairs: list[tuple[int, int]]) -> list[float]:
    gaps = [scores[i] - scores[j] for i, j in pairs]
    return [gap / sum(gaps) for gap in gaps]


def rebel(rewards: Tensor, scores: Tensor, sign: float = 1.0) -> Tensor:
    pairs = list(itertools.combinations(range(3), 2))
    return sum((rewards[i] - rewards[j] - sign * (scores[i] - scores[j])) ** 2 for i, j in pairs) / len(pairs)


GROUPS = [
    Case(
        "Plackett-Luce",
        grouped(),
        lambda x: per_group(x, ranking),
        lambda x: per_group(x, lambda r, s: ranking(r, s, True)),
        kind="group",
    ),
    Case(
        "contrast over all pairs",
        grouped(loss="contrast"),
        lambda x: per_group(x, lambda r, s: contrasts(r, s, lambda _, p: [1 / 3] * 3)),
        lambda x: per_group(x, lambda r, s: contrasts(r, s, lambda _, p: [1.0] * 3)),
        kind="group",
    ),
    Case(
        "contrast by score gaps",
        grouped(loss="contrast", weighting="gap"),
        lambda x: per_group(x, lambda r, s: contrasts(r, s, gap_weights)),
        lambda x: per_group(x, lambda r, s: contrasts(r, s, dcg)),
        kind="group",
    ),
    Case(
        "RankDPO's weights",
        grouped(loss="contrast", weighting="dcg"),
        lambda x: per_group(x, lambda r, s: contrasts(r, s, dcg)),
        lambda x: per_group(x, lambda r, s: contrasts(-r, s, dcg)),
        kind="group",
    ),
    Case(
        "REBEL",
        grouped(loss="regress"),
        lambda x: per_group(x, rebel),
        lambda x: per_group(x, lambda r, s: rebel(r, s, -1.0)),
        kind="group",
    ),
]


@pytest.mark.parametrize("case", GROUPS, ids=repr)
def test_the_algebra_equals_the_formula(case: Case) -> None:
    assert all(check(case, case.right, seed) for seed in range(3))


@pytest.mark.parametrize("case", GROUPS, ids=repr)
def test_a_wrong_formula_is_told_apart(case: Case) -> None:
    assert not any(check(case, case.wrong, seed) for seed in range(3))


def test_relative_preference_optimisation_is_a_contrast_with_inner_weights() -> None:
    """RPO (Yin et al. 2024): every chosen answer against every rejected one, weighted by the prompts' similarity."""
    batch = batch_of()
    x = numbers(batch)
    good, bad = B * (x.pw - x.rw), B * (x.pl - x.rl)
    weights = torch.softmax(-torch.rand(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 0.5, 1)
    terms = [-torch.log(sigmoid(weights[i, j] * (good[i] - bad[j]))) for i in range(N) for j in range(N)]
    found = contrast(good, bad, weights, torch.full((N, N), 1 / N**2, dtype=torch.float64))
    assert torch.allclose(found, sum(terms) / N**2)
    assert not torch.allclose(contrast(good, bad, 1.0, weights / N), sum(terms) / N**2)


def test_equal_scores_of_a_group_have_no_contrast() -> None:
    batch = batch_of("group")
    batch.member_score = torch.ones_like(batch.member_score)
    losses = grouped(loss="contrast").losses(batch, {})["group"]
    assert losses.tolist() == [0.0] * N
