"""Filters: nothing lost, nothing changed, each reason where it belongs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_loop.shapers.context import ShapeContext
from align_loop.shapers.drop import DropBothTruncated, DropIdentical, DropLeastConfident, DropTooLong

CONTEXT = ShapeContext(renderer=None, seed=0)  # these filters read the rows alone


def pair(i=0, chosen="a", rejected="b", cut=(False, False), scores=(1.0, 0.0), prompt=3):
    return {
        "example_id": f"e{i:03}",
        "chosen": chosen,
        "rejected": rejected,
        "prompt_ids": [9] * prompt,
        "chosen_ids": [ord(c) for c in chosen],
        "rejected_ids": [ord(c) for c in rejected],
        "chosen_truncated": cut[0],
        "rejected_truncated": cut[1],
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }


SCORE = st.sampled_from([0.0, 0.5, 1.0, 2.0])
PAIRS = st.lists(
    st.tuples(st.text("ab ", max_size=4), st.text("ab ", max_size=4), st.booleans(), st.booleans(), SCORE, SCORE),
    max_size=12,
).map(lambda rows: [pair(i, c, r, (x, y), (max(s, t), min(s, t))) for i, (c, r, x, y, s, t) in enumerate(rows)])
SHAPERS = [DropIdentical(), DropBothTruncated(), DropTooLong(5), DropLeastConfident(0.3), DropLeastConfident(0.0)]


@pytest.mark.parametrize("shaper", SHAPERS, ids=repr)
@given(rows=PAIRS, rng=st.randoms())
@settings(max_examples=60, deadline=None)
def test_every_pair_is_kept_as_it_was_or_dropped_for_a_reason(shaper, rows, rng):
    kept, dropped = shaper.shape(rows, CONTEXT)
    gone = [row for group in dropped.values() for row in group]
    assert sorted([*kept, *gone], key=lambda r: r["example_id"]) == rows
    assert [r["example_id"] for r in kept] == sorted(r["example_id"] for r in kept)  # in the order given
    assert all(dropped.values())  # no reason without a row
    again, _ = shaper.shape(rng.sample(rows, len(rows)), CONTEXT)
    assert {r["example_id"] for r in again} == {r["example_id"] for r in kept}


def reason(shaper, row):
    kept, dropped = shaper.shape([row], CONTEXT)
    return None if kept else next(iter(dropped))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (pair(), None),
        (pair(chosen="a", rejected="a"), "identical answers"),
        (pair(chosen="", rejected=""), "identical answers"),
        (pair(chosen="", rejected="b"), "empty answer"),
        (pair(chosen="a", rejected=" \n"), "empty answer"),
        (pair(rejected="b") | {"rejected_ids": [97]}, "identical answers"),  # the same ids
        (pair(chosen="a", rejected="a") | {"rejected_ids": [1]}, "identical answers"),  # the same text
    ],
)
def test_identical_and_empty(row, expected):
    assert reason(DropIdentical(), row) == expected


@pytest.mark.parametrize(("cut", "expected"), [((1, 1), "both answers cut"), ((1, 0), None), ((0, 1), None)])
def test_both_cut(cut, expected):
    assert reason(DropBothTruncated(), pair(cut=cut)) == expected


@pytest.mark.parametrize(
    ("limit", "expected"), [(4, None), (3, "pair too long for the model"), (None, None)], ids=["fits", "not", "any"]
)
@pytest.mark.parametrize(("chosen", "rejected"), [("a", ""), ("", "b"), ("a", "b")])
def test_too_long_counts_prompt_and_longer_answer(limit, expected, chosen, rejected):
    assert reason(DropTooLong(limit), pair(chosen=chosen, rejected=rejected, prompt=3)) == expected


def test_the_least_confident_share():
    rows = [pair(i, scores=(gap, 0.0)) for i, gap in enumerate([5.0, 1.0, 1.0, 4.0, 3.0])]
    for share, gone in [(0.0, []), (0.2, ["e001"]), (0.4, ["e001", "e002"]), (0.6, ["e001", "e002", "e004"])]:
        kept, dropped = DropLeastConfident(share).shape(rows, CONTEXT)
        assert [r["example_id"] for r in dropped.get("least confident", [])] == gone
        assert len(kept) == 5 - len(gone)


def test_it_is_the_gap_that_counts_and_the_human_pairs_that_do_not():
    rows = [pair(0, scores=(-1.0, -9.0)), pair(1, scores=(9.0, 8.5)), pair(2, scores=(None, None))]
    kept, dropped = DropLeastConfident(0.5).shape(rows, CONTEXT)
    assert [r["example_id"] for r in kept] == ["e000", "e002"]
    assert [r["example_id"] for r in dropped["least confident"]] == ["e001"]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range(share):
    with pytest.raises(ValueError, match="share="):
        DropLeastConfident(share)
