"""Noise handling without a model: extrapolated log-probs, the two detectors, the action on flagged pairs."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align_loop.objectives import noise as noise_module
from align_loop.objectives.noise import (
    BatchRankDetector,
    NoiseHandling,
    PaperCodeDetector,
    extrapolated_logprobs,
    shape_flagged,
    token_logprobs,
)
from align_loop.objectives.pair import pair_loss


def some_logits(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(seed))).to(dtype)


LABELS = torch.tensor([[1, 2, 3, -100, -100], [-100, 0, 10, 4, 4], [-100, -100, -100, -100, -100]])


def by_hand(logits: torch.Tensor, row: int, column: int) -> float:
    values = logits[row, column].double().tolist()
    return values[LABELS[row, column]] - math.log(sum(math.exp(v) for v in values))


def test_token_logprobs_equal_the_definition_and_are_0_where_masked() -> None:
    result = token_logprobs(some_logits(0), LABELS)
    for row in range(3):
        for column in range(5):
            expected = by_hand(some_logits(0), row, column) if LABELS[row, column] >= 0 else 0.0
            assert result[row, column].item() == pytest.approx(expected, abs=1e-5)


def test_lambda_0_is_the_policy_and_minus_1_the_reference() -> None:
    policy, reference = some_logits(0), some_logits(1)
    assert torch.equal(extrapolated_logprobs(policy, reference, 0.0, LABELS), token_logprobs(policy, LABELS))
    by_reference = extrapolated_logprobs(policy, reference, -1.0, LABELS)
    assert torch.allclose(by_reference, token_logprobs(reference, LABELS), atol=1e-6)


def test_extrapolation_mixes_logits_at_every_position() -> None:
    policy, reference = some_logits(0), some_logits(1)
    mixed = 1.5 * policy.double() - 0.5 * reference.double()
    result = extrapolated_logprobs(policy, reference, 0.5, LABELS)
    assert result[1, 2].item() == pytest.approx(by_hand(mixed, 1, 2), abs=1e-5)
    assert result[0, 0].item() == pytest.approx(by_hand(mixed, 0, 0), abs=1e-5)


def test_bfloat16_logits_are_mixed_in_float32() -> None:
    policy, reference = some_logits(0, torch.bfloat16), some_logits(1, torch.bfloat16)
    wide = extrapolated_logprobs(policy.float(), reference.float(), 0.5, LABELS)
    assert torch.equal(extrapolated_logprobs(policy, reference, 0.5, LABELS), wide)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = extrapolated_logprobs(some_logits(0), some_logits(1), 0.5, LABELS)
    monkeypatch.setattr(noise_module, "LOGITS_PER_CHUNK", 22)  # two positions at a time
    chunked = extrapolated_logprobs(some_logits(0), some_logits(1), 0.5, LABELS)
    assert torch.allclose(whole, chunked, atol=1e-6)


def test_gradients_flow_through_the_gathered_logprobs() -> None:
    logits = some_logits(0).requires_grad_()
    token_logprobs(logits, LABELS).sum().backward()
    wanted = torch.nn.functional.one_hot(LABELS.clamp(min=0), 11) - logits.detach().softmax(-1)
    assert torch.allclose(logits.grad, wanted * (LABELS >= 0).unsqueeze(-1), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([0.05, 0.1, 0.25, 0.5]), st.lists(st.integers(1, 40), min_size=1))
def test_batch_rule_flags_the_exact_share_of_all_pairs_seen(seed: int, share: float, sizes: list[int]) -> None:
    source, detector, seen, flagged = random.Random(seed), BatchRankDetector(share), 0, 0
    for step, size in enumerate(sizes):
        margins = [source.gauss(step * 0.3, 1) for _ in range(size)]  # margins grow, as they do in training
        flags = detector.flag(margins, [str(i) for i in range(size)])
        seen, flagged = seen + size, flagged + sum(flags)
        assert flagged == round(share * seen)
        low = [m for m, flag in zip(margins, flags, strict=True) if flag]
        high = [m for m, flag in zip(margins, flags, strict=True) if not flag]
        if low and high:
            assert round(max(low), 5) <= round(min(high), 5)


def test_batch_rule_does_not_depend_on_the_order_within_the_batch() -> None:
    margins, ids = [0.3, -0.2, 0.1, 0.0, 0.7, -0.9, 0.2, 0.4], list("hgfedcba")
    flagged = {i for i, flag in zip(ids, BatchRankDetector(0.25).flag(margins, ids), strict=True) if flag}
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    again = BatchRankDetector(0.25).flag([margins[i] for i in order], [ids[i] for i in order])
    assert flagged == {"g", "c"} == {ids[i] for i, flag in zip(order, again, strict=True) if flag}


def test_ties_go_by_id_and_float_noise_counts_as_a_tie() -> None:
    ids = ["d", "b", "a", "c"]
    for noise in ([0.0, 0.0, 0.0, 0.0], [-4e-7, 3e-7, 1e-7, -2e-7]):
        assert BatchRankDetector(0.5).flag(noise, ids) == [False, True, True, False]


def test_batch_rule_continues_from_its_state() -> None:
    margins = [[0.1 * i, -0.3, 0.2] for i in range(7)]
    whole, first = BatchRankDetector(0.1), BatchRankDetector(0.1)
    expected = [whole.flag(row, list("abc")) for row in margins]
    for row in margins[:4]:
        first.flag(row, list("abc"))
    second = BatchRankDetector(0.1)
    second.load_state_dict(first.state_dict())
    assert [second.flag(row, list("abc")) for row in margins[4:]] == expected[4:]
    assert second.state_dict() == whole.state_dict()


def released_rule(batches: list[list[float]], share: float) -> list[list[bool]]:
    """The released code's rule, written down a second time: a FIFO list and a threshold, updated afterwards."""
    window: list[float] = []
    tau, result = 0.0, []
    for batch in batches:
        result.append([m <= tau for m in batch])
        window = (window + [sum(batch) / len(batch)])[-50:]
        if len(window) >= 50:
            s = sorted(window)
            d = int(50 * share)
            tau = (s[d] + s[d + 1]) / 2
    return result


def stationary(size: int, count: int, seed: int = 0) -> list[list[float]]:
    source = random.Random(seed)
    return [[source.gauss(1, 1) for _ in range(size)] for _ in range(count)]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_paper_code_reproduces_the_released_rule(size: int, share: float) -> None:
    batches, detector = stationary(size, 300), PaperCodeDetector(share)
    assert [detector.flag(batch) for batch in batches] == released_rule(batches, share)


@pytest.mark.parametrize(("size", "rate"), [(1, 0.127), (2, 0.21), (4, 0.28), (8, 0.34)])
def test_paper_code_flags_more_than_it_says(size: int, rate: float) -> None:
    detector = PaperCodeDetector(0.1)
    flags = [flag for batch in stationary(size, 6000) for flag in detector.flag(batch)][50 * size :]
    assert sum(flags) / len(flags) == pytest.approx(rate, abs=0.015)


def test_paper_code_continues_from_its_state() -> None:
    batches, whole, first, second = (
        stationary(1, 130),
        PaperCodeDetector(0.1),
        PaperCodeDetector(0.1),
        PaperCodeDetector(0.1),
    )
    expected = [whole.flag(batch) for batch in batches]
    for batch in batches[:70]:
        first.flag(batch)
    second.load_state_dict(first.state_dict())
    assert [second.flag(batch) for batch in batches[70:]] == expected[70:]


def test_smoothing_is_conservative_dpo_on_flagged_pairs_and_dpo_elsewhere() -> None:
    u, flags = torch.tensor([0.7, 0.7, -1.1, -1.1]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    noise = NoiseHandling(action="smooth", alpha=0.1)
    q, w = shape_flagged(torch.ones(4), torch.ones(4), flags, noise)
    plain, flipped = -torch.log(torch.sigmoid(u)), -torch.log(torch.sigmoid(-u))
    assert torch.allclose(w * pair_loss(u, q), torch.where(flags > 0, 0.9 * plain + 0.1 * flipped, plain), atol=1e-6)


def test_smoothing_flips_a_soft_label_with_probability_alpha() -> None:
    q, _ = shape_flagged(torch.tensor([0.8]), torch.ones(1), torch.ones(1), NoiseHandling(alpha=0.25))
    assert q.item() == pytest.approx(0.75 * 0.8 + 0.25 * 0.2)


def test_dropping_gives_flagged_pairs_no_weight() -> None:
    noise = NoiseHandling(action="drop")
    q, w = shape_flagged(torch.tensor([1.0, 0.9]), torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0]), noise)
    assert w.tolist() == [0.0, 3.0] and q.tolist() == pytest.approx([1.0, 0.9])


def test_warmup_ends_after_its_share_of_the_steps() -> None:
    noise = NoiseHandling(alpha=0.1, warmup=0.2)
    assert [noise.alpha_at(step, 10) for step in range(4)] == [0.0, 0.0, 0.1, 0.1]
    assert [noise.active(step, 10) for step in range(4)] == [False, False, True, True]


def test_what_costs_nothing_is_not_enabled() -> None:
    assert not NoiseHandling(action="none").enabled
    assert not NoiseHandling(action="smooth", alpha=0.0).enabled
    assert NoiseHandling(action="drop", alpha=0.0).enabled


def test_lambda_by_iteration_and_none_past_the_end() -> None:
    noise = NoiseHandling(decoupling=[0.5, 0.25])
    assert [noise.decoupling_for(1), noise.decoupling_for(2)] == [0.5, 0.25]
    for iteration in (0, 3):
        with pytest.raises(ValueError, match=f"iteration {iteration}"):
            noise.decoupling_for(iteration)
    assert NoiseHandling().decoupling == [1 / 2, 1 / 4, 1 / 8, 1 / 16]


@pytest.mark.parametrize(
    "wrong",
    [{"action": "flip"}, {"rule": "window"}, {"alpha": 1.5}, {"share": 1.0}, {"warmup": -0.1}, {"decoupling": [-1.0]}],
)
def test_values_out_of_range_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"noise.{next(iter(wrong))}"):
        NoiseHandling(**wrong)
