"""Baselines and beta-DPO's statistics: against plain formulas, over several batches, from a checkpoint."""

from __future__ import annotations

import math

import pytest
import torch
from algebra import N, batch_of, numbers, sigmoid

from align_loop.objectives.objective import Objective
from align_loop.objectives.terms import PairTerm, PointTerm
from align_loop.objectives.trackers import AdaptiveBeta, Baseline, BetaTracker

B = 0.3


def settled(tracker: Baseline, batches: list[list[float]]) -> list[float]:
    values = []
    for batch in batches:
        tracker.settle(list(range(len(batch))), torch.tensor([[v, math.nan] for v in batch], dtype=torch.float64))
        values.append(tracker.value)
    return values


def test_the_baseline_of_a_batch_and_of_all_batches() -> None:
    batches = [[1.0, 3.0], [-7.0, -5.0, -3.0], []]
    assert settled(Baseline("batch", "log_ratio", None), batches) == [2.0, -5.0, 0.0]
    assert settled(Baseline("batch", "log_ratio", 0.0), batches) == [2.0, 0.0, 0.0]
    assert settled(Baseline("running", "log_ratio", None), batches) == [2.0, -11 / 5, -11 / 5]
    assert settled(Baseline("running", "log_ratio", None), [[]]) == [0.0]


def test_both_answers_of_pairs_count() -> None:
    batch, x = batch_of(), numbers(batch_of())
    term = PointTerm(loss="bco")
    tracker = term.tracker()
    tracker.settle(batch.index.tolist(), tracker.measure(batch).detach())
    assert tracker.value == pytest.approx((x.p - x.r).mean().item())
    good, bad = B * (x.pw - x.rw) - B * tracker.value, B * (x.pl - x.rl) - B * tracker.value
    found = Objective(B, {"t": term}).losses(batch, {"t": tracker})["t"]
    assert torch.allclose(found, -torch.log(sigmoid(good)) - torch.log(sigmoid(-bad)))


def test_only_ktos_baseline_is_clamped_and_each_loss_has_its_papers() -> None:
    rules = {loss: PointTerm(loss=loss) for loss in ("kto", "bco", "dro", "npo")}
    assert [term.baseline for term in rules.values()] == ["mismatch", "running", "head", "none"]
    assert (rules["kto"].tracker().reads, rules["kto"].tracker().floor) == ("mismatch", 0.0)
    assert (rules["bco"].tracker().reads, rules["bco"].tracker().floor) == ("examples", None)
    assert rules["dro"].tracker() is None and rules["dro"].needs_value and not rules["npo"].needs_value


def beta_tracker(**fields: float) -> BetaTracker:
    return PairTerm(adaptive=AdaptiveBeta(**fields)).tracker()


def settle(tracker: BetaTracker, gaps: list[float]) -> BetaTracker:
    tracker.settle([10 + i for i in range(len(gaps))], torch.tensor(gaps, dtype=torch.float64)[:, None])
    return tracker


def test_beta_follows_the_batch() -> None:
    """All pairs kept: b0 (1 + a (mean - M)) against M before the batch, which the first batch sets itself."""
    tracker = settle(beta_tracker(alpha=0.5, keep=1.0, momentum=0.9), [1.0, 2.0, 3.0])
    assert (tracker.factor, tracker.mean, tracker.kept) == (1.0, 2.0, {10, 11, 12})
    settle(tracker, [4.0, 6.0])
    assert tracker.factor == pytest.approx(1 + 0.5 * (5 - 2)) and tracker.mean == pytest.approx(0.9 * 2 + 0.1 * 5)
    assert tracker.deviation == pytest.approx(0.9 * math.sqrt(2 / 3) + 0.1 * 1)
    settle(tracker, [-90.0])
    assert tracker.betas(torch.tensor([0.1])).tolist() == pytest.approx([1e-3])  # never below the floor


def test_outlying_pairs_are_left_out_and_the_mean_is_over_the_kept() -> None:
    gaps = [0.1 * i for i in range(-4, 4)] + [300.0, -300.0]
    tracker = beta_tracker(keep=0.8)
    tracker.mean, tracker.deviation = 0.0, 1.0
    settle(tracker, gaps)
    assert tracker.kept == set(range(10, 18))
    assert tracker.weights(torch.arange(10, 20)).tolist() == [1.25] * 8 + [0.0] * 2
    drawn = [settle(tracker, [0.0] * 10).kept for _ in range(3)]
    assert all(len(kept) == 8 for kept in drawn) and len({frozenset(kept) for kept in drawn}) > 1


def test_the_draw_follows_the_gaussian_weights() -> None:
    """Two pairs, one kept: the nearer one with probability 1 / (1 + exp(-d^2/2)), here d = 1."""
    count = 0
    for batch in range(2000):
        tracker = beta_tracker(keep=0.5)
        tracker.mean, tracker.deviation, tracker.batches = 0.0, 1.0, batch
        count += 10 in settle(tracker, [0.0, 1.0]).kept
    assert count / 2000 == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.03)


def test_the_loss_uses_the_steps_beta_and_the_kept_pairs() -> None:
    batch, x = batch_of(), numbers(batch_of())
    term = PairTerm(adaptive=AdaptiveBeta(keep=0.5, alpha=0.4), beta_rejected=0.2)
    tracker = term.tracker()
    gap = x.pw - x.rw - x.pl + x.rl
    assert torch.allclose(tracker.measure(batch)[:, 0], gap)
    tracker.mean, tracker.deviation = 0.0, 1.0
    tracker.settle(batch.index.tolist(), gap.detach()[:, None])
    kept = torch.tensor([i in tracker.kept for i in range(N)])
    factor = 1 + 0.4 * gap[kept].mean()
    u = factor * (B * (x.pw - x.rw) - 0.2 * (x.pl - x.rl))
    found = Objective(B, {"t": term}).losses(batch, {"t": tracker})["t"]
    assert torch.allclose(found, -2 * kept * torch.log(sigmoid(u))) and kept.sum() == 3


@pytest.mark.parametrize("fields", [{"alpha": 0.1}, {"keep": 0.5}, {"momentum": 0.1}, {"floor": 2.0}])
def test_no_field_is_dead(fields: dict) -> None:
    found = []
    for given in ({}, fields):
        tracker = beta_tracker(**given)
        settle(tracker, [0.0, 1.0, 2.0, 5.0])
        settle(tracker, [1.0, 1.0, 3.0, 5.0])
        settle(tracker, [1.0, 1.0, 3.0, 6.0])
        found.append((tracker.betas(torch.tensor([0.1])).tolist(), tracker.kept))
    assert found[0] != found[1]


def test_a_tracker_continues_from_its_state() -> None:
    first = settle(settle(beta_tracker(), [0.0, 1.0, 2.0, 5.0]), [1.0, 1.0, 3.0, 5.0])
    again = beta_tracker()
    again.load_state_dict(first.state_dict())
    for tracker in (first, again):
        settle(tracker, [0.5, 0.7, 1.5, 9.0])
    assert (first.factor, first.kept, first.mean) == (again.factor, again.kept, again.mean)
    one, other = Baseline("running", "log_ratio", None), Baseline("running", "log_ratio", None)
    settled(one, [[1.0, 3.0]])
    other.load_state_dict(one.state_dict())
    assert settled(one, [[5.0]]) == settled(other, [[5.0]]) == [3.0]
