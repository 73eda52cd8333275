"""The pair objective against an independent formula, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align_loop.objectives.objective import Objective
from align_loop.objectives.pair import pair_logits, pair_loss
from align_loop.objectives.scores import summed_logprobs

scores = st.floats(-200, 200)
pairs = st.tuples(scores, scores, st.floats(-0.5, 1.5), st.floats(-3, 3), st.floats(0.01, 2), st.floats(0, 3))


def independent(chosen: float, rejected: float, q: float, m: float, beta: float) -> tuple[float, float]:
    """Loss and d loss / d chosen score of one pair with nothing but ``math``: cross-entropy of a Bernoulli."""
    u = beta * (chosen - rejected) - m
    log_p = -math.log1p(math.exp(-u)) if u > 0 else u - math.log1p(math.exp(u))
    log_not_p = log_p - u
    return -(q * log_p + (1 - q) * log_not_p), beta * (math.exp(log_p) - q)


@settings(max_examples=60, deadline=None)
@given(st.lists(pairs, min_size=1, max_size=5))
def test_loss_and_gradient_equal_the_bernoulli_cross_entropy(rows: list[tuple[float, ...]]) -> None:
    chosen, rejected, q, m, beta, w = torch.tensor(rows, dtype=torch.float64).T
    chosen = chosen.clone().requires_grad_()
    losses = w * pair_loss(pair_logits(chosen, rejected, beta, m), q)
    losses.sum().backward()
    for i, (cw, cl, one_q, one_m, one_beta, one_w) in enumerate(rows):
        value, slope = independent(cw, cl, one_q, one_m, one_beta)
        assert losses[i].item() == pytest.approx(one_w * value, rel=1e-9, abs=1e-9)
        assert chosen.grad[i].item() == pytest.approx(one_w * slope, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("u", [-1e4, -90.0, 0.0, 90.0, 1e4])
@pytest.mark.parametrize("q", [0.0, 0.3, 1.0])
def test_extreme_margins_stay_finite_in_float32(u: float, q: float) -> None:
    logit = torch.tensor([u], requires_grad=True)
    loss = pair_loss(logit, torch.tensor([q]))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logit.grad).all()
    assert loss.item() == pytest.approx(
        independent(u, 0.0, q, 0.0, 1.0)[0] if abs(u) < 500 else max(-u, 0) * q + max(u, 0) * (1 - q),
        rel=1e-5,
        abs=1e-30,
    )


def test_tiny_losses_keep_their_relative_precision() -> None:
    """A loss computed as a difference of large numbers would give 0 here."""
    loss = pair_loss(torch.tensor([-40.0]), torch.tensor([0.0]))
    assert loss.item() == pytest.approx(math.exp(-40), rel=1e-4)


def test_summed_logprobs_ignores_what_the_mask_excludes() -> None:
    values = torch.tensor([[-1.0, float("-inf"), -2.5], [float("nan"), -4.0, 0.0]])
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    assert summed_logprobs(values, mask).tolist() == [-3.5, -4.0]


def test_summed_logprobs_widens_bfloat16_before_summing() -> None:
    values = torch.full((1, 301), -1.0, dtype=torch.bfloat16)  # bfloat16 has no 301
    assert summed_logprobs(values, torch.ones(1, 301)).tolist() == [-301.0]


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf")])
def test_a_beta_that_is_not_positive_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="objective.beta"):
        Objective(beta=beta)
