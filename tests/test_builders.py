"""Pairs from scored answers: invariants for any scores, and the same form for people's labels."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EOS_ID, tiny_tokenizer

from align_loop.builders.best_worst import BestWorst
from align_loop.builders.human import from_preferences
from align_loop.builders.pair import ONE_ANSWER, TIE
from align_loop.builders.stage import labelled, on_policy
from align_loop.groups import groups_of
from align_loop.record import ANSWERS, EXAMPLES, GOLD, PAIRWISE, PREFERENCES, PROMPTS, SCORES, read_rows, write_table
from align_loop.render import Renderer
from align_loop.stage import StageContext

# For each prompt the scores of its answers; None is an answer that was not scored. Few values, so that ties happen.
GROUPS = st.lists(st.lists(st.sampled_from([None, -1.5, 0.0, 0.25, 2.0]), max_size=5), max_size=8)


def table(groups):
    prompts, answers, scores = [], [], {}
    for i, group in enumerate(groups):
        messages = [{"role": "user", "content": f"w{7 + i}"}]
        prompts.append({"prompt_id": f"p{i}", "messages": messages})
        for k, score in enumerate(group):
            answers.append(
                {
                    "sample_id": f"s{i}-{k}",
                    "prompt_id": f"p{i}",
                    "k": k,
                    "text": f"text {i} {k}",
                    "prompt_token_ids": [1, 7 + i],
                    "token_ids": [10 + i, 20 + k],
                    "finish_reason": "length" if k % 2 else "stop",
                }
            )
            if score is not None:
                scores[f"s{i}-{k}"] = score
    return prompts, answers, scores


def built(prompts, answers, scores):
    rows = [{"sample_id": s, "prompt_id": s, "reward": r} for s, r in scores.items()]
    return BestWorst().build(groups_of(prompts, answers, rows), seed=0)


@given(GROUPS)
@settings(max_examples=200, deadline=None)
def test_invariants_of_best_against_worst(groups):
    prompts, answers, scores = table(groups)
    pairs, dropped = built(prompts, answers, scores)
    assert len(pairs) + sum(dropped.values()) == len(prompts)
    assert [p["prompt_id"] for p in pairs] == [p["prompt_id"] for p in prompts if p["prompt_id"] in paired(groups)]
    by_sample = {a["sample_id"]: a for a in answers}
    for pair in pairs:
        group = [s for s in groups[int(pair["prompt_id"][1:])] if s is not None]
        assert pair["score_chosen"] == max(group) > pair["score_rejected"] == min(group)
        assert pair["messages"] == prompts[int(pair["prompt_id"][1:])]["messages"]
        for side in ("chosen", "rejected"):
            answer = by_sample[pair[f"{side}_sample_id"]]
            assert answer["prompt_id"] == pair["prompt_id"] and scores[answer["sample_id"]] == pair[f"score_{side}"]
            assert (pair[side], pair[f"{side}_ids"]) == (answer["text"], answer["token_ids"])
            assert pair[f"{side}_truncated"] == (answer["finish_reason"] == "length")
            assert pair["prompt_ids"] == answer["prompt_token_ids"]
    assert len({p["example_id"] for p in pairs}) == len(pairs)


def paired(groups):
    known = {f"p{i}": {s for s in group if s is not None} for i, group in enumerate(groups)}
    return {prompt for prompt, values in known.items() if len(values) > 1}


@given(GROUPS, st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_order_of_answers_changes_nothing(groups, rng):
    prompts, answers, scores = table(groups)
    shuffled = rng.sample(answers, len(answers))
    assert built(prompts, answers, scores) == built(prompts, shuffled, scores)


def test_each_reason_for_no_pair():
    groups = [[], [None], [1.0], [1.0, None], [1.0, 1.0], [1.0, 1.0, 1.0], [2.0, 1.0]]
    pairs, dropped = built(*table(groups))
    assert len(pairs) == 1 and dropped == {"no answer": 2, ONE_ANSWER: 2, TIE: 2}


def test_equal_scores_are_taken_by_k():
    (pair,), _ = built(*table([[2.0, 1.0, 2.0, 1.0]]))
    assert (pair["chosen_sample_id"], pair["rejected_sample_id"]) == ("s0-0", "s0-3")


# --- the stages -------------------------------------------------------------------------------------------------

SHAPERS = {
    "identical": {"_target_": "align_loop.shapers.drop.DropIdentical"},
    "least": {"_target_": "align_loop.shapers.drop.DropLeastConfident", "share": 0.5},
}


def build(tmp_path, stage, config, inputs):
    out = tmp_path / "out"
    out.mkdir()
    context = StageContext("pairs", out, quiet=True)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    stage({"dtype": "float32", "seed": 0, **config}, {"tokenizer": tmp_path / "tokenizer", **inputs}, context)
    return read_rows(out / "examples.parquet"), read_rows(out / "dropped.parquet"), context.report["rows"]


def on_disk(tmp_path, groups, gold=True):
    prompts, answers, scores = table(groups)
    for name in ("answers", "scores", "gold"):
        (tmp_path / name).mkdir()
    rows = [{"sample_id": s, "prompt_id": s, "reward": r} for s, r in scores.items()]
    golds = [{"sample_id": a["sample_id"], "prompt_id": a["prompt_id"], "gold": a["k"] / 6} for a in answers]
    write_table(tmp_path / "prompts.parquet", prompts, PROMPTS)
    write_table(tmp_path / "answers" / "answers.parquet", answers, ANSWERS)
    write_table(tmp_path / "scores" / "scores.parquet", random.Random(0).sample(rows, len(rows)), SCORES)
    write_table(tmp_path / "scores" / "pairwise.parquet", [], PAIRWISE)
    write_table(tmp_path / "gold" / "gold.parquet", golds[::-1], GOLD)
    inputs = {"prompts": tmp_path / "prompts.parquet", **{n: tmp_path / n for n in ("answers", "scores", "gold")}}
    return inputs if gold else {k: v for k, v in inputs.items() if k != "gold"}


BUILDER = {"_target_": "align_loop.builders.best_worst.BestWorst"}


def test_own_pairs_are_shaped_in_order_and_all_accounted_for(tmp_path):
    inputs = on_disk(tmp_path, [[0.0, 4.0], [1.0, 2.0], [3.0, 3.0], [5.0]])
    kept, dropped, rows = build(tmp_path, on_policy, {"builder": BUILDER, "shapers": SHAPERS}, inputs)
    assert [r["prompt_id"] for r in kept] == ["p0"]
    assert [(r["prompt_id"], r["reason"]) for r in dropped] == [("p1", "least confident")]
    assert rows["prompts"] == {"in": 4, "out": 2, "dropped": {ONE_ANSWER: 1, TIE: 1}}
    assert rows["pairs"] == {"in": 2, "out": 1, "dropped": {"least confident": 1}}
    assert (kept[0]["gold_chosen"], kept[0]["gold_rejected"]) == (1 / 6, 0)  # of the second and the first answer
    assert dropped[0]["gold_chosen"] == 1 / 6 and kept[0]["tag"] == "self" and kept[0]["q"] == 1.0


def test_without_gold_there_is_none(tmp_path):
    inputs = on_disk(tmp_path, [[0.0, 4.0]], gold=False)
    (pair,), _, _ = build(tmp_path, on_policy, {"builder": BUILDER, "shapers": {}}, inputs)
    assert pair["gold_chosen"] is None and pair["gold_rejected"] is None


def preference(i, chosen="w9 w10", rejected="w11"):
    messages = [{"role": "user", "content": f"w{7 + i}"}]
    gold = {"gold_chosen": 0.5, "gold_rejected": None}
    given = {"example_id": f"e{i}", "prompt_id": f"p{i}", "messages": messages}
    return {**given, "chosen": chosen, "rejected": rejected, **gold, "meta": "{}"}


@pytest.fixture
def tokenizer(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_peoples_answers_have_the_form_of_sampled_ones(tokenizer):
    (row,) = from_preferences([preference(0)], Renderer(tokenizer))
    assert row["prompt_ids"] == [1, 4, 7, 5]
    assert (row["chosen_ids"], row["rejected_ids"]) == ([9, 10, EOS_ID], [11, EOS_ID])
    assert not row["chosen_truncated"] and not row["rejected_truncated"]
    assert (row["gold_chosen"], row["gold_rejected"], row["tag"]) == (0.5, None, "human")
    assert set(row) <= set(EXAMPLES.names)


def test_labelled_pairs_go_through_the_same_shapers(tmp_path, tokenizer):
    rows = [preference(0), preference(1, "w9", "w9"), preference(2, "w9", " ")]
    write_table(tmp_path / "seed.parquet", rows, PREFERENCES)
    inputs = {"preferences": tmp_path / "seed.parquet", "tokenizer": tokenizer}
    kept, dropped, counts = build(tmp_path, labelled, {"shapers": SHAPERS}, inputs)
    assert [r["example_id"] for r in kept] == ["e0"]  # no scores: the least confident share passes people's pairs by
    assert {r["example_id"]: r["reason"] for r in dropped} == {"e1": "identical answers", "e2": "empty answer"}
    assert counts["pairs"] == {"in": 3, "out": 1, "dropped": {"identical answers": 1, "empty answer": 1}}
