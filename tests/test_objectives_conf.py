"""Every named objective of conf/objective composes, survives the way through a stage's key, and has losses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from algebra import N, batch_of

from align_loop.compose import conf_dir, load
from align_loop.errors import UserError
from align_loop.objectives.objective import Objective
from align_loop.parts import code_of, node_of, part

NAMES = sorted(path.stem for path in (Path(conf_dir()) / "objective").glob("*.yaml"))
REFERENCE_FREE = {"simpo", "cpo", "orpo"}


def objective(name: str, *overrides: str) -> Objective:
    return load(["+experiment=selfie_iter4", f"objective={name}", *overrides])[0].objective


@pytest.mark.parametrize("name", NAMES)
def test_a_named_objective_is_whole(name: str) -> None:
    made = objective(name)
    assert part(node_of(made), "objective") == made  # what a stage's process builds from its configuration
    assert len(code_of(made)) == 1 + len(made.terms)
    assert made.needs_reference == (name not in REFERENCE_FREE)
    kinds = {kind for term in made.terms.values() for kind in term.kinds}
    kind = "pair" if "pair" in kinds else kinds.pop()
    columns = {"value": [0.1] * N, "label": [1.0] * N} if kind == "point" else {}
    losses = sum(made.losses(batch_of(kind, **columns), {}).values())
    assert losses.isfinite().all() and losses.abs().max() > 0


def test_they_are_different_losses() -> None:
    found = {}
    for name in NAMES:
        made = objective(name)
        if any("pair" in term.kinds for term in made.terms.values()):
            found[name] = sum(made.losses(batch_of(), made.trackers()).values()).detach()
    same = [(a, b) for a in found for b in found if a < b and torch.allclose(found[a], found[b])]
    assert len(found) > 15 and same == []


def test_ropos_coefficients_are_those_of_its_formula() -> None:
    a, links = 14, objective("ropo").terms["pair"].links
    assert links == pytest.approx({"logistic": 4 * a / (1 + a) ** 2, "sigmoid": 4 * a**2 / (1 + a) ** 2})


def test_a_field_can_be_set_by_name_and_a_wrong_one_is_named() -> None:
    made = objective("dpo", "objective.terms.pair.margin=0.5")
    assert made.terms["pair"].margin == 0.5
    assert dataclasses.asdict(objective("dpo").terms["pair"]) == dataclasses.asdict(Objective().terms["pair"])
    for override, said in (
        ("objective.terms.pair.flip_rate=0.7", "objective.terms.pair.flip_rate must be in"),
        ("objective.terms.pair.score=log_ration", "objective.terms.pair.score=log_ration: did you mean log_ratio"),
        ("objective.terms.pair.marjin=1", "unknown key; did you mean margin"),
    ):
        with pytest.raises(UserError, match=said):
            objective("dpo", override)
