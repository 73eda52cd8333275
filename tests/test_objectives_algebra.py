"""Every row of pair losses: the algebra equals the paper's formula in value and gradient; a wrong formula doesn't."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from algebra import Case, N, batch_of, check, numbers, sigmoid
from torch import Tensor

from align_loop.objectives.noise import NoiseHandling, shape_flagged
from align_loop.objectives.objective import Objective
from align_loop.objectives.pair import pair_logits, pair_loss
from align_loop.objectives.terms import PairTerm, SftTerm

B = 0.3  # beta
QS = [1.0, 0.9, 0.6, 0.5, 0.3, 0.0]
MS = [0.0, 0.2, -0.5, 1.0, 0.7, 2.0]


def pair(beta: float = B, **fields: object) -> Objective:
    return Objective(beta, {"pair": PairTerm(**fields)})


def gap(x: SimpleNamespace) -> Tensor:
    return (x.pw - x.rw) - (x.pl - x.rl)


def cross_entropy(q: Tensor | float, u: Tensor) -> Tensor:
    return -q * torch.log(sigmoid(u)) - (1 - q) * torch.log(sigmoid(-u))


def log_score_gaps(x: SimpleNamespace) -> Tensor:
    """ODPO's offset with a = 0.5 from scores 2 and 2 - exp(2 m)."""
    better, worse = torch.full((N,), 2.0, dtype=torch.float64), 2.0 - torch.exp(2 * x.m)
    return 0.5 * torch.log(better - worse)


def odds(p: Tensor, n: Tensor) -> Tensor:
    probability = torch.exp(p / n)
    return torch.log(probability / (1 - probability))


def ropo(x: SimpleNamespace, a: float = 14.0) -> Tensor:
    return 4 * a / (1 + a) ** 2 * (-torch.log(sigmoid(B * gap(x))) + a * sigmoid(-B * gap(x)))


def flat(value: float) -> list[float]:
    return [value] * N


CONFIDENCE = [0.95, 0.8, 0.5, 0.3, 0.1, 0.6]
CASES = [
    Case("DPO", pair(), lambda x: torch.log(1 + torch.exp(-B * gap(x))), lambda x: -torch.log(sigmoid(-B * gap(x)))),
    Case(
        "a column's beta",
        pair(),
        lambda x: cross_entropy(1, 0.7 * gap(x)),
        lambda x: cross_entropy(1, B * gap(x)),
        {"beta": flat(0.7)},
    ),
    Case(
        "cDPO by column",
        pair(),
        lambda x: cross_entropy(0.8, B * gap(x)),
        lambda x: cross_entropy(0.2, B * gap(x)),
        {"q": flat(0.8)},
    ),
    Case(
        "cDPO by smoothing",
        pair(smoothing=0.2),
        lambda x: cross_entropy(0.8, B * gap(x)),
        lambda x: cross_entropy(1, B * gap(x)),
    ),
    Case(
        "OSP", pair(), lambda x: cross_entropy(x.q, B * gap(x)), lambda x: cross_entropy(1 - x.q, B * gap(x)), {"q": QS}
    ),
    Case(
        "RPO (reward-aware, backward KL)",
        pair(),
        lambda x: x.q * torch.log(x.q / sigmoid(B * gap(x))) + (1 - x.q) * torch.log((1 - x.q) / sigmoid(-B * gap(x))),
        lambda x: x.q * torch.log(x.q / sigmoid(gap(x))) + (1 - x.q) * torch.log((1 - x.q) / sigmoid(-gap(x))),
        {"q": [0.9, 0.8, 0.6, 0.5, 0.3, 0.1]},
        gradient_only=True,
    ),
    Case(
        "robust DPO by flip_rate",
        pair(flip_rate=0.2),
        lambda x: (-0.8 * torch.log(sigmoid(B * gap(x))) + 0.2 * torch.log(sigmoid(-B * gap(x)))) / 0.6,
        lambda x: (-0.8 * torch.log(sigmoid(B * gap(x))) - 0.2 * torch.log(sigmoid(-B * gap(x)))) / 0.6,
    ),
    Case(
        "robust DPO by column",
        pair(),
        lambda x: (-0.8 * torch.log(sigmoid(B * gap(x))) + 0.2 * torch.log(sigmoid(-B * gap(x)))) / 0.6,
        lambda x: cross_entropy(0.8, B * gap(x)),
        {"q": flat(0.8 / 0.6)},
    ),
    Case(
        "MCTS-DPO",
        pair(),
        lambda x: torch.stack(
            [cross_entropy(1 - min(1 - c, 0.5), u) for c, u in zip(CONFIDENCE, B * gap(x), strict=True)]
        ),
        lambda x: torch.stack([cross_entropy(c, u) for c, u in zip(CONFIDENCE, B * gap(x), strict=True)]),
        {"q": [1 - min(1 - c, 0.5) for c in CONFIDENCE]},
    ),
    Case(
        "RRM's neutral pair",
        pair(),
        lambda x: torch.log(2 * torch.cosh(B * gap(x) / 2)),
        lambda x: cross_entropy(1, B * gap(x)),
        {"q": flat(0.5)},
    ),
    Case(
        "Secrets II's flipped pair",
        pair(),
        lambda x: -torch.log(sigmoid(-B * gap(x))),
        lambda x: -torch.log(sigmoid(B * gap(x))),
        {"q": flat(0.0)},
    ),
    Case(
        "ODPO",
        pair(),
        lambda x: cross_entropy(1, B * gap(x) - log_score_gaps(x)),
        lambda x: cross_entropy(1, B * (gap(x) - x.m)),
        {"m": MS},
    ),
    Case(
        "refined DPO (m = r_w - r_l), votes, sequential SPO",
        pair(),
        lambda x: cross_entropy(1, B * gap(x) - x.m),
        lambda x: cross_entropy(1, B * gap(x) + x.m),
        {"m": MS},
    ),
    Case(
        "OPTune's weights",
        pair(),
        lambda x: x.w * cross_entropy(1, B * gap(x)),
        lambda x: cross_entropy(1, x.w * B * gap(x)),
        {"w": [0.0, 0.5, 1.0, 2.0, 0.1, 3.0]},
    ),
    Case(
        "Flex-DPO",
        pair(beta_rejected=0.1),
        lambda x: cross_entropy(1, B * (x.pw - x.rw) - 0.1 * (x.pl - x.rl)),
        lambda x: cross_entropy(1, 0.1 * (x.pw - x.rw) - B * (x.pl - x.rl)),
    ),
    Case(
        "Flex-DPO by column",
        pair(),
        lambda x: cross_entropy(1, B * (x.pw - x.rw) - 0.05 * (x.pl - x.rl)),
        lambda x: cross_entropy(1, B * gap(x)),
        {"beta_rejected": flat(0.05)},
    ),
    Case("ROPO", pair(links={"logistic": 56 / 225, "sigmoid": 56 * 14 / 225}), ropo, lambda x: ropo(x, 2.0)),
    Case(
        "SLiC hinge",
        pair(links={"hinge": 1.0}),
        lambda x: torch.maximum(1 - B * gap(x), torch.zeros(N)),
        lambda x: torch.maximum(1 - gap(x), torch.zeros(N)),
    ),
    Case(
        "square link", pair(links={"square": 1.0}), lambda x: (B * gap(x) - 0.5) ** 2, lambda x: (B * gap(x) - 1) ** 2
    ),
    Case(
        "IPO (Azar), summed",
        pair(links={"ipo": 1.0}),
        lambda x: (gap(x) - 1 / (2 * B)) ** 2,
        lambda x: (gap(x) - 1 / B) ** 2,
    ),
    Case(
        "IPO with soft labels",
        pair(links={"ipo": 1.0}),
        lambda x: x.q * (gap(x) - 1 / (2 * B)) ** 2 + (1 - x.q) * (gap(x) + 1 / (2 * B)) ** 2,
        lambda x: (gap(x) - 1 / (2 * B)) ** 2,
        {"q": QS},
    ),
    Case(
        "IPO per token",
        pair(links={"ipo": 1.0}, score="mean_log_ratio"),
        lambda x: ((x.pw - x.rw) / x.nw - (x.pl - x.rl) / x.nl - 1 / (2 * B)) ** 2,
        lambda x: (gap(x) - 1 / (2 * B)) ** 2,
    ),
    Case(
        "LN-DPO",
        pair(score="mean_log_ratio", beta=2.0),
        lambda x: cross_entropy(1, 2 * ((x.pw - x.rw) / x.nw - (x.pl - x.rl) / x.nl)),
        lambda x: cross_entropy(1, 2 * gap(x)),
    ),
    Case(
        "SimPO",
        pair(score="mean_log_prob", beta=2.0, margin=1.0),
        lambda x: cross_entropy(1, 2 / x.nw * x.pw - 2 / x.nl * x.pl - 1),
        lambda x: cross_entropy(1, 2 / x.nw * x.pw - 2 / x.nl * x.pl),
    ),
    Case(
        "token weights (BMC, M-DPO)",
        pair(),
        lambda x: cross_entropy(1, B * gap(x)),
        lambda x: cross_entropy(1, B * (torch.stack([t.sum() for t in x.token_p[:N]]) - x.rw - x.pl + x.rl)),
        weighted=True,
    ),
    Case(
        "token weights, per token",
        pair(score="mean_log_ratio"),
        lambda x: cross_entropy(1, B * ((x.pw - x.rw) / x.nw - (x.pl - x.rl) / x.nl)),
        lambda x: cross_entropy(1, B * gap(x)),
        weighted=True,
    ),
    Case(
        "CPO's contrast",
        pair(score="log_prob"),
        lambda x: cross_entropy(1, B * (x.pw - x.pl)),
        lambda x: cross_entropy(1, B * gap(x)),
    ),
    Case(
        "CPO",
        Objective(B, {"pair": PairTerm(score="log_prob"), "sft": SftTerm(kinds=["pair"], reduce="sum")}),
        lambda x: cross_entropy(1, B * (x.pw - x.pl)) - x.pw,
        lambda x: cross_entropy(1, B * (x.pw - x.pl)) - x.pl,
    ),
    Case(
        "ORPO",
        Objective(B, {"odds": PairTerm(weight=0.1, score="log_odds", beta=1.0), "sft": SftTerm(kinds=["pair"])}),
        lambda x: -x.pw / x.nw - 0.1 * torch.log(sigmoid(odds(x.pw, x.nw) - odds(x.pl, x.nl))),
        lambda x: -x.pw / x.nw - 0.1 * torch.log(sigmoid(x.pw / x.nw - x.pl / x.nl)),
    ),
    Case(
        "DPO-positive",
        pair(positive=5.0),
        lambda x: cross_entropy(1, B * (gap(x) - 5 * torch.maximum(x.rw - x.pw, torch.zeros(N)))),
        lambda x: cross_entropy(1, B * (gap(x) - 5 * torch.maximum(x.pw - x.rw, torch.zeros(N)))),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_algebra_equals_the_formula(case: Case) -> None:
    assert all(check(case, case.right, seed) for seed in range(3))


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_wrong_formula_is_told_apart(case: Case) -> None:
    assert not any(check(case, case.wrong, seed) for seed in range(3))


def test_selfies_refinement_is_a_soft_label() -> None:
    """q = 1 - alpha where a pair is flagged, on top of the labels that the record has."""
    batch, flags = batch_of(), torch.tensor([1.0, 0, 0, 1, 0, 0])
    x = numbers(batch)
    batch.q, batch.w = shape_flagged(batch.q, batch.w, flags, NoiseHandling(alpha=0.1))
    expected = cross_entropy(1 - 0.1 * flags, B * gap(x))
    assert torch.allclose(pair().losses(batch, {})["pair"], expected)
    assert not torch.allclose(pair().losses(batch, {})["pair"], cross_entropy(1, B * gap(x)))


def test_dove_keeps_the_prompts_tokens_in_the_score() -> None:
    """Pairs over different prompts: the joint log-ratio, whose prompt part doesn't cancel."""
    batch, whole = batch_of(seed=1), batch_of(seed=1)
    whole.answers.mask = torch.ones_like(whole.answers.mask)  # the first tokens stand for prompts of another length
    tokens = whole.answers.policy - whole.answers.reference
    expected = torch.log(1 + torch.exp(-B * (tokens[:N].sum(1) - tokens[N:].sum(1))))
    assert torch.allclose(pair().losses(whole, {})["pair"], expected)
    assert not torch.allclose(pair().losses(batch, {})["pair"], expected)


def test_mrpo_is_dpo_against_the_harmonic_mixture_of_references() -> None:
    batch, x = batch_of(), numbers(batch_of())
    other, share = x.r - torch.linspace(-1, 2, 2 * N, dtype=torch.float64), 0.3
    mixed = 1 / (share / torch.exp(x.r) + (1 - share) / torch.exp(other))
    ratio = torch.exp(x.p) / mixed
    expected = -torch.log(ratio[:N] ** B / (ratio[:N] ** B + ratio[N:] ** B))
    reference = -torch.logsumexp(torch.stack([math.log(share) - x.r, math.log(1 - share) - other]), 0)
    batch.answers.reference = torch.zeros_like(batch.answers.reference)
    batch.answers.reference[:, 0] = reference
    assert torch.allclose(pair().losses(batch, {})["pair"], expected)
    assert not torch.allclose(pair().losses(batch_of(), {})["pair"], expected)


def test_reward_heads_are_scores_too() -> None:
    """Bradley-Terry reward models with a margin, and the skew product of GPM: a score of the pair."""
    source = torch.Generator().manual_seed(3)
    rewards = torch.randn(2, N, generator=source, dtype=torch.float64)
    found = pair_loss(pair_logits(rewards[0], rewards[1], 1.0, 0.4), 0.9)
    assert torch.allclose(found, cross_entropy(0.9, rewards[0] - rewards[1] - 0.4))
    assert not torch.allclose(found, cross_entropy(0.9, rewards[0] - rewards[1] + 0.4))
    one, other = torch.randn(2, N, 4, generator=source, dtype=torch.float64)
    skew = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * 2)
    score = ((one @ skew) * other).sum(1)
    assert torch.allclose(score, -((other @ skew) * one).sum(1))
    found = pair_loss(pair_logits(score, torch.zeros(N), 1 / 0.1, 0.0), 1.0)
    assert torch.allclose(found, torch.log(1 + torch.exp(-score / 0.1)))
    assert not torch.allclose(found, torch.log(1 + torch.exp(-score)))
