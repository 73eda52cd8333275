"""The fields of terms: none is dead, values out of range and examples that nobody reads are refused by name."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from algebra import N, batch_of
from test_objectives_groups import grouped
from test_objectives_points import B, at, point

from align_loop.errors import UserError
from align_loop.objectives.objective import Objective
from align_loop.objectives.terms import GroupTerm, KlTerm, PairTerm, PointTerm, SftTerm
from align_loop.objectives.trackers import AdaptiveBeta

# Each field of each term, with another value; and the terms on which all of them act.
KNOBS = [
    (
        PairTerm(),
        {
            "weight": 2.0,
            "tag": "other",
            "links": {"hinge": 1.0},
            "score": "log_prob",
            "beta": 0.7,
            "beta_rejected": 0.7,
            "margin": 0.5,
            "smoothing": 0.2,
            "flip_rate": 0.1,
            "positive": 2.0,
        },
        "pair",
    ),
    (
        PointTerm(loss="bco", baseline="none"),
        {
            "weight": 2.0,
            "tag": "other",
            "loss": "nca",
            "kinds": ["demo"],
            "score": "log_prob",
            "beta": 0.7,
            "baseline": "batch",
            "positive_weight": 2.0,
            "negative_weight": 2.0,
        },
        "pair",
    ),
    (
        SftTerm(kinds=["pair"]),
        {"weight": 2.0, "tag": "other", "kinds": ["demo"], "side": "rejected", "reduce": "sum"},
        "pair",
    ),
    (KlTerm(), {"weight": 2.0, "tag": "other", "kinds": ["demo"], "level": "sequence"}, "pair"),
    (
        GroupTerm(loss="contrast"),
        {"weight": 2.0, "tag": "other", "loss": "regress", "score": "log_prob", "beta": 0.7, "weighting": "gap"},
        "group",
    ),
]


@pytest.mark.parametrize(("term", "others", "kind"), KNOBS, ids=lambda v: type(v).__name__)
def test_no_field_of_a_term_is_dead(term, others, kind) -> None:
    fields = {name: getattr(term, name) for name in [f.name for f in dataclasses.fields(term)]}
    assert set(others) == set(fields) - {"adaptive"}
    plain = Objective(B, {"point": term}).losses(batch_of(kind), {})["point"]
    for name, value in others.items():
        other = type(term)(**{**fields, name: value})
        found = Objective(B, {"point": other}).losses(batch_of(kind), at(0.5) if other.tracker() else {})["point"]
        assert not torch.allclose(found, plain), name


def test_the_objectives_beta_serves_terms_without_their_own() -> None:
    for objective in (Objective(B), point(loss="bco", baseline="none"), grouped()):
        kind = "group" if "group" in objective.terms else "pair"
        name = next(iter(objective.terms))
        one, other = (Objective(b, objective.terms).losses(batch_of(kind), {})[name] for b in (B, 2 * B))
        assert not torch.allclose(one, other)


def test_tags_part_the_examples_between_terms() -> None:
    batch = batch_of()
    batch.tags, batch.tag = ["in", "near"], torch.tensor([0, 0, 1, 1, -1, 0])
    objective = Objective(B, {"p": PairTerm(tag="in"), "s": SftTerm(tag="near"), "all": KlTerm()})
    losses = objective.losses(batch, {})
    assert [(v != 0).int().tolist() for v in losses.values()] == [[1, 1, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0], [1] * 6]


def test_weights_of_0_and_no_examples_give_0() -> None:
    batch = batch_of(w=[0.0] * N)
    assert pair_total(batch) == 0 and pair_total(batch_of("demo")) == 0


def pair_total(batch) -> float:
    return Objective(B).losses(batch, {})["pair"].abs().sum().item()


@pytest.mark.parametrize(
    ("term", "row", "said"),
    [
        (PairTerm(), {"kind": "demo"}, "no term of the objective reads kind='demo'"),
        (PairTerm(tag="in"), {"kind": "pair", "tag": "out"}, "tag='out'.*with tag 'in'"),
        (PointTerm(loss="npo"), {"kind": "point", "label": 1.0}, "label 1"),
        (PointTerm(), {"kind": "point"}, "needs a label"),
        (PointTerm(), {"kind": "point", "label": 0.0}, "neither good nor bad"),
        (GroupTerm(), {"kind": "group", "group_ids": [[1]], "group_scores": [1.0]}, "two or more"),
        (GroupTerm(), {"kind": "group", "group_ids": [[1], [2]], "group_scores": None}, "each with a score"),
    ],
)
def test_an_example_that_no_term_can_use_is_named(term, row, said) -> None:
    with pytest.raises(UserError, match=f"example e7: .*{said}"):
        Objective(B, {"t": term}).check([{**row, "example_id": "e7"}])


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (PairTerm, {"links": {}}),
        (PairTerm, {"links": {"cubic": 1.0}}),
        (PairTerm, {"beta": 0.0}),
        (PairTerm, {"beta_rejected": -1.0}),
        (PairTerm, {"margin": math.inf}),
        (PairTerm, {"smoothing": 1.5}),
        (PairTerm, {"flip_rate": 0.5}),
        (PairTerm, {"positive": -1.0}),
        (PairTerm, {"weight": math.nan}),
        (PointTerm, {"kinds": []}),
        (PointTerm, {"baseline": "head"}),
        (PointTerm, {"positive_weight": math.inf}),
        (SftTerm, {"side": "rejected"}),
        (GroupTerm, {"weighting": "dcg"}),
        (AdaptiveBeta, {"keep": 0.0}),
        (AdaptiveBeta, {"momentum": 1.5}),
        (AdaptiveBeta, {"floor": 0.0}),
    ],
)
def test_values_out_of_range_are_refused_by_name(cls, wrong) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__}.{next(iter(wrong))} must be"):
        cls(**wrong)
