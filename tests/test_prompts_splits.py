"""Splits are disjoint, lose nothing, and depend on the rows and the seed alone."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_loop.errors import UserError
from align_loop.prompts import splits

# Rows of preferences: up to three for a prompt. Rows of prompts: each prompt once.
PREFERENCES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), unique=True, max_size=30).map(
    lambda pairs: [{"prompt_id": f"p{p}", "example_id": f"e{p}-{e}"} for p, e in pairs]
)
PROMPTS = st.lists(st.integers(0, 200), unique=True, max_size=60).map(lambda ids: [{"prompt_id": f"p{i}"} for i in ids])


def ids(rows):
    return [row.get("example_id", row["prompt_id"]) for row in rows]


@settings(deadline=None)
@given(PREFERENCES, st.floats(0, 1), st.integers(0, 3), st.randoms())
def test_a_share_keeps_prompts_together_and_ignores_the_order_of_the_file(rows, share, seed, rng):
    taken, rest = splits.take_share(rows, share, seed)
    assert sorted(ids(taken + rest)) == sorted(ids(rows))
    assert not {row["prompt_id"] for row in taken} & {row["prompt_id"] for row in rest}
    assert round(share * len(rows)) <= len(taken) < round(share * len(rows)) + 3
    shuffled = rng.sample(rows, len(rows))
    assert splits.take_share(shuffled, share, seed) == (taken, rest)


@settings(deadline=None)
@given(PREFERENCES, st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_share_is_part_of_a_larger_one(rows, one, other):
    small, large = (ids(splits.take_share(rows, share, 7)[0]) for share in sorted((one, other)))
    assert large[: len(small)] == small


def test_rows_of_one_prompt_are_never_parted():
    rows = [{"prompt_id": f"p{n // 3}", "example_id": f"e{n}"} for n in range(30)]
    for target, size in [(1, 3), (2, 3), (3, 3), (4, 6), (29, 30)]:
        taken, rest = splits.take_share(rows, target / 30, 0)
        assert len(taken) == size and not {r["prompt_id"] for r in taken} & {r["prompt_id"] for r in rest}


def test_shares_are_exact_where_prompts_are_unique_and_the_seed_matters():
    rows = [{"prompt_id": f"p{n}", "example_id": f"e{n}"} for n in range(1000)]
    by_seed = [ids(splits.take_share(rows, 0.033, seed)[0]) for seed in (0, 1)]
    assert [len(taken) for taken in by_seed] == [33, 33]
    assert len(set(by_seed[0]) & set(by_seed[1])) < 10


@settings(deadline=None)
@given(PROMPTS, st.data())
def test_prompt_sets_are_disjoint_and_every_row_is_accounted_for(rows, data):
    labelled = set(data.draw(st.lists(st.sampled_from([f"p{i}" for i in range(201)]), max_size=30)))
    evaluation = data.draw(st.integers(0, 10))
    sizes = data.draw(st.none() | st.lists(st.integers(1, 15), max_size=4))
    iterations = data.draw(st.integers(0, 4)) if sizes is None else len(sizes)
    options = {"evaluation": evaluation, "iterations": iterations, "sizes": sizes, "seed": 3, "labelled": labelled}
    free = [row["prompt_id"] for row in rows if row["prompt_id"] not in labelled]
    enough = evaluation + (iterations if sizes is None else sum(sizes)) <= len(free)
    if not enough:
        with pytest.raises(UserError, match=rf"but {len(free)} are there \({len(rows) - len(free)} more"):
            splits.split_prompts(rows, **options)
        return
    parts = splits.split_prompts(rows, **options)
    out = [*ids(parts.evaluation), *(i for part in parts.sets for i in ids(part))]
    assert len(set(out)) == len(out) and set(out) <= set(free)
    assert len(out) + sum(parts.dropped.values()) == len(rows)
    assert parts.dropped["in the labelled seed"] == len(rows) - len(free)
    assert len(parts.evaluation) == evaluation and len(parts.sets) == iterations
    lengths = [len(part) for part in parts.sets]
    if sizes is None:
        assert not lengths or (max(lengths) - min(lengths) <= 1 and parts.dropped["beyond the prompt sets"] == 0)
    else:
        assert lengths == sizes
    shuffled = random.Random(0).sample(rows, len(rows))
    assert splits.split_prompts(shuffled, **options) == parts


def test_more_iterations_do_not_change_the_evaluation_prompts_nor_the_earlier_sets():
    rows = [{"prompt_id": f"p{n}"} for n in range(100)]
    options = {"evaluation": 10, "seed": 0, "labelled": set()}
    short = splits.split_prompts(rows, iterations=2, sizes=[5, 20], **options)
    long = splits.split_prompts(rows, iterations=3, sizes=[5, 20, 30], **options)
    assert short.evaluation == long.evaluation and short.sets == long.sets[:2]


def test_sizes_of_the_shortest_schedule_that_is_long_enough():
    table = {3: [8, 20, 30], "4": [6, 12, 18, 22], 6: [1, 2, 3, 4, 5, 6]}
    assert splits.prompt_sets(table, 3) == [8, 20, 30]
    assert splits.prompt_sets(table, 2) == [8, 20]
    assert splits.prompt_sets(table, 4) == [6, 12, 18, 22]
    assert splits.prompt_sets(table, 5) == [1, 2, 3, 4, 5]
    assert splits.prompt_sets(table, 0) == []


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({3: [1, 2, 3]}, "loop.iterations=4, but prompt_sets has sizes for at most 3"),
        ({}, "at most 0"),
        ({4: [1, 2, 3]}, r"prompt_sets.4=\[1, 2, 3\] has 3 sizes"),
        ({4: 5}, "must be a list of positive whole numbers"),
        ({4: [1, 2, 3, 0]}, "must be a list of positive whole numbers"),
        ({4: [1, 2, 3, 1.5]}, "must be a list of positive whole numbers"),
        ({"four": [1, 2, 3, 4]}, "has the key 'four'"),
    ],
)
def test_a_schedule_without_sizes_is_refused(table, said):
    with pytest.raises(UserError, match=said):
        splits.prompt_sets(table, 4)


def test_too_few_prompts_names_both_numbers():
    rows = [{"prompt_id": f"p{n}"} for n in range(1000)]
    with pytest.raises(
        UserError, match=r"1,300 prompts \(100 for evaluation, 1,200 in 2 sets\) asked for, but 990 are"
    ):
        labelled = {f"p{n}" for n in range(10)}
        splits.split_prompts(rows, evaluation=100, iterations=2, sizes=[600, 600], seed=0, labelled=labelled)
    with pytest.raises(UserError, match="at least one for each of 3 iterations asked for, but 2 are there"):
        splits.split_prompts(rows[:2], evaluation=0, iterations=3, sizes=None, seed=0, labelled=set())


# --- noise of known frequency -----------------------------------------------------------------------------------


def labels(count):
    sides = {"chosen": "a", "rejected": "b", "gold_chosen": 1.0, "gold_rejected": None}
    return [{"example_id": f"e{i}", **sides} for i in range(count)]


def test_flips_exchange_the_sides_at_their_rate_and_grow_with_it():
    rows = labels(2000)
    flipped = {
        rate: {r["example_id"] for r in splits.flip_labels(rows, rate, 1) if r["chosen"] == "b"}
        for rate in (0, 0.2, 0.4, 1)
    }
    assert not flipped[0] and len(flipped[1]) == 2000 and flipped[0.2] < flipped[0.4]
    assert 340 < len(flipped[0.2]) < 460
    (one,) = splits.flip_labels(rows[:1], 1.0, 1)
    assert one == rows[0] | {"chosen": "b", "rejected": "a", "gold_chosen": None, "gold_rejected": 1.0}
    assert {r["example_id"] for r in splits.flip_labels(rows[::-1], 0.2, 1) if r["chosen"] == "b"} == flipped[0.2]
    assert {r["example_id"] for r in splits.flip_labels(rows, 0.2, 2) if r["chosen"] == "b"} != flipped[0.2]
    assert rows == labels(2000)
