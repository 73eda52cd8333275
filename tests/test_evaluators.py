"""Statistics against known values, the metrics of hand-made rows, and a drift guard that trips when it should."""

import json
import math
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_llama

from align_loop.annotators.implicit_reward import answer_logprobs
from align_loop.builders.stage import DROPPED
from align_loop.evaluators import pairs
from align_loop.evaluators.drift import DriftGuard, implausible_share
from align_loop.evaluators.policy import evaluate, measure, read_evaluation
from align_loop.evaluators.statistics import (
    Z95_ONE_SIDED,
    distinct_n,
    mean_interval,
    paired_upper_bound,
    precision_recall,
    wilson_interval,
    win_rate,
)
from align_loop.record import ANSWERS, EXAMPLES, FLAGS, GOLD, PREFERENCES, write_table
from align_loop.render import Renderer
from align_loop.stage import StageContext

# --- statistics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (0, 0, 0, 1)],
)  # 81 of 263: Newcombe (1998), table I
def test_wilson(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx([low, high], abs=1e-4)


def test_wilson_narrows_with_less_certainty():
    wide, narrow = wilson_interval(20, 50), wilson_interval(20, 50, Z95_ONE_SIDED)
    assert wide[0] < narrow[0] < 0.4 < narrow[1] < wide[1]


def test_mean_interval():
    mean, (low, high) = mean_interval([0.0, 1.0])
    assert mean == 0.5 and high - 0.5 == pytest.approx(1.959964 * math.sqrt(0.5) / math.sqrt(2))
    assert low == pytest.approx(1 - high)
    assert mean_interval([3.0]) == (3.0, [-math.inf, math.inf])


def test_paired_upper_bound():
    before, now = [1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]  # differences -1, 0, 0, -1
    assert paired_upper_bound(before, now) == pytest.approx(-0.5 + 1.644854 * math.sqrt(1 / 3) / 2, abs=1e-6)
    assert paired_upper_bound([1.0], [0.0]) == math.inf
    assert paired_upper_bound([1, 0, 1], [1, 0, 1]) == 0


def test_distinct_n():
    assert distinct_n([[1, 2, 1, 2], [1, 2]]) == 2 / 4  # (1 2) thrice and (2 1), not across answers
    assert distinct_n([[1, 2, 3]], 3) == 1 and distinct_n([[1, 1], [1, 1]]) == 0.5
    assert distinct_n([[1], []]) is None and distinct_n([]) is None


SCORES = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([0.0, 0.5, 1.0]))


@given(SCORES, SCORES)
def test_what_one_wins_the_other_loses(ours, theirs):
    one, other = win_rate(ours, theirs), win_rate(theirs, ours)
    if not ours.keys() & theirs.keys():
        assert one is None and other is None
    else:
        assert one + other == pytest.approx(1) and 0 <= one <= 1


def test_win_rate():
    assert win_rate({"a": 1, "b": 0, "c": 1, "x": 9}, {"a": 0, "b": 0, "c": 2, "y": 0}) == pytest.approx(1.5 / 3)


def test_precision_recall():
    assert precision_recall({"a", "b", "c"}, {"c", "d"}) == (1 / 3, 1 / 2)
    assert precision_recall(set(), {"a"}) == (None, 0) and precision_recall({"a"}, set()) == (0, None)


# --- the metrics of a policy ------------------------------------------------------------------------------------

ANSWER_ROWS = [
    {"prompt_id": "p", "token_ids": [5, 6, 2], "finish_reason": "stop"},
    {"prompt_id": "q", "token_ids": [5], "finish_reason": "length"},
]
HELDOUT = [{"example_id": e} for e in "abc"]
LOGPS = {  # two answers, then chosen and rejected of a, b, c
    "policy": [-1.0, -2.0, -3.0, -9.0, -5.0, -5.0, -4.0, -4.0],
    "initial": [-2.0, -2.5, -4.0, -8.0, -5.0, -6.0, -4.0, -4.0],
}


def test_measure():
    gold = {"gold": {"p": 1.0, "q": 0.5}, "gold_initial": {"p": 0.5, "q": 0.5}, "gold_previous": {"p": 1.0, "q": 1.0}}
    metrics = measure(ANSWER_ROWS, HELDOUT, LOGPS, gold)
    assert metrics["heldout"] == {"a": 1.0, "b": 0.0, "c": 0.0}  # rewards 1 > -1, 0 < 1, and 0 = 0 is no preference
    assert metrics["judge_accuracy"] == pytest.approx(1 / 3)
    assert metrics["judge_accuracy_ci95"] == wilson_interval(1, 3)
    assert (metrics["gold_reward"], metrics["win_rate_vs_sft"], metrics["win_rate_vs_previous"]) == (0.75, 0.75, 0.25)
    assert metrics["gold_reward_ci95"] == mean_interval([1.0, 0.5])[1]
    assert (metrics["mean_answer_tokens"], metrics["truncated_share"], metrics["distinct_2"]) == (2, 0.5, 1)
    assert metrics["kl_from_initial"] == pytest.approx((1.0 + 0.5) / 2)  # of the policy's own answers alone
    assert metrics["logp_chosen"] == pytest.approx(-4) and metrics["logp_rejected"] == pytest.approx(-6)
    assert metrics["initial_logps"] == {"p": pytest.approx(-2 / 3), "q": -2.5} and metrics["answers"] == 2
    json.dumps(metrics, allow_nan=False)


def test_what_is_not_known_is_null():
    same = {"policy": LOGPS["initial"], "initial": LOGPS["initial"]}
    metrics = measure(ANSWER_ROWS, HELDOUT, same, {})
    assert metrics["judge_accuracy"] is None and metrics["heldout"] == {}  # the initial policy has no rewards
    assert metrics["gold_reward"] is None and metrics["win_rate_vs_sft"] is None and metrics["kl_from_initial"] == 0
    nothing = measure([], [], {"policy": [], "initial": []}, {})
    assert {k: v for k, v in nothing.items() if v is not None} == {"heldout": {}, "answers": 0, "initial_logps": {}}
    only_answers = measure(ANSWER_ROWS, [], {k: v[:2] for k, v in LOGPS.items()}, {"gold": {"p": 1.0}})
    assert only_answers["logp_chosen"] is None and only_answers["win_rate_vs_sft"] is None


def test_the_stage_measures_with_the_scorer_of_the_judge(tmp_path):
    policy, initial = tiny_llama(tmp_path / "a", seed=1), tiny_llama(tmp_path / "b", seed=2)
    messages = [{"role": "user", "content": "w8"}]
    answers = [
        {"sample_id": "s", "prompt_id": "p", "text": "", "prompt_token_ids": [1, 4, 8, 5], "token_ids": [9, 2]}
        | {"finish_reason": "stop"}
    ]
    heldout = [{"example_id": "e", "prompt_id": "p", "messages": messages, "chosen": "w9 w10", "rejected": "w11"}]
    for name in ("answers", "gold", "out"):
        (tmp_path / name).mkdir()
    write_table(tmp_path / "answers" / "answers.parquet", answers, ANSWERS)
    write_table(tmp_path / "gold" / "gold.parquet", [{"sample_id": "s", "prompt_id": "p", "gold": 0.5}], GOLD)
    write_table(tmp_path / "heldout.parquet", heldout, PREFERENCES)
    context = StageContext("evaluate", tmp_path / "out", hardware={"device": "cpu"}, quiet=True)
    config = {"evaluator": {"_target_": "align_loop.evaluators.policy.PolicyEvaluator"}, "dtype": "float32"}
    inputs = {"policy": policy, "initial": initial, "answers": tmp_path / "answers"}
    inputs |= {"heldout": tmp_path / "heldout.parquet", "gold": tmp_path / "gold", "gold_initial": tmp_path / "gold"}
    evaluate(config, inputs, context)
    found = read_evaluation(tmp_path / "out")
    ids = Renderer(policy).answer_ids
    sides = [answers[0] | {"token_ids": ids(text)} for text in ("w9 w10", "w11")]
    (own, chosen, rejected), start = (
        answer_logprobs(m, [answers[0], *sides], "float32", context) for m in (policy, initial)
    )
    assert found["kl_from_initial"] == pytest.approx(own - start[0], abs=1e-4)
    assert (found["logp_chosen"], found["logp_rejected"]) == pytest.approx((chosen, rejected), abs=1e-4)
    assert found["heldout"] == {"e": float(chosen - start[1] > rejected - start[2])}
    assert (found["gold_reward"], found["win_rate_vs_sft"]) == (0.5, 0.5)


# --- labels and flags against gold ------------------------------------------------------------------------------


def example(name, chosen, rejected, **more):
    return {"example_id": name, "gold_chosen": chosen, "gold_rejected": rejected, **more}


EXAMPLE_ROWS = [
    example("right", 1.0, 0.5),
    example("wrong", 0.5, 1.0),
    example("wrong2", 0.0, 1.0),
    example("draw", 0.5, 0.5),
    example("unknown", None, None),
]


def flag(name, flagged, active=True):
    return {"example_id": name, "step": 1, "detector_margin": 0.0, "flagged": flagged, "alpha_active": active}


def test_labels_and_flags_on_disk(tmp_path):
    for name in ("pairs", "train"):
        (tmp_path / name).mkdir()
    gone = [
        example("x", 0.0, 1.0, reason="tie"),
        example("y", 1.0, 0.0, reason="tie"),
        example("z", 1.0, 1.0, reason="c"),
    ]
    flags = [flag("wrong2", False, active=False), flag("right", True), flag("wrong", True), flag("draw", False)]
    flags += [flag("unknown", False)]
    write_table(tmp_path / "pairs" / "examples.parquet", EXAMPLE_ROWS, EXAMPLES)
    write_table(tmp_path / "pairs" / "dropped.parquet", gone, DROPPED)
    write_table(tmp_path / "train" / "flags.parquet", flags, FLAGS)
    metrics = pairs.measure_pairs(tmp_path / "pairs", tmp_path / "train")
    assert metrics["pairs"] == 5 and metrics["label_accuracy"] == pytest.approx(1 / 3)  # a draw is no label
    assert metrics["filter_dropped"] == {"tie": 2, "c": 1} and metrics["filter_precision"] == pytest.approx(1 / 3)
    assert metrics["flag_share"] == 0.5 and metrics["flag_precision"] == 0.5
    assert metrics["flag_recall"] == 1  # wrong2 was only seen during the warm-up, when nothing may be flagged
    assert "flag_share" not in pairs.measure_pairs(tmp_path / "pairs", None)


def test_without_gold_nothing_is_claimed():
    rows = [example("a", None, None)]
    assert pairs.label_accuracy(rows) is None and pairs.wrong_labels(rows) == set()
    found = pairs.measure_flags(rows, [flag("a", True)])
    assert found == {"flag_share": 1.0, "flag_precision": None, "flag_recall": None}
    assert pairs.measure_flags(rows, [])["flag_share"] is None


# --- the drift guard --------------------------------------------------------------------------------------------


def state(right, total=50, cut=0.1, distinct=0.4, implausible=0.0):
    heldout = {f"e{i:02}": float(i < right) for i in range(total)}
    answers = {"truncated_share": cut, "distinct_2": distinct, "implausible_share": implausible, "answers": 128}
    return {"heldout": heldout, **answers}


NO_ANSWERS = {"truncated_share": None, "distinct_2": None, "implausible_share": None, "answers": 0}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (state(40), state(25), "fell from 0.80 to 0.50"),  # the paired bound
        (state(19), state(18), "worse than a coin"),  # no fall, and yet below one half
        (state(34), state(34, cut=0.51), "51% of the answers are cut"),
        (state(34), state(34, distinct=0.19), "distinct-2 fell from 0.400 to 0.190"),
        (state(34, cut=None, distinct=None), state(34, cut=0.6, distinct=None), "cut"),
        ({**state(0), "heldout": {}}, state(34, distinct=0.1), "distinct-2"),  # no labels to judge by
        (state(34), state(34), None),
        (state(34), state(50), None),
        (state(34), state(30), None),  # a little lower than before
        (state(34), state(33, cut=0.5, distinct=0.2), None),  # on the border of each
        (state(26), state(25), None),  # a judge no better than a coin is not yet worse
        (state(34), state(34, implausible=21 / 128), "hardly give 16% of the answers (95 % bound: 12%)"),
        (state(34), state(34, implausible=16 / 128), None),  # more than a tenth, but that may be chance
        ({**state(0), "heldout": {}}, {"heldout": {}, **NO_ANSWERS}, None),
    ],
)
def test_what_trips_the_guard(before, now, said):
    found = DriftGuard().check(before, now)
    assert found is None if said is None else said in found


def test_the_implausible_share_is_measured_on_the_initial_policys_own_answers():
    own = {f"p{i}": -i / 100 for i in range(201)}  # its 1 % quantile: the third lowest, -1.98
    assert implausible_share(own, own) == pytest.approx(2 / 201)
    assert implausible_share(own, {"p1": -1.98, "p2": -1.985, "p3": 0.0, "p4": -50.0}) == 0.5
    assert implausible_share(own, {}) is None and implausible_share({}, own) is None


@pytest.mark.parametrize("field", ["margin", "most_cut", "least_distinct", "most_implausible"])
def test_the_guards_limits_are_shares(field):
    with pytest.raises(ValueError, match=f"guard.{field}=1.5 must be in"):
        DriftGuard(**{field: 1.5})
    before, now = state(40), state(25, cut=0.6, distinct=0.1, implausible=0.5)
    others = {"margin": 1, "most_cut": 1, "least_distinct": 0, "most_implausible": 1}
    assert DriftGuard(**others).check(before, now) is None
    assert DriftGuard(**{k: v for k, v in others.items() if k != field}).check(before, now) is not None


def test_a_fall_within_the_margin_never_trips_however_certain():
    before, now = state(4000, total=5000), state(3800, total=5000)  # -0.04, and the bound is close to it
    assert paired_upper_bound(list(before["heldout"].values()), list(now["heldout"].values())) < -0.03
    assert DriftGuard().check(before, now) is None
    assert DriftGuard().check(before, state(3600, total=5000)) is not None  # -0.08


def test_labels_are_compared_one_by_one():
    before, now = state(40), state(30)
    now["heldout"] = {f"other{i}": 0.0 for i in range(5)} | now["heldout"]  # labels that were not judged before
    assert DriftGuard().check(before, now) == DriftGuard().check(before, state(30)) is not None


def test_healthy_rounds_seldom_trip_the_guard():
    """Judge accuracy 0.68 before and after, 50 labels drawn anew each time, which is the noisiest case there is.

    Of 20,000 such rounds 1.9 % trip, and of runs of four rounds 5.6 %; asserted here, for 3,000 rounds: less than
    3 %. A guard without its margin and bound ("lower than before") would trip in almost half.
    """
    rng = random.Random(0)

    def drawn():
        return {**state(0), "heldout": {f"e{i}": float(rng.random() < 0.68) for i in range(50)}}

    rounds = [SimpleNamespace(before=drawn(), now=drawn()) for _ in range(3000)]
    trips = sum(DriftGuard().check(r.before, r.now) is not None for r in rounds)
    lower = sum(sum(r.now["heldout"].values()) < sum(r.before["heldout"].values()) for r in rounds)
    assert 0 < trips / 3000 < 0.03 and lower / 3000 > 0.4
    collapsed = [{e: float(rng.random() < 0.4) for e in r.now["heldout"]} for r in rounds[:500]]
    seen = sum(
        DriftGuard().check(r.before, r.now | {"heldout": c}) is not None
        for r, c in zip(rounds, collapsed, strict=False)
    )
    assert seen / 500 > 0.6  # a collapse to 0.4, as it was seen at a learning rate three times too high
