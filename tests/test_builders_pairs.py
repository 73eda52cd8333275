"""Builders of pairs: hand-computed choices, and what holds for any scores."""

from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shape_fixtures import group

from align_loop.builders.best import BestMinOfK, BestMu2s, BestRandom
from align_loop.builders.best_worst import BestWorst
from align_loop.builders.construct import ConstructPair
from align_loop.builders.pair import NO_ANSWER, ONE_ANSWER, TIE
from align_loop.builders.ranked import TOO_FEW, AllPairs, RankedPairs

REWARDS = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 2.0, 3.0]), max_size=6)
GROUPS = st.lists(REWARDS, max_size=6).map(lambda many: [group(rewards, i) for i, rewards in enumerate(many)])
BUILDERS = [
    BestWorst(),
    BestMu2s(),
    BestMu2s(0.0),
    BestMinOfK(2),
    BestRandom(),
    RankedPairs(),
    RankedPairs(2),
    AllPairs(),
    AllPairs(2),
]


def places(builder, rewards, seed=0, i=0):
    """(chosen, rejected) as places in the list of rewards."""
    pairs, _ = builder.build([group(rewards, i)], seed)
    return [tuple(int(p[f"{s}_sample_id"].split("-")[1]) for s in ("chosen", "rejected")) for p in pairs]


@pytest.mark.parametrize("builder", BUILDERS, ids=repr)
@given(groups=GROUPS, seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_better_answer_is_chosen_and_every_prompt_accounted_for(builder, groups, seed):
    pairs, dropped = builder.build(groups, seed)
    assert len({p["prompt_id"] for p in pairs}) + sum(dropped.values()) == len(groups)
    assert all(p["score_chosen"] > p["score_rejected"] for p in pairs)
    assert len({p["example_id"] for p in pairs}) == len(pairs)
    order = [g.prompt["prompt_id"] for g in groups]
    assert [order.index(p["prompt_id"]) for p in pairs] == sorted(order.index(p["prompt_id"]) for p in pairs)
    backwards, counts = builder.build(groups[::-1], seed)  # chance is by prompt, not by position
    assert sorted(backwards, key=str) == sorted(pairs, key=str) and counts == dropped


@given(st.lists(st.integers(-20, 20), min_size=3, max_size=12))
@settings(max_examples=100, deadline=None)
def test_two_deviations_below_the_mean_is_the_nearest_there_is(rewards):
    rewards = [float(r) for r in rewards]
    for chosen, rejected in places(BestMu2s(), rewards):
        assert rewards[chosen] == max(rewards)
        target = fmean(rewards) - 2 * pstdev(rewards)
        worse = [r for r in rewards if r < max(rewards)]
        assert abs(rewards[rejected] - target) == min(abs(r - target) for r in worse)


def test_by_hand_the_outlier_is_not_taken():
    rewards = [4.0, 0.0, 1.0, 0.0, 1.0, -0.5, 0.0, 1.0, 0.0, -8.0]  # mean -0.15, sd 2.89: target -5.93
    assert places(BestMu2s(), rewards) == [(0, 9)]
    assert places(BestMu2s(1.0), rewards) == [(0, 5)]  # target -3.04, from which -0.5 is the nearer one
    assert places(BestMu2s(-1.0), [4.0, 3.0, 0.0]) == [(0, 1)]


def test_the_worst_of_k_random_ones():
    rewards = [float(r) for r in range(8)]
    of_all = {places(BestMinOfK(7), rewards, i=i)[0] for i in range(20)}
    assert of_all == {(7, 0)} == {places(BestMinOfK(99), rewards, i=i)[0] for i in range(20)}
    of_one = [places(BestMinOfK(1), rewards, i=i)[0][1] for i in range(200)]
    assert set(of_one) == set(range(7)) and fmean(of_one) == pytest.approx(3, abs=0.5)
    of_three = [places(BestMinOfK(3), rewards, i=i)[0][1] for i in range(200)]
    assert set(of_three) == set(range(5)) and fmean(of_three) == pytest.approx(1, abs=0.3)  # E min of 3 of 0..6 is 1
    assert of_one != [places(BestMinOfK(1), rewards, seed=1, i=i)[0][1] for i in range(200)]


def test_a_random_one_is_any_of_the_worse_ones():
    drawn = [places(BestRandom(), [1.0, 5.0, 2.0, 5.0], i=i)[0] for i in range(60)]
    assert set(drawn) == {(1, 0), (1, 2)}  # never the other one that scores 5


def test_neighbours_in_the_ranking():
    rewards = [1.0, 4.0, 2.0, 3.0]
    assert places(RankedPairs(), rewards) == [(1, 3), (3, 2), (2, 0)]
    assert places(RankedPairs(2), rewards) == [(1, 2), (3, 0)]
    assert places(RankedPairs(), [1.0, 1.0, 0.0, 0.0]) == [(1, 2)]
    assert RankedPairs(3).build([group([1.0, 0.0])], 0) == ([], {TOO_FEW: 1})


def test_all_pairs_and_a_limit():
    rewards = [1.0, 4.0, 1.0, 3.0]
    every = places(AllPairs(), rewards)
    assert every == [(1, 3), (1, 0), (1, 2), (3, 0), (3, 2)]
    some = [places(AllPairs(2), rewards, i=i) for i in range(60)]
    assert all(len(two) == 2 and set(two) <= set(every) for two in some)
    assert {p for two in some for p in two} == set(every)
    assert [sorted(two, key=every.index) for two in some] == some
    assert some != [places(AllPairs(2), rewards, seed=1, i=i) for i in range(60)]


def test_each_reason_for_no_pair():
    groups = [group(rewards, i) for i, rewards in enumerate([[], [1.0], [1.0, 1.0], [2.0, 1.0]])]
    for builder in BUILDERS:
        pairs, dropped = builder.build(groups, 0)
        expected = {NO_ANSWER: 1, ONE_ANSWER: 1, TIE: 1}
        if builder == RankedPairs(2):
            assert (pairs, dropped) == ([], expected | {TOO_FEW: 1})
        else:
            assert len(pairs) == 1 and dropped == expected


# --- by construction --------------------------------------------------------------------------------------------


def test_the_order_is_that_of_the_variants_and_not_of_the_scores():
    made = group([0.0, 9.0, 1.0, 5.0], variants={1: "rude", 3: "rude"})
    pairs, dropped = ConstructPair(None, "rude").build([made], 0)
    assert not dropped
    assert [(p["chosen_sample_id"], p["rejected_sample_id"]) for p in pairs] == [("s0-0", "s0-1"), ("s0-2", "s0-3")]
    assert [(p["score_chosen"], p["score_rejected"]) for p in pairs] == [(0.0, 9.0), (1.0, 5.0)]
    (other,), _ = ConstructPair("rude").build([group([0.0, 0.0, 0.0], variants={2: "rude"})], 0)
    assert (other["chosen_sample_id"], other["rejected_sample_id"]) == ("s0-2", "s0-0")


def test_prompts_that_lack_a_variant():
    groups = [group([1.0, 2.0], 0), group([1.0], 1, variants={0: "kind"}), group([], 2)]
    pairs, dropped = ConstructPair("kind").build(groups, 0)
    assert pairs == []
    assert dropped == {"no answer of variant kind": 1, "no answer of variant plain": 1, NO_ANSWER: 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstructPair("a", "a"), "ConstructPair.better=a"),
        (lambda: ConstructPair(None), "two variants"),
        (lambda: BestMinOfK(0), "BestMinOfK.k=0"),
        (lambda: RankedPairs(0), "RankedPairs.gap=0"),
        (lambda: AllPairs(0), "AllPairs.limit=0"),
        (lambda: BestMu2s(float("nan")), "BestMu2s.deviations=nan"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
