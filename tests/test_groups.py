"""Groups of scored answers, and the way between scores and comparisons in pairs."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_loop.groups import Group, groups_of, matrix_from_scores, matrix_of, scores_from_matrix, sigmoid

REWARDS = st.lists(st.floats(-4, 4), min_size=0, max_size=6)


@given(REWARDS)
@settings(max_examples=100, deadline=None)
def test_scores_survive_the_way_through_a_matrix(rewards):
    back = scores_from_matrix(matrix_from_scores(rewards))
    mean = sum(rewards) / max(len(rewards), 1)
    assert back == pytest.approx([r - mean for r in rewards], abs=1e-4)


def test_a_matrix_without_an_order_gives_equal_scores():
    circle = [[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]]
    assert scores_from_matrix(circle) == pytest.approx([0, 0, 0])
    certain = scores_from_matrix([[0.5, 1.0], [0.0, 0.5]])
    assert all(map(math.isfinite, certain)) and certain[0] - certain[1] > 10


def test_both_directions_of_a_comparison_are_averaged_and_a_missing_one_is_a_half():
    rows = [
        {"first_sample_id": "a", "second_sample_id": "b", "p_first": 0.9},
        {"first_sample_id": "b", "second_sample_id": "a", "p_first": 0.3},
        {"first_sample_id": "a", "second_sample_id": "gone", "p_first": 0.0},
    ]
    matrix = matrix_of(["a", "b", "c"], rows)
    assert matrix == [
        [0.5, pytest.approx(0.8), 0.5],
        [pytest.approx(0.2), 0.5, 0.5],
        [0.5, 0.5, 0.5],
    ]


def answer(prompt, k):
    return {"sample_id": f"{prompt}{k}", "prompt_id": prompt, "k": k}


def test_groups_are_joined_by_id_in_the_order_of_prompts_and_k():
    prompts = [{"prompt_id": p} for p in ("p", "q", "r")]
    answers = [answer("q", 1), answer("p", 1), answer("q", 0), answer("p", 0)]
    scores = [{"sample_id": s, "reward": r} for s, r in (("q1", 1.0), ("p0", 2.0), ("q0", 3.0))]
    compared = [{"prompt_id": "q", "first_sample_id": "q0", "second_sample_id": "q1", "p_first": 0.2}]
    p, q, r = groups_of(prompts, answers, scores, compared)
    assert ([a["sample_id"] for a in p.answers], p.rewards, p.compared) == (["p0"], [2.0], None)  # p1 has no score
    assert ([a["sample_id"] for a in q.answers], q.rewards) == (["q0", "q1"], [3.0, 1.0])
    assert q.probability(0, 1) == 0.2 and r.answers == []
    assert q.ranked() == [0, 1]


def test_without_comparisons_the_scores_say_how_probable_it_is():
    group = Group({}, [{}, {}, {}], [{"reward": 1.0}, {"reward": 2.0}, {"reward": 2.0}])
    assert group.probability(1, 0) == sigmoid(1.0) == 1 - group.probability(0, 1)
    assert group.ranked() == [1, 2, 0]


@given(st.floats(-1e4, 1e4))
def test_sigmoid_never_overflows(value):
    assert 0 <= sigmoid(value) <= 1 and sigmoid(value) + sigmoid(-value) == pytest.approx(1)
