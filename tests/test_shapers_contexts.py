"""The same answers under other system prompts, and answers to other prompts: what is added, and what is known of it."""

from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shape_fixtures import ids_of, pair, shaped, shuffled
from tiny import tiny_tokenizer

from align_loop.errors import UserError
from align_loop.record import EXAMPLES, prompt_id
from align_loop.render import Renderer, with_system
from align_loop.shapers.context import ShapeContext
from align_loop.shapers.contexts import CstFlip, RelabelGoal
from align_loop.shapers.reward_data import RrmAugment
from align_loop.shapers.rows import swapped

POINT = pair(90, 1.0, kind="point", rejected=None, rejected_ids=None, score_rejected=None, label=1.0)


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return ShapeContext(Renderer(folder), 0)


def system_of(row):
    assert row["messages"][0]["role"] == "system"
    return row["messages"][0]["content"]


def answers(row):
    return row["chosen"], row["rejected"], row["chosen_ids"], row["rejected_ids"], row["chosen_sample_id"]


def test_swapping_turns_all_that_is_known_of_an_answer():
    row = pair(0, 2.0, chosen_weights=[1.0, 0.5], chosen_truncated=True)
    turned = swapped(row)
    for name in ("{}", "{}_ids", "{}_sample_id", "{}_truncated", "score_{}", "gold_{}", "{}_weights"):
        one, other = name.format("chosen"), name.format("rejected")
        assert turned[other] == row[one] and turned[one] == row.get(other)
    assert {k for k in swapped(turned) if swapped(turned)[k] is not None} == set(row) and swapped(
        turned
    ).items() >= row.items()
    sided = {n for n in EXAMPLES.names if "chosen" in n or "rejected" in n} - {"beta_rejected"}
    full = {name: i for i, name in enumerate(sorted(sided))}
    assert {k for k, v in swapped(full).items() if full[k] != v} == sided  # no column of a side is forgotten


# --- goals ------------------------------------------------------------------------------------------------------


def test_a_pair_becomes_two_under_the_two_scores_as_goals(context):
    row = pair(0, 3.0, score_chosen=4.0, score_rejected=1.5)
    (stays, turned), gone = shaped(RelabelGoal("w20 {goal}", digits=1), [row], context)
    assert not gone and (system_of(stays), system_of(turned)) == ("w20 4.0", "w20 1.5")
    assert answers(stays) == answers(row) and answers(turned) == answers(swapped(row))
    for new in (stays, turned):
        assert (new["score_chosen"], new["score_rejected"]) == (0.0, -6.25)  # -(goal - score)^2
        assert new["messages"][1:] == row["messages"] and new["prompt_id"] == prompt_id(new["messages"])
        assert new["prompt_ids"] == [1, 6, 20, 3, 4, 7, 5]  # <bos> <system> w20 <unk> <user> w7 <assistant>
    assert stays["example_id"] == "e000" != turned["example_id"]
    assert stays["gold_chosen"] == 0.75 and turned["gold_chosen"] is turned["gold_rejected"] is None


def test_goals_that_read_alike_do_not_contradict_each_other(context):
    rows = [pair(0, 0.04), pair(1, 0.0), pair(2), POINT]
    kept, _ = shaped(RelabelGoal(digits=1), rows, context)
    assert ids_of(kept) == ids_of(rows) and kept[2:] == rows[2:] and "0.0" in system_of(kept[0])
    assert len(shaped(RelabelGoal(digits=2), rows, context)[0]) == 5
    assert "3.14" in system_of(shaped(RelabelGoal(), [pair(0, 3.14159)], context)[0][0])


# --- configurable safety ----------------------------------------------------------------------------------------

CST = {"system": "w30", "opposite": "w31"}


def test_the_opposite_system_prompt_turns_the_preference(context):
    row = pair(0, 2.0)
    (stays, turned), gone = shaped(CstFlip(**CST), [row], context)
    assert not gone and (system_of(stays), system_of(turned)) == ("w30", "w31")
    assert stays["prompt_ids"][:3] == [1, 6, 30] and turned["prompt_ids"][:3] == [1, 6, 31]
    assert answers(stays) == answers(row) and answers(turned) == answers(swapped(row))
    assert (stays["score_chosen"], stays["gold_chosen"]) == (2.0, 0.75)
    assert {turned[k] for k in ("score_chosen", "score_rejected", "gold_chosen", "gold_rejected")} == {None}
    assert shaped(CstFlip(**CST), [POINT], context)[0] == [POINT]


def test_a_share_of_the_pairs_gets_a_copy(context):
    rows = [pair(i) for i in range(200)]
    kept, _ = shaped(CstFlip(**CST, share=0.25), rows, context)
    assert len(kept) == pytest.approx(250, abs=25) and {system_of(r) for r in kept} == {"w30", "w31"}
    other, _ = shaped(CstFlip(**CST, share=0.25), shuffled(rows), context)
    assert sorted(ids_of(other)) == sorted(ids_of(kept))
    reseeded, _ = shaped(CstFlip(**CST, share=0.25), rows, ShapeContext(context.renderer, 1))
    assert set(ids_of(reseeded)) != set(ids_of(kept))


def test_a_system_prompt_that_is_there_stays_in_front():
    user, system = {"role": "user", "content": "x"}, {"role": "system", "content": "b"}
    assert with_system([user], "a") == [{"role": "system", "content": "a"}, user]
    assert with_system([system, user], "a") == [{"role": "system", "content": "b\n\na"}, user]


def test_a_template_without_system_prompts_says_so(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    tokenizer.chat_template += "{% endif %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no system"):
        CstFlip(**CST).shape([pair(0)], ShapeContext(Renderer(tmp_path), 0))


# --- reward data ------------------------------------------------------------------------------------------------

RRM = ShapeContext(None, 0)
SIDES = {f"w{8 + i} {word}": i for i in range(12) for word in ("good", "bad")}  # text -> number of its prompt


@given(st.integers(1, 12), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_what_rrm_adds(count, contextual, neutral, seed):
    if not contextual + neutral:
        return
    rows, context = [pair(i, 1.0) for i in range(count)], ShapeContext(None, seed)
    kept, gone = shaped(RrmAugment(contextual, neutral), [*rows, POINT], context)
    assert not gone and [r for r in kept if r["tag"] == "self"] == [*rows, POINT]
    again, _ = shaped(RrmAugment(contextual, neutral), [POINT, *shuffled(rows)], context)
    assert sorted(again, key=lambda r: r["example_id"]) == sorted(kept, key=lambda r: r["example_id"])
    for i, row in enumerate(rows):
        new = [r for r in kept if r["prompt_id"] == row["prompt_id"] and r["tag"] == "augmented"]
        others = count - 1
        hard = [r for r in new if r["q"] == 1.0]
        soft = [r for r in new if r["q"] == 0.5]
        assert len(hard) + len(soft) == len(new)
        assert len(hard) == min(contextual, others) and len(soft) == min(neutral, max(0, others - contextual) // 2)
        strangers = [SIDES[r["rejected"]] for r in new] + [SIDES[r["chosen"]] for r in soft]
        assert i not in strangers and len(set(strangers)) == len(strangers)
        assert all(SIDES[r["chosen"]] == i for r in hard)
        for r in new:
            assert r["messages"] == row["messages"] and r["prompt_ids"] == row["prompt_ids"]
            assert r["chosen_ids"][1] == (10 if r["chosen"].endswith("good") else 11)
            assert r.get("score_chosen") is None and r.get("gold_rejected") is None


def test_rrm_draws_evenly():
    rows = [pair(i) for i in range(12)]
    drawn = [
        SIDES[r["rejected"]]
        for seed in range(40)
        for r in shaped(RrmAugment(1, 0), rows, ShapeContext(None, seed))[0]
        if r["prompt_id"] == "p0" and r["tag"] == "augmented"
    ]
    assert set(drawn) == set(range(1, 12)) and fmean(drawn) == pytest.approx(6, abs=1.6)


def test_other_pairs_of_the_same_prompt_are_no_strangers():
    rows = [pair(i) | {"prompt_id": "p0"} for i in range(5)]
    assert shaped(RrmAugment(), rows, RRM)[0] == rows


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RelabelGoal("none"), "RelabelGoal.template='none'"),
        (lambda: RelabelGoal(digits=-1), "RelabelGoal.digits=-1"),
        (lambda: CstFlip("a", "a"), "CstFlip.system='a'"),
        (lambda: CstFlip("a", " "), "opposite=' '"),
        (lambda: CstFlip("a", "b", 0.0), "CstFlip.share=0.0"),
        (lambda: RrmAugment(0, 0), "RrmAugment.non_contextual=0"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
