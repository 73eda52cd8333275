"""All builders and all shapers: no dead knob, no row lost, no order that matters, a YAML node that works."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import random
import re

import pytest
import yaml
from shape_fixtures import context_of, group, pair, shaped, shuffled
from tiny import tiny_llama

from align_loop import builders, shapers
from align_loop.builders.best import BestMinOfK, BestMu2s
from align_loop.builders.construct import ConstructPair
from align_loop.builders.ranked import AllPairs, RankedPairs
from align_loop.builders.single import Demo, Unpaired
from align_loop.parts import part
from align_loop.render import Renderer
from align_loop.shapers.contexts import CstFlip, RelabelGoal
from align_loop.shapers.drop import DropLeastConfident, DropTies, DropTooLong
from align_loop.shapers.filters import BudgetSelect, Deduplicate, DropImplausible, LengthRules, Rip
from align_loop.shapers.labels import ConfidenceSmooth, FlipRate, LabelSmoothing, SoftLabel
from align_loop.shapers.margins import Margin, OffsetLogGap
from align_loop.shapers.model_filters import Ches, DropTopLoss, ReferenceGap
from align_loop.shapers.reward_data import RrmAugment
from align_loop.shapers.weights import WeightGap


def classes(package, method):
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        found += [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    return [c for c in found if dataclasses.is_dataclass(c) and hasattr(c, method)]


# A part as it should work, and for each of its fields another value, on which it must do something else.
BUILDERS = [
    (BestMu2s(), {"deviations": 0.5}),
    (BestMinOfK(2), {"k": 1}),
    (RankedPairs(), {"gap": 2}),
    (AllPairs(), {"limit": 2}),
    (ConstructPair("a"), {"better": "b", "worse": "b"}),
    (Unpaired(0.5, 0.5), {"top": 0.2, "bottom": 0.2}),
    (Demo(2), {"count": 1, "least": 0.5}),
]
SHAPERS = [
    (DropTooLong(), {"max_length": 7}),
    (DropTies(), {"minimum": 1.0}),
    (DropLeastConfident(0.3), {"share": 0.1, "by": "probability", "minimum": 2.5}),
    (FlipRate(), {"rate": 0.2, "tag": "human"}),
    (LabelSmoothing(), {"rate": 0.2, "tag": "human"}),
    (ConfidenceSmooth(0.3), {"share": 0.1, "rate": 0.2, "by": "probability"}),
    (SoftLabel(), {"by": "gap", "temperature": 2.0}),
    (Margin(), {"scale": 2.0, "of": "vote"}),
    (OffsetLogGap(), {"alpha": 2.0}),
    (WeightGap(), {"temperature": None}),
    (LengthRules(), {"min_tokens": 3, "max_tokens": 6, "max_ratio": 2.0, "max_chosen_ratio": 1.0}),
    (Deduplicate(), {"same": "prompt"}),
    (Rip(), {"reward": 0.2, "length": 0.8, "gap": None}),
    (BudgetSelect(4), {"budget": 5, "by": "random"}),
    (DropImplausible(), {"deviations": 0.3, "side": "both"}),
    (RelabelGoal(), {"template": "w9 {goal}", "digits": 0}),
    (CstFlip("w30", "w31"), {"system": "w32", "opposite": "w33", "share": 0.5}),
    (RrmAugment(), {"non_contextual": 2, "neutral": 0}),
    (ReferenceGap(), {"keep": 0.3, "gap": "smallest", "per_token": True, "reference": "previous"}),
    (Ches(0.3), {"share": 0.1, "normalised": True, "model": "previous"}),
    (DropTopLoss(0.3), {"share": 0.1, "by": "scores", "beta": 1.0, "reference": "previous"}),
]
EVERY = [part for part, _ in BUILDERS + SHAPERS]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Groups of scored answers, pairs of them (and others), and a context that knows both and two models."""
    rng, folder = random.Random(3), tmp_path_factory.mktemp("models")
    groups, rows = [], []
    for i in range(14):
        rewards = [rng.choice([-1.0, 0.0, 0.2, 1.0, 1.2, 3.0]) for _ in range(6)]
        rewards[:2] = [max(rewards[:2]), min(rewards[:2])]
        chance = [[0.5, p := rng.random()], [1 - p, 0.5]]
        wide = [[chance[a % 2][b % 2] for b in range(6)] for a in range(6)]
        logps = [rng.gauss(-10, 1) - 20 * (i < 4 and k == i % 2) for k in range(6)]
        groups.append(group(rewards, i, wide if i % 2 else None, {2: "a", 3: "b"}, logps))
        ids = {f"{side}_ids": rng.choices(range(7, 64), k=rng.randint(1, 9)) for side in ("chosen", "rejected")}
        fields = {"score_chosen": rewards[0], "score_rejected": rewards[1], **ids}
        rows.append(pair(i, 0.0, **fields, q=rng.choice([None, 0.6, 0.9]), m=rng.choice([0.0, 0.8])))
    rows += [rows[0] | {"example_id": "e050"}, pair(60), pair(61, tag="human")]
    folders = {f"m{i}": tiny_llama(folder / f"m{i}", seed=i) for i in range(2)}
    models = {"policy": folders["m0"], "reference": folders["m1"], "model": folders["m1"]}
    return groups, rows, context_of(*groups, models=models), Renderer(folders["m0"])


def outcome(part, material):
    groups, rows, context, renderer = material
    if hasattr(part, "build"):
        return part.build(groups, 0)
    context.renderer = renderer
    return part.shape(rows, context), part.roles() if hasattr(part, "roles") else None


def test_every_part_and_every_field_is_here():
    known = {type(part): set(others) for part, others in BUILDERS + SHAPERS}
    every = classes(builders, "build") + classes(shapers, "shape")
    assert len(every) > 25
    for cls in every:
        assert known.get(cls, set()) == {f.name for f in dataclasses.fields(cls)}, cls


@pytest.mark.parametrize(("part", "others"), BUILDERS + SHAPERS, ids=lambda x: type(x).__name__)
def test_no_knob_is_dead(part, others, material):
    before = outcome(part, material)
    assert before == outcome(dataclasses.replace(part), material)  # the same again
    for name, value in others.items():
        assert outcome(dataclasses.replace(part, **{name: value}), material) != before, f"{name} changes nothing"


@pytest.mark.parametrize("shaper", [part for part, _ in SHAPERS], ids=lambda x: type(x).__name__)
def test_rows_are_conserved_and_their_order_does_not_matter(shaper, material):
    _, rows, context, context.renderer = material
    kept, gone = shaped(shaper, rows, context)
    for seed in range(3):
        again, again_gone = shaped(shaper, shuffled(rows, seed), context)
        assert again_gone == gone
        assert sorted(again, key=lambda r: r["example_id"]) == sorted(kept, key=lambda r: r["example_id"])


@pytest.mark.parametrize("shaper", [part for part, _ in SHAPERS], ids=lambda x: type(x).__name__)
def test_shapers_of_scores_leave_the_others_alone(shaper, material):
    _, rows, context, context.renderer = material
    unscored = [row for row in rows if row["score_chosen"] is None]
    point = rows[0] | {"kind": "point", "rejected_sample_id": None, "example_id": "e099"}
    one = [row for row in [*unscored, point] if row in shaper.shape([*rows, point], context)[0]]
    if getattr(shaper, "needs_scores", False):
        assert one == [*unscored, point] or isinstance(shaper, DropImplausible) and one[:2] == unscored
    elif not isinstance(shaper, (Deduplicate, DropTooLong)):
        assert one[-1] == point


def nodes():
    for cls in classes(shapers, "shape"):
        (line,) = re.findall(r"YAML: ``(.*)``", cls.__doc__)
        yield pytest.param(cls, yaml.safe_load(re.sub(r'"\$\{[^}]*\}"', "1", line)), id=cls.__name__)


@pytest.mark.parametrize(("cls", "node"), nodes())
def test_the_yaml_of_a_docstring_makes_the_shaper(cls, node):
    ((name, fields),) = node.items()
    assert type(part(fields, name)) is cls
