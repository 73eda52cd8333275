"""Builders of points, demonstrations and groups; every kind through the stage; every builder from its YAML."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shape_fixtures import group
from tiny import tiny_tokenizer

from align_loop.builders.group import WholeGroup
from align_loop.builders.pair import NO_ANSWER, ONE_ANSWER, TIE
from align_loop.builders.single import TOO_LOW, Demo, Unpaired
from align_loop.builders.stage import on_policy
from align_loop.compose import compose_node, conf_dir, load
from align_loop.errors import UserError
from align_loop.evaluators.pairs import measure_pairs
from align_loop.parts import part
from align_loop.record import ANSWERS, PAIRWISE, PROMPTS, SCORES, read_rows, write_table
from align_loop.stage import StageContext

REWARDS = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), max_size=7)


def labels(builder, rewards):
    points, _ = builder.build([group(rewards)], 0)
    assert all(p["kind"] == "point" for p in points)
    return {int(p["chosen_sample_id"].split("-")[1]): p["label"] for p in points}


def test_top_and_bottom_by_hand():
    rewards = [1.0, 4.0, 2.0, 3.0]
    assert labels(Unpaired(), rewards) == {1: 1.0, 3: 1.0, 2: -1.0, 0: -1.0}
    assert labels(Unpaired(0.25, 0.25), rewards) == {1: 1.0, 0: -1.0}
    assert labels(Unpaired(0.1, 0.5), rewards) == {1: 1.0, 2: -1.0, 0: -1.0}  # at least one of ten per cent of four
    assert labels(Unpaired(0.0, 0.5), rewards) == {2: -1.0, 0: -1.0}
    assert labels(Unpaired(1.0, 0.0), rewards) == dict.fromkeys(range(4), 1.0)


def test_equal_scores_on_both_sides_get_no_label():
    assert labels(Unpaired(), [2.0, 1.0, 1.0, 0.0]) == {0: 1.0, 3: -1.0}
    assert labels(Unpaired(), [1.0, 1.0, 1.0, 0.0]) == {3: -1.0}
    assert labels(Unpaired(0.5, 0.25), [2.0, 1.0, 1.0, 0.0]) == {0: 1.0, 1: 1.0, 3: -1.0}


@given(st.lists(REWARDS, max_size=5), st.sampled_from([(0.5, 0.5), (0.2, 0.8), (0.0, 0.4), (0.3, 0.0)]))
@settings(max_examples=100, deadline=None)
def test_no_answer_is_both_and_the_good_ones_score_more(many, shares):
    groups = [group(rewards, i) for i, rewards in enumerate(many)]
    points, dropped = Unpaired(*shares).build(groups, 0)
    assert len({p["prompt_id"] for p in points}) + sum(dropped.values()) == len(groups)
    assert len({p["chosen_sample_id"] for p in points}) == len(points)
    for one in points:
        for other in points:
            if one["prompt_id"] == other["prompt_id"] and one["label"] > other["label"]:
                assert one["score_chosen"] > other["score_chosen"]


def test_a_point_has_one_answer():
    (good, _), dropped = Unpaired(0.3, 0.3).build([group([1.0, 2.0, 0.0]), group([1.0], 1), group([], 2)], 0)
    assert dropped == {ONE_ANSWER: 1, NO_ANSWER: 1}
    assert (good["chosen"], good["chosen_ids"], good["chosen_truncated"]) == ("text 0 1", [10, 21], True)
    assert (good["score_chosen"], good["prompt_ids"], good["tag"]) == (2.0, [1, 7], "self")
    assert not any(key.startswith(("rejected", "score_rejected")) for key in good)


def test_the_best_are_demonstrations():
    groups = [group([1.0, 3.0, 2.0]), group([0.5], 1), group([], 2)]
    demos, dropped = Demo().build(groups, 0)
    assert [d["chosen_sample_id"] for d in demos] == ["s0-1", "s1-0"] and dropped == {NO_ANSWER: 1}
    assert {d["kind"] for d in demos} == {"demo"} and "label" not in demos[0]
    demos, dropped = Demo(2, least=2.0).build(groups, 0)
    assert [d["chosen_sample_id"] for d in demos] == ["s0-1", "s0-2"] and dropped == {NO_ANSWER: 1, TOO_LOW: 1}


def test_a_group_has_all_answers():
    groups = [group([1.0, 3.0, 2.0]), group([1.0, 1.0], 1), group([1.0], 2)]
    (row,), dropped = WholeGroup().build(groups, 0)
    assert dropped == {TIE: 1, ONE_ANSWER: 1}
    assert row["kind"] == "group" and row["group_sample_ids"] == ["s0-0", "s0-1", "s0-2"]
    assert (row["group_ids"], row["group_scores"]) == ([[10, 20], [10, 21], [10, 22]], [1.0, 3.0, 2.0])


@pytest.mark.parametrize("shares", [(0.6, 0.5), (0.0, 0.0), (-0.1, 0.5)])
def test_shares_that_make_no_sense(shares):
    with pytest.raises(ValueError, match="Unpaired.top="):
        Unpaired(*shares)
    with pytest.raises(ValueError, match="Demo.count=0"):
        Demo(0)


# --- through the stage ------------------------------------------------------------------------------------------


def run_stage(tmp_path: Path, builder: str, groups, shapers=None, **fields):
    tables = {"prompts": [g.prompt | {"meta": "{}"} for g in groups]}
    tables |= {name: [row for g in groups for row in getattr(g, name)] for name in ("answers", "scores")}
    write_table(tmp_path / "prompts.parquet", tables["prompts"], PROMPTS)
    write_table(tmp_path / "answers" / "answers.parquet", tables["answers"], ANSWERS)
    write_table(tmp_path / "scores" / "scores.parquet", tables["scores"], SCORES)
    write_table(tmp_path / "scores" / "pairwise.parquet", [], PAIRWISE)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "out").mkdir()
    node = {"_target_": f"align_loop.builders.{builder}", **fields}
    config = {"builder": node, "shapers": shapers or {}, "dtype": "float32", "seed": 0}
    inputs = {name: tmp_path / name for name in ("answers", "scores", "tokenizer")}
    context = StageContext("pairs", tmp_path / "out", quiet=True)
    on_policy(config, {"prompts": tmp_path / "prompts.parquet", **inputs}, context)
    return read_rows(tmp_path / "out" / "examples.parquet"), read_rows(tmp_path / "out" / "dropped.parquet")


DEFAULT = {
    "identical": {"_target_": "align_loop.shapers.drop.DropIdentical"},
    "both_truncated": {"_target_": "align_loop.shapers.drop.DropBothTruncated"},
    "too_long": {"_target_": "align_loop.shapers.drop.DropTooLong", "max_length": 4},
    "least_confident": {"_target_": "align_loop.shapers.drop.DropLeastConfident", "share": 0.5},
}


@pytest.mark.parametrize(("builder", "kind"), [("single.Unpaired", "point"), ("single.Demo", "demo")])
def test_single_answers_pass_the_usual_shapers(tmp_path, builder, kind):
    empty, long = group([1.0, 0.0], 1), group([2.0, 1.0], 2)
    empty.answers[0]["text"] = " "
    long.answers[0]["token_ids"] = [10, 11, 12]
    kept, gone = run_stage(tmp_path, builder, [group([1.0, 0.0]), empty, long], DEFAULT)
    assert {row["kind"] for row in kept} == {kind} and kept[0]["rejected_ids"] is None
    assert {(r["chosen_sample_id"], r["reason"]) for r in gone} == {
        ("s1-0", "empty answer"),
        ("s2-0", "pair too long for the model"),
    }
    assert [r["label"] for r in kept] == ([1.0, -1.0, -1.0, -1.0] if kind == "point" else [None])
    assert measure_pairs(tmp_path / "out", None)["label_accuracy"] is None


def test_groups_pass_the_usual_shapers(tmp_path):
    long = group([2.0, 1.0], 1)
    long.answers[1]["token_ids"] = [10, 11, 12]
    (row,), (gone,) = run_stage(tmp_path, "group.WholeGroup", [group([1.0, 0.0]), long], DEFAULT)
    assert row["group_scores"] == [1.0, 0.0] and row["group_ids"] == [[10, 20], [10, 21]] and row["chosen"] is None
    assert gone["prompt_id"] == "p1" and gone["reason"] == "pair too long for the model"


def test_answers_of_other_contexts_are_trained_on_under_the_plain_prompt(tmp_path):
    styled = group([0.0, 1.0], variants={1: "styled"})
    styled.answers[1]["prompt_token_ids"] = [1, 6, 33, 7]
    plain = group([0.0, 1.0], 1, variants={0: None, 1: "styled"})
    rows, _ = run_stage(tmp_path, "construct.ConstructPair", [styled, plain], better="styled")
    assert [row["prompt_ids"] for row in rows] == [[1, 4, 7, 5], [1, 4, 8, 5]]  # as the template renders p0 and p1
    assert [row["chosen_sample_id"] for row in rows] == ["s0-1", "s1-1"]


# --- configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "builder").glob("*.yaml")))
def test_every_builder_has_a_yaml_that_makes_it(name):
    more = ["builder.better=styled"] if name == "construct_pair" else []
    node = compose_node(["+experiment=selfie_iter4", f"builder={name}", *more])["builder"]
    assert hasattr(part(node, "builder"), "build")


def test_a_constructed_pair_must_say_of_what():
    with pytest.raises(UserError, match="builder.better is missing"):
        load(["+experiment=selfie_iter4", "builder=construct_pair"])
