"""Parts from configuration nodes, and the writing that survives a crash."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from align_loop import durable
from align_loop.errors import UserError
from align_loop.parts import PART, build, find, nearest, node_of, part, plain


@dataclass
class Inner:
    size: int
    kind: Literal["small", "large"] = "small"

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"Inner.size must be 0 or more, got {self.size}")


@dataclass
class Outer:
    inner: Inner
    by_name: dict[str, Inner] = field(default_factory=dict)
    several: list[Inner] = field(default_factory=list)
    sets: dict[int, list[int]] | None = None
    rate: float = 0.5
    text: str = ""
    on: bool = False
    own: Any = field(default=None, metadata=PART)
    owns: dict[str, Any] = field(default_factory=dict, metadata=PART)
    hidden: int = field(default=0, init=False)


INNER = {"_target_": f"{__name__}.Inner", "size": 1}


def test_a_node_becomes_typed_and_goes_back():
    node = {
        "inner": {"size": 1, "kind": "large"},
        "by_name": {"a": {"size": 2}},
        "several": [{"size": 3}],
        "sets": {"3": [1, 2, 3]},
        "rate": 1,
        "owns": {"b": INNER, "gone": None},
    }
    made = build(Outer, node, "")
    assert made.inner == Inner(1, "large") and made.by_name == {"a": Inner(2)} and made.several == [Inner(3)]
    assert made.sets == {3: [1, 2, 3]} and made.rate == 1.0 and type(made.rate) is float
    assert made.own is None and made.owns == {"b": Inner(1)}
    assert json.loads(json.dumps(plain(made)))["sets"] == {"3": [1, 2, 3]}
    assert part(node_of(Inner(7, "large")), "p") == Inner(7, "large")


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({}, "inner is missing"),
        ({"inner": {}}, "inner.size is missing; give it a value (an integer)"),
        ({"inner": 3}, "inner=3 must be a mapping"),
        ({"inner": {"size": "x"}}, "inner.size=x: must be an integer"),
        ({"inner": {"size": True}}, "inner.size=True: must be an integer"),
        ({"inner": {"size": None}}, "inner.size=None"),
        ({"inner": {"size": -1}}, "inner.size must be 0 or more, got -1"),
        ({"inner": {"size": 1, "kind": "larg"}}, "inner.kind=larg: did you mean large?"),
        ({"inner": {"size": 1}, "by_name": {"a": {"sise": 1}}}, "by_name.a.sise=1: unknown key; did you mean size?"),
        ({"inner": {"size": 1}, "several": [{"size": 1}, {"size": 1.5}]}, "several[1].size=1.5"),
        ({"inner": {"size": 1}, "several": {"size": 1}}, "several={'size': 1} must be a list"),
        ({"inner": {"size": 1}, "by_name": [1]}, "by_name=[1] must be a dict"),
        ({"inner": {"size": 1}, "sets": {"x": [1]}}, "sets={'x': [1]}"),
        ({"inner": {"size": 1}, "rate": float("nan")}, "rate=nan: must be a number"),
        ({"inner": {"size": 1}, "text": 3}, "text=3: must be text"),
        ({"inner": {"size": 1}, "on": "maybe"}, "on=maybe: must be true or false"),
        ({"inner": {"size": 1}, "own": {"size": 1}}, "own={'size': 1} must be a part"),
        ({"inner": {"size": 1}, "owns": {"a": 3}}, "owns.a=3 must be a part"),
        ({"inner": {"size": 1}, "owns": 3}, "owns=3 must be a dict"),
        ({"inner": {"size": 1}, "hidden": 3}, "hidden=3: unknown key"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_named_by_its_key(node, said):
    with pytest.raises(UserError) as error:
        build(Outer, node, "")
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_long_value_is_cut_in_messages():
    with pytest.raises(UserError) as error:
        build(Outer, {"inner": {"size": "x" * 500}}, "")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("Inner", "p._target_='Inner' must be a dotted name"),
        (3, "p._target_=3 must be a dotted name"),
        ("no.such.Part", "no module 'no'"),
        ("align_loop.builders.best_wurst.BestWorst", "no module 'align_loop.builders.best_wurst'"),
        ("align_loop.builders.best_worst.BestWurst", "did you mean BestWorst?"),
        ("align_loop.builders.pair.pair", "not a dataclass"),
        ("align_loop.errors.UserError", "not a dataclass"),
    ],
)
def test_targets_that_are_no_part(target, said):
    with pytest.raises(UserError) as error:
        part({"_target_": target}, "p")
    assert said in str(error.value)


def test_a_target_that_is_one():
    assert find(f"{__name__}.Inner", "p") is Inner


def test_nearest_is_of_use_both_ways():
    assert nearest("tempratur", ["temperature", "top_p"]) == "did you mean temperature?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("3", [3, 4]) == "did you mean 3?"


# --- durable --------------------------------------------------------------------------------------------------


def test_json_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "a.json"
    durable.write_json(file, {"é": [1, 2.5, None]})
    durable.write_json(file, {"b": 1})
    assert json.loads(file.read_text(encoding="utf-8")) == {"b": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]  # nothing left beside it


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    durable.write_json(file, {"old": 1})

    def power_cut(_):
        raise OSError("power cut")

    monkeypatch.setattr(durable.os, "fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        durable.write_json(file, {"new": 2})
    assert json.loads(file.read_text()) == {"old": 1}


def test_what_cannot_be_json_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    durable.write_json(file, {"old": 1})
    with pytest.raises(TypeError):
        durable.write_json(file, {"new": object()})
    assert json.loads(file.read_text()) == {"old": 1}


def test_a_tree_is_flushed_file_by_file_links_followed(tmp_path, monkeypatch):
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "weights").write_text("w")
    (tmp_path / "out" / "a").write_text("a")
    (tmp_path / "out" / "model" / "link").symlink_to(tmp_path / "weights")
    flushed = []
    monkeypatch.setattr(durable, "flush", flushed.append)
    durable.flush_tree(tmp_path / "out")
    out = tmp_path / "out"
    assert set(flushed) == {out, out / "a", out / "model", out / "model" / "link"}
    monkeypatch.undo()
    durable.flush_tree(out)
