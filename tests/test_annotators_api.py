"""The judge behind an endpoint: what it is asked, what counts as a verdict, and what it costs."""

import dataclasses
import re
import zlib
from statistics import fmean

import pytest
from annotator_fixtures import compared, job, made, outcome, rewards
from chat_server import serving

from align_loop.annotators.api import ApiJudge, read_rating, read_verdict
from align_loop.compose import load
from align_loop.engines.endpoint import Endpoint
from align_loop.errors import UserError
from align_loop.parts import node_of, part

PAIR = "{prompt} | {first} | {second}"


def judge(chat, tmp_path, **fields):
    endpoint = Endpoint(chat.url, "m", cache_dir=str(tmp_path / "cache"), backoff=0.01, price_in=1.0, price_out=2.0)
    return ApiJudge(**{"endpoint": endpoint} | fields)


def longest(request, _number):
    """Prefers the longer answer; a tie where both are of the same length."""
    _, first, second = (len(part.split()) for part in request["messages"][0]["content"].split("|"))
    return f"I think [[B]] or maybe not. [[{'A' if first > second else 'B' if first < second else 'C'}]]"


def first_always(_request, _number):
    return "A"


@pytest.mark.parametrize(
    ("text", "value"),
    [("[[A]]", 1), ("so [[A]], no: [[B]]", 0), ("[[ C ]].", 0.5), ("A", 1), (" **B** \n", 0), ("'C'.", 0.5)]
    + [(t, None) for t in ("", None, "A is better", "[[D]]", "AB", "[[A]] [[neither]]", "a", "[A]", "Answer: A")],
)
def test_what_counts_as_a_verdict(text, value):
    assert read_verdict(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("[[7]]", 7), ("first [[3]] then [[4.5]]", 4.5), ("10", 10), ("**1**.", 1)]
    + [(t, None) for t in ("0", "11", "[[-3]]", "7/10", "about 7", "[[seven]]", "", None, "1e1", "[[nan]]")],
)
def test_what_counts_as_a_rating(text, value):
    assert read_rating(text, 1, 10) == value


def test_pairs_are_asked_in_both_orders(tmp_path):
    prompts, answers = made()
    length = {row["sample_id"]: len(row["text"].split()) for row in answers}
    with serving(longest) as chat:
        work = job(tmp_path, (prompts, answers))
        got = judge(chat, tmp_path, template=PAIR).annotate(work)
        assert len(chat.requests) == 24  # 4 prompts, 3 pairs, 2 orders
    for (a, b), p in compared(got).items():
        assert p == (0.5 if length[a] == length[b] else float(length[a] > length[b]))
    scores = rewards(got)
    assert all((scores[a] > scores[b]) == (p == 1) for (a, b), p in compared(got).items())
    facts = work.context.report["facts"]
    assert facts["judge says first"] == 0.5 and facts["orders disagree"] == 0.0
    assert facts["replies"] == {"sent": 24, "from the cache": 0} and work.context.report["tokens"] == 24 * 110
    # 100 tokens in at 1 and 10 out at 2 a million, for 24 replies; each answer was read in 4, shared by two
    assert facts["cost"] == pytest.approx(24 * 120e-6)
    assert [row["cost"] for row in got.scores] == pytest.approx([4 * 120e-6 / 2] * 12)
    assert sum(row["cost"] for row in got.scores) == pytest.approx(facts["cost"])


def test_a_judge_that_takes_the_first_is_seen_through(tmp_path):
    with serving(first_always) as chat:
        work = job(tmp_path, made())
        got = judge(chat, tmp_path).annotate(work)
        assert set(compared(got).values()) == {0.5}
        assert work.context.report["facts"]["judge says first"] == 1.0
        assert work.context.report["facts"]["orders disagree"] == 1.0
    with serving(first_always) as chat:
        got = judge(chat, tmp_path, both_orders=False).annotate(job(tmp_path, made(count=30)))
        assert len(chat.requests) == 90 and 0.3 < fmean(row["p_first"] for row in got.pairwise) < 0.7


def test_neither_row_order_nor_the_cache_changes_anything(tmp_path):
    prompts, answers = made()
    with serving(longest) as chat:
        for fields in ({"template": PAIR, "limit": 2, "both_orders": False}, {"template": PAIR}):
            first = outcome(judge(chat, tmp_path, **fields).annotate(job(tmp_path, (prompts, answers))))
            sent = len(chat.requests)
            again = job(tmp_path, (prompts[::-1], answers[::-1]))
            scores, pairs = outcome(judge(chat, tmp_path, **fields).annotate(again))
            assert (scores, pairs) == first and len(chat.requests) == sent
            assert again.context.report["facts"]["replies"]["sent"] == 0


def test_what_cannot_be_read_is_counted_and_not_guessed(tmp_path):
    prompts, answers = made(n=2, count=5)

    def behave(request, _number):
        text = request["messages"][0]["content"]
        prompt = next(i for i, p in enumerate(prompts) if text.startswith(p["messages"][0]["content"] + " |"))
        swapped = text.split(" | ")[1] == answers[2 * prompt + 1]["text"]
        if prompt == 1:
            return "I can't say"
        if prompt == 2:
            return "hm" if swapped else "A"  # one order of two
        return (413, "too long", {}) if prompt == 3 else "A"

    with serving(behave) as chat:
        work = job(tmp_path, (prompts, answers))
        got = judge(chat, tmp_path, template=PAIR).annotate(work)
    counted = work.context.report["rows"]["comparisons"]
    assert counted == {"in": 5, "out": 2, "dropped": {"reply not understood": 2, "refused by the endpoint": 1}}
    assert {row["prompt_id"] for row in got.scores} == {"p0", "p4"} == {row["prompt_id"] for row in got.pairwise}


def test_ratings_are_rewards(tmp_path):
    prompts, answers = made()

    def behave(request, _number):
        words = len(request["messages"][0]["content"].partition("|")[2].split())
        return "many words" if words == 9 else f"Good. [[{words / 2}]]"

    template = "{prompt} from {lowest} to {highest} | {answer}"
    with serving(behave) as chat:
        work = job(tmp_path, (prompts, answers))
        got = judge(chat, tmp_path, mode="pointwise", template=template, lowest=0.5, highest=4).annotate(work)
        assert " from 0.5 to 4 |" in chat.requests[0]["messages"][0]["content"]
    words = {row["sample_id"]: len(row["text"].split()) for row in answers}
    assert rewards(got) == {i: count / 2 for i, count in words.items() if count != 9}
    assert 9 in words.values() and got.pairwise == []
    assert all(row["cost"] == pytest.approx(120e-6) for row in got.scores)
    counted = work.context.report["rows"]["ratings"]
    assert counted["dropped"] == {"reply not understood": list(words.values()).count(9)}


def test_the_packages_own_prompts_hold_everything(tmp_path):
    prompts, answers = made(n=2, count=1)
    with serving(lambda request, number: "[[A]]") as chat:
        judge(chat, tmp_path).annotate(job(tmp_path, (prompts, answers)))
        texts = [request["messages"][0]["content"] for request in chat.requests]
        for text in texts:
            for part_ in (prompts[0]["messages"][0]["content"], answers[0]["text"], answers[1]["text"]):
                assert part_ in text
        assert len(set(texts)) == 2 and not re.search(r"\{\w+\}", texts[0])
    with serving(lambda request, number: "[[3]]") as chat:
        judge(chat, tmp_path, mode="pointwise").annotate(job(tmp_path, (prompts, answers)))
        text = chat.requests[0]["messages"][0]["content"]
        assert "from 1 (useless) to 10" in text and "[[10]]" in text and not re.search(r"\{\w+\}", text)


def test_every_field_matters(tmp_path):
    """The endpoint's own fields: tests/test_engines_endpoint.py."""

    def behave(request, _number):
        text = request["messages"][0]["content"]
        chance = zlib.crc32(text.encode())
        return str(1 + chance % 9) if "rate" in text else "ABC"[chance % 3]

    tables = made(n=4)
    with serving(behave) as one, serving(lambda *_: "B") as two:
        pairwise = judge(one, tmp_path, template=PAIR)
        other = dataclasses.replace(pairwise.endpoint, url=two.url)
        rating = judge(one, tmp_path, mode="pointwise", template="rate {prompt} {answer}")
        before = {p.mode: outcome(p.annotate(job(tmp_path, tables))) for p in (pairwise, rating)}
        for name, value in (("endpoint", other), ("template", PAIR + " x"), ("both_orders", False), ("limit", 2)):
            new = dataclasses.replace(pairwise, **{name: value})
            assert outcome(new.annotate(job(tmp_path, tables))) != before["pairwise"], name
        for name, value in (("lowest", 5), ("highest", 5)):
            new = dataclasses.replace(rating, **{name: value})
            assert outcome(new.annotate(job(tmp_path, tables))) != before["pointwise"], name
        assert before["pairwise"] != before["pointwise"]  # mode
        covered = {"endpoint", "template", "both_orders", "limit", "lowest", "highest", "mode"}
        assert covered == {f.name for f in dataclasses.fields(ApiJudge)}


def test_from_the_command_line():
    given = ["+experiment=selfie_iter4", "annotator=api", "annotator.endpoint.url=http://h:1/v1"]
    with pytest.raises(UserError, match="annotator.endpoint.model is missing"):
        load(given)
    annotator = load([*given, "annotator.endpoint.model=m", "annotator.endpoint.extra={top_p: 0.5}"])[0].annotator
    assert annotator.endpoint.extra == {"top_p": 0.5} and part(node_of(annotator), "annotator") == annotator
    with pytest.raises(UserError, match="annotator.endpoint.key_env must be the NAME"):
        load([*given, "annotator.endpoint.model=m", "annotator.endpoint.key_env=sk-123"])
    with pytest.raises(UserError, match="annotator.endpoint.timeou=1: unknown key; did you mean timeout"):
        load([*given, "annotator.endpoint.model=m", "+annotator.endpoint.timeou=1"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"template": "{prompt} {first}"}, "annotator.template has no {second}"),
        ({"template": PAIR, "mode": "pointwise"}, "annotator.template has no {answer}"),
        ({"limit": 0}, "annotator.limit=0"),
        ({"lowest": 5, "highest": 5}, "annotator.lowest=5 must be less"),
    ],
)
def test_wrong_fields_are_named(fields, said):
    with pytest.raises(ValueError, match=said):
        ApiJudge(Endpoint("http://h/v1", "m"), **fields)
