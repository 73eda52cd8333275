"""Filters that compare examples: lengths, repeats, prompts, budgets, plausibility."""

from statistics import fmean

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shape_fixtures import context_of, group, ids_of, pair, shaped, shuffled

from align_loop.shapers.context import ShapeContext
from align_loop.shapers.filters import BudgetSelect, Deduplicate, DropImplausible, LengthRules, Rip
from align_loop.shapers.rows import quantile, swapped

POINT = pair(90, 1.0, kind="point", rejected=None, rejected_ids=None, score_rejected=None, label=1.0)


def lengths(i, chosen, rejected, gap=None, **fields):
    return pair(i, gap, chosen_ids=[7] * chosen, rejected_ids=[8] * rejected, **fields)


@pytest.mark.parametrize(
    ("shaper", "chosen", "rejected", "reason"),
    [
        (LengthRules(), 0, 99, None),
        (LengthRules(min_tokens=3), 3, 4, None),
        (LengthRules(min_tokens=3), 4, 2, "answer too short"),
        (LengthRules(max_tokens=4), 4, 4, None),
        (LengthRules(max_tokens=4), 1, 5, "answer too long"),
        (LengthRules(max_ratio=2), 2, 4, None),
        (LengthRules(max_ratio=2), 2, 5, "answers of too different length"),
        (LengthRules(max_ratio=2), 5, 2, "answers of too different length"),
        (LengthRules(max_ratio=2), 3, 0, "answers of too different length"),
        (LengthRules(max_chosen_ratio=1), 5, 5, None),
        (LengthRules(max_chosen_ratio=1), 1, 5, None),
        (LengthRules(max_chosen_ratio=1), 6, 5, "chosen answer too much longer"),
        (LengthRules(max_chosen_ratio=0.5), 3, 5, "chosen answer too much longer"),
    ],
)
def test_length_rules(shaper, chosen, rejected, reason):
    _, gone = shaped(shaper, [lengths(0, chosen, rejected), POINT])
    assert gone == ({"e000": reason} if reason else {})


def test_repeats_go_and_the_smallest_id_stays():
    same = {name: pair(0)[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    rows = [pair(5, **same), pair(0), pair(3, **same), pair(1), pair(2, prompt_ids=same["prompt_ids"])]
    point = POINT | {"prompt_ids": same["prompt_ids"], "chosen_ids": same["chosen_ids"]}
    other_way = swapped(pair(0)) | {"example_id": "e099"}
    bad = point | {"example_id": "e091", "label": -1.0}
    rows += [other_way, point, bad, bad | {"example_id": "e092"}]
    _, gone = shaped(Deduplicate(), rows)
    assert gone == dict.fromkeys(["e005", "e003", "e092"], "repeats another example's answers")
    assert shaped(Deduplicate(), shuffled(rows))[1] == gone
    kept, gone = shaped(Deduplicate("prompt"), rows)
    assert ids_of(kept) == ["e000", "e001"] and set(gone.values()) == {"repeats another example's prompt"}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), st.floats(0, 1))
def test_quantiles_are_numpys(values, share):
    assert quantile(values, share) == pytest.approx(numpy.quantile(values, share), rel=1e-9, abs=1e-6)


def test_rip_by_hand():
    # rejected rewards 1 2 3 4 5, lengths 5 4 3 2 1, gaps 1 5 2 9 3
    given = [(1, 5, 1), (2, 4, 5), (3, 3, 2), (4, 2, 9), (5, 1, 3)]
    rows = [lengths(i, 3, n, score_chosen=r + g, score_rejected=r) for i, (r, n, g) in enumerate(map(floats, given))]
    rows += [pair(7), POINT]
    low, short, wide = "rejected answer scores too low", "rejected answer too short", "score gap too wide"
    expected = {"e000": low, "e001": low, "e003": short, "e004": short}
    assert shaped(Rip(), rows)[1] == {i: f"prompt: {reason}" for i, reason in expected.items()}
    assert set(shaped(Rip(length=None), rows)[1].items()) >= {("e003", f"prompt: {wide}")}
    assert list(shaped(Rip(None, None, 0.5), rows)[1]) == ["e001", "e003"]
    assert list(shaped(Rip(None, None, 0.0), rows)[1]) == ["e001", "e002", "e003", "e004"]
    assert list(shaped(Rip(None, 0.75, None), rows)[1]) == ["e002", "e003", "e004"]
    assert shaped(Rip(None, None, None), rows)[1] == {} == shaped(Rip(0, 0, 1), rows)[1]
    assert shaped(Rip(), [pair(7)])[1] == {}


def floats(numbers):
    reward, length, gap = numbers
    return float(reward), length, float(gap)


def test_rip_judges_a_prompt_by_its_widest_pair_and_drops_it_whole():
    one = [pair(0, 1.0), pair(1, 9.0, prompt_id="p0")]
    other = [pair(2, 2.0), pair(3, 3.0, prompt_id="p2")]
    _, gone = shaped(Rip(None, None, 0.5), [*one, *other])
    assert list(gone) == ["e000", "e001"]


def test_the_budget_goes_to_the_smallest_gaps_or_the_largest():
    rows = [pair(0, 3.0), pair(1, -0.5), pair(2, 1.0), pair(3), pair(4, 1.0), pair(5, -2.0), POINT]
    kept, gone = shaped(BudgetSelect(2), rows)
    assert ids_of(kept) == ["e001", "e002", "e003", "e090"] and set(gone.values()) == {"outside the budget"}
    assert ids_of(shaped(BudgetSelect(1, "large"), rows)[0]) == ["e000", "e003", "e090"]
    assert ids_of(shaped(BudgetSelect(0), rows)[0]) == ["e003", "e090"]
    assert shaped(BudgetSelect(99), rows)[1] == {}


def test_a_random_budget_is_fair_and_knows_no_order():
    rows = [pair(i) for i in range(8)]
    taken = [set(ids_of(shaped(BudgetSelect(3, "random"), rows, ShapeContext(None, s))[0])) for s in range(200)]
    assert {len(ids) for ids in taken} == {3}
    shares = [fmean(f"e{i:03}" in ids for ids in taken) for i in range(8)]
    assert shares == pytest.approx([3 / 8] * 8, abs=0.12)
    again = ids_of(shaped(BudgetSelect(3, "random"), shuffled(rows), ShapeContext(None, 7))[0])
    assert set(again) == taken[7]


# --- plausibility -----------------------------------------------------------------------------------------------

PLAIN = [group([0.0, 1.0], i, logps=[-10 - i, -10 + i]) for i in range(3)]  # a token: -1 -1, -1.1 -0.9, -1.2 -0.8


def implausible(shaper, *, chosen=-10.0, rejected=-10.0, **fields):
    """The verdict on a pair of prompt p9 beside the answers of PLAIN, whose answers have these log-probs."""
    context = context_of(*PLAIN, group([1.0, 0.0], 9, logps=[chosen, rejected]))
    return shaped(shaper, [pair(9, 1.0, **fields), pair(3)], context)[1]


def test_what_the_reference_would_hardly_give_goes():
    # per token: -1 (three times, p9's second answer among them), -1.1 -0.9 -1.2 -0.8, and p9's first; the median is -1
    # and, with an outlier below, the deviations are 0 0 0 .1 .1 .2 .2 and the outlier's: MAD 0.1, so sd 0.14826
    low = -10 * (1 + 4 * 0.14826)
    assert implausible(DropImplausible(), chosen=low - 0.01) == {"e009": "implausible to the reference"}
    assert implausible(DropImplausible(), chosen=low + 0.01) == {}
    assert implausible(DropImplausible(5.0), chosen=low - 0.01) == {}
    assert implausible(DropImplausible(), chosen=5.0) == {}  # only below the median
    assert implausible(DropImplausible(), rejected=-99.0) == {}
    assert list(implausible(DropImplausible(side="both"), rejected=-99.0)) == ["e009"]


def test_it_is_left_alone_without_reference_scores_or_without_spread():
    assert implausible(DropImplausible(), chosen=None) == {}
    assert implausible(DropImplausible(), chosen=-99.0, chosen_sample_id=None) == {}
    same = context_of(*[group([0.0, 1.0], i, logps=[-10, -10]) for i in range(4)], group([1.0], 9, logps=[-99]))
    assert shaped(DropImplausible(), [pair(9, 1.0)], same)[1] == {}
    assert shaped(DropImplausible(), [pair(9, 1.0)])[1] == {}
    empty = context_of(*PLAIN, group([1.0, 0.0], 9, logps=[-99.0, -10.0], tokens=0))
    assert shaped(DropImplausible(), [pair(9, 1.0)], empty)[1] == {}


def test_points_are_held_to_it_too():
    assert list(implausible(DropImplausible(), chosen=-99.0, kind="point", rejected_sample_id=None)) == ["e009"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthRules(max_ratio=0.5), "LengthRules.max_ratio=0.5 must be at least 1"),
        (lambda: LengthRules(max_chosen_ratio=0.0), "LengthRules.max_chosen_ratio=0.0 must be positive"),
        (lambda: LengthRules(min_tokens=0), "LengthRules.min_tokens=0"),
        (lambda: Rip(gap=2), "Rip.gap=2"),
        (lambda: BudgetSelect(-1), "BudgetSelect.budget=-1"),
        (lambda: DropImplausible(0), "DropImplausible.deviations=0"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
