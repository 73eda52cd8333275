"""Soft labels, margins and weights against hand computation; the pairs that they leave alone."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shape_fixtures import context_of, group, ids_of, pair, shaped

from align_loop.groups import sigmoid
from align_loop.shapers.drop import DropLeastConfident, DropTies
from align_loop.shapers.labels import ConfidenceSmooth, FlipRate, LabelSmoothing, SoftLabel
from align_loop.shapers.margins import Margin, OffsetLogGap
from align_loop.shapers.weights import WeightGap

POINT = pair(90, 1.0, kind="point", rejected=None, rejected_ids=None, score_rejected=None, label=1.0)
# p3's answers were compared: the second is probably better, whatever their scores say; p4's second answer hardly is.
COMPARED = context_of(
    group([5.0, 0.0], 3, compared=[[0.5, 0.2], [0.8, 0.5]]),
    group([1.0, 0.0], 4, compared=[[0.5, 0.999], [0.001, 0.5]]),
    group([1.0, 0.0], 5),
)
SCORED = [pair(3, 5.0), pair(4, 1.0), pair(5, 1.5)]


def column(shaper, rows, name, context=COMPARED):
    kept, gone = shaped(shaper, rows, context)
    assert not gone
    return [row.get(name) for row in kept]


# --- q ----------------------------------------------------------------------------------------------------------


@given(st.floats(0, 0.49), st.floats(0, 1))
@settings(deadline=None)
def test_flips_at_the_rate_are_undone_on_average(rate, truth):
    seen = truth * (1 - rate) + (1 - truth) * rate  # what smoothing by the rate does to a label
    (smoothed,) = column(LabelSmoothing(rate), [pair(0, q=truth)], "q")
    assert smoothed == pytest.approx(seen)
    (back,) = column(FlipRate(rate), [pair(0, q=seen)], "q")
    assert back == pytest.approx(truth, abs=1e-9)


def test_hard_labels_get_the_labels_of_the_papers():
    assert column(FlipRate(0.1), [pair(0), pair(1, q=None), pair(2, q=0.0)], "q") == pytest.approx(
        [1.125, 1.125, -0.125]
    )
    assert column(LabelSmoothing(0.1), [pair(0), pair(1, q=0.0)], "q") == pytest.approx([0.9, 0.1])


@pytest.mark.parametrize("shaper", [FlipRate(0.2, tag="human"), LabelSmoothing(0.2, tag="human")])
def test_a_tag_restricts_them_and_points_have_no_pair_label(shaper):
    before, after = column(shaper, [pair(0), pair(1, tag="human")], "q")
    assert before is None and after in (pytest.approx(0.8), pytest.approx(0.8 / 0.6))
    assert column(type(shaper)(0.2), [POINT], "q") == [None]


def test_only_the_least_confident_are_smoothed():
    rows = [pair(0, 3.0), pair(1, 0.5, q=0.8), pair(2), pair(3, 5.0), pair(4, 1.0)]
    assert column(ConfidenceSmooth(0.25, 0.1), rows, "q") == [None, pytest.approx(0.74), None, None, None]
    by_probability = column(ConfidenceSmooth(0.25, 0.5, by="probability"), rows, "q")
    assert by_probability == [None, 0.8, None, 0.5, None]  # 0.2 of p3's comparison is below sigmoid(0.5)
    assert column(ConfidenceSmooth(0.0, 0.1), rows, "q") == [row.get("q") for row in rows]


def test_soft_labels_are_the_annotators_probabilities():
    rows = [*SCORED, pair(6, q=0.7), POINT]
    assert column(SoftLabel(), rows, "q") == pytest.approx([0.2, 0.999, sigmoid(1.5), 0.7, None])
    assert column(SoftLabel("gap"), rows, "q") == pytest.approx([sigmoid(5.0), sigmoid(1.0), sigmoid(1.5), 0.7, None])
    sharper = column(SoftLabel(temperature=0.5), rows[:3], "q")
    odds = [(0.2 / 0.8) ** 2, 999.0**2, math.exp(3.0)]
    assert sharper == pytest.approx([o / (1 + o) for o in odds])


def test_a_certain_comparison_gives_a_finite_label():
    context = context_of(group([1.0, 0.0], 3, compared=[[0.5, 1.0], [0.0, 0.5]]))
    assert column(SoftLabel(temperature=2.0), [pair(3, 1.0)], "q", context) == [pytest.approx(0.999, abs=1e-4)]


def test_a_pair_turned_round_reads_the_comparison_the_other_way():
    turned = pair(4, 1.0, chosen_sample_id="s4-1", rejected_sample_id="s4-0")
    unknown = pair(4, 1.0, rejected_sample_id="elsewhere", example_id="e005")
    assert column(SoftLabel(), [turned, unknown], "q") == pytest.approx([0.001, sigmoid(1.0)])


# --- m and w ----------------------------------------------------------------------------------------------------


def test_margins_grow_with_the_gap_or_the_vote():
    rows = [*SCORED, pair(6), POINT]
    assert column(Margin(0.5), rows, "m") == [2.5, 0.5, 0.75, None, None]
    votes = [2 * 0.2 - 1, 2 * 0.999 - 1, 2 * sigmoid(1.5) - 1]
    assert column(Margin(2.0, of="vote"), rows, "m") == pytest.approx(
        [2 * votes[0], 2 * votes[1], 2 * votes[2], None, None]
    )


def test_the_offset_is_the_logarithm_of_the_gap():
    rows = [pair(0, math.e), pair(1, 1.0), pair(2, 0.0), pair(3, -1.0), pair(4, m=0.3)]
    kept, gone = shaped(OffsetLogGap(0.5), rows)
    assert [row.get("m") for row in kept] == [pytest.approx(0.5), 0.0, 0.3]
    assert gone == dict.fromkeys(["e002", "e003"], "no gap in favour of the chosen answer")


def test_weights_grow_with_the_gap_and_are_one_on_average():
    rows = [pair(0, 3.0), pair(1, 1.0), pair(2, -1.0), pair(3, w=0.5), POINT]
    assert column(WeightGap(None), rows, "w") == pytest.approx([2.25, 0.75, 0.0, 0.5, None])
    some = column(WeightGap(2.0), rows, "w")
    factors = [sigmoid(1.5), sigmoid(0.5), sigmoid(-0.5)]
    assert some[:3] == pytest.approx([f / sum(factors) * 3 for f in factors]) and some[3:] == [0.5, None]
    assert column(WeightGap(None), [pair(0, 1.0, w=0.5), pair(1, 3.0)], "w") == [0.25, 1.5]  # on top of a weight
    assert column(WeightGap(None), [pair(0, 0.0), pair(1, -1.0)], "w") == [None, None]
    assert column(WeightGap(), [pair(0)], "w") == [None]


# --- confidence filters -----------------------------------------------------------------------------------------


def test_ties_and_near_ties():
    rows = [pair(0, 0.0), pair(1, 0.5), pair(2, -0.5), pair(3, 0.6), pair(4), POINT]
    assert list(shaped(DropTies(), rows)[1]) == ["e000"]
    assert list(shaped(DropTies(0.5), rows)[1]) == ["e000", "e001", "e002"]


def test_the_least_confident_by_comparison_and_below_a_minimum():
    rows = [*SCORED, pair(6), POINT]
    assert list(shaped(DropLeastConfident(1 / 3), rows, COMPARED)[1]) == ["e004"]
    assert list(shaped(DropLeastConfident(1 / 3, by="probability"), rows, COMPARED)[1]) == ["e003"]
    assert list(shaped(DropLeastConfident(minimum=1.5), rows, COMPARED)[1]) == ["e004"]
    kept, gone = shaped(DropLeastConfident(1 / 3, by="probability", minimum=0.9), rows, COMPARED)
    assert list(gone) == ["e003", "e005"] and ids_of(kept) == ["e004", "e006", "e090"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlipRate(0.5), "FlipRate.rate=0.5"),
        (lambda: LabelSmoothing(0.6), "LabelSmoothing.rate=0.6"),
        (lambda: ConfidenceSmooth(1.0), "ConfidenceSmooth.share=1.0"),
        (lambda: ConfidenceSmooth(rate=2), "ConfidenceSmooth.rate=2"),
        (lambda: SoftLabel(temperature=0), "SoftLabel.temperature=0"),
        (lambda: Margin(0.0), "Margin.scale=0.0"),
        (lambda: OffsetLogGap(-1), "OffsetLogGap.alpha=-1"),
        (lambda: WeightGap(0.0), "WeightGap.temperature=0.0"),
        (lambda: DropTies(-1), "DropTies.minimum=-1"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
