"""The reward model's objective against formulas written out here, and wrong variants that are told apart."""

from __future__ import annotations

import pytest
import torch

from align_loop.objectives.reward import preference_score, reward_losses


def vectors(dim: int, count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(dim)
    return tuple(torch.randn(count, dim, dtype=torch.float64, generator=generator) for _ in range(2))


def rotation(dim: int) -> torch.Tensor:
    """R of the general preference model: blocks [[0, -1], [1, 0]]."""
    return torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * (dim // 2))


@pytest.mark.parametrize("dim", [2, 4, 6])
def test_the_gpm_score_is_the_skew_product(dim) -> None:
    first, second = vectors(dim)
    expected = torch.einsum("bi,ij,bj->b", first, rotation(dim), second)
    assert torch.allclose(preference_score(first, second, "gpm"), expected)
    for wrong in (rotation(dim).abs(), rotation(dim).T, torch.eye(dim, dtype=torch.float64)):  # symmetric, turned, none
        assert not torch.allclose(torch.einsum("bi,ij,bj->b", first, wrong, second), expected)


@pytest.mark.parametrize(("head", "dim"), [("scalar", 1), ("gpm", 4)])
def test_what_one_answer_wins_the_other_loses(head, dim) -> None:
    first, second = vectors(dim)
    score = preference_score(first, second, head)
    assert torch.equal(score, -preference_score(second, first, head)) and score.abs().max() > 0.1
    assert torch.equal(preference_score(first, first, head), torch.zeros(7, dtype=torch.float64))
    symmetric = torch.einsum("bi,ij,bj->b", first, rotation(4).abs(), second) if dim == 4 else score.abs()
    reverse = torch.einsum("bi,ij,bj->b", second, rotation(4).abs(), first) if dim == 4 else score.abs()
    assert not torch.allclose(symmetric, -reverse)


def test_a_scalar_model_is_a_gpm_of_two_numbers_and_not_the_other_way_round() -> None:
    first, second = vectors(1)
    one = torch.ones_like(first)
    lifted = preference_score(torch.cat([one, first], 1), torch.cat([one, second], 1), "gpm")
    assert torch.allclose(lifted, preference_score(first, second, "scalar"))
    angles = torch.tensor([0.0, 2.0, 4.0]) * torch.pi / 3
    cycle = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert (preference_score(cycle, cycle.roll(1, 0), "gpm") > 0.5).all()  # each beats the one before


@pytest.mark.parametrize(("head", "dim", "centring"), [("scalar", 1, 0.0), ("scalar", 1, 0.3), ("gpm", 4, 0.0)])
def test_the_loss_is_the_written_formula_in_value_and_gradient(head, dim, centring) -> None:
    chosen, rejected = (v.requires_grad_() for v in vectors(dim))
    q = torch.tensor([1, 0.5, 0, 0.8, 0.3, 1, 1], dtype=torch.float64)
    m = torch.tensor([0, 0.5, -1, 2, 0, 0.1, 0], dtype=torch.float64)
    found = reward_losses(chosen, rejected, q, m, head=head, smoothing=0.1, centring=centring)
    score = (
        (chosen - rejected)[:, 0] if head == "scalar" else torch.einsum("bi,ij,bj->b", chosen, rotation(dim), rejected)
    )
    p = 1 / (1 + torch.exp(-(score - m)))
    label = 0.9 * q + 0.1 * (1 - q)
    expected = -label * torch.log(p) - (1 - label) * torch.log(1 - p)
    if centring:
        expected = expected + centring * (chosen + rejected)[:, 0] ** 2
    assert torch.allclose(found, expected)
    gradients = [torch.autograd.grad(value.sum(), (chosen, rejected), retain_graph=True) for value in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("wrong", [{"smoothing": 0.2}, {"centring": 0.1}, {"centring": -0.3}, {"smoothing": 0.0}])
def test_another_setting_is_another_loss(wrong) -> None:
    chosen, rejected = vectors(1)
    q, m = torch.ones(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    right = {"smoothing": 0.1, "centring": 0.3}
    assert not torch.allclose(
        reward_losses(chosen, rejected, q, m, **right), reward_losses(chosen, rejected, q, m, **{**right, **wrong})
    )


def test_large_scores_have_finite_losses() -> None:
    big = torch.tensor([[1e4], [-1e4]])
    losses = reward_losses(big, -big, torch.tensor([1.0, 1.0]), torch.zeros(2))
    assert losses.tolist() == [0.0, 2e4]
