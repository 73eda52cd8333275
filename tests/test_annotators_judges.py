"""Judges that answer with the probability of a word: against a naive forward pass, and what must not change them."""

import random

import pytest
from annotator_fixtures import all_logprobs, compared, job, judge_folder, knobs, made, outcome, rewards
from tiny import PAD_ID, tiny_llama

from align_loop.annotators.judge_logit import PAIR_PROMPT, JudgeLogit
from align_loop.annotators.judging import fill, pairs_of
from align_loop.annotators.yes_prob import QUESTIONS, YesProb
from align_loop.engines.scoring import load_scorer, next_token_logprobs
from align_loop.errors import UserError
from align_loop.groups import matrix_from_scores, scores_from_matrix
from align_loop.render import Renderer

TEMPLATE = "w20 {prompt} w21 {first} w22 {second} w23"
QUESTION = "w20 {prompt} w21 {answer} w22"


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return judge_folder(tmp_path_factory.mktemp("judge") / "m", seed=3)


def naive(folder, text, words):
    """The probability of the first of two words behind a user message, from the definition."""
    renderer = Renderer(folder)
    values = all_logprobs(folder, renderer.prompt_ids([{"role": "user", "content": text}]))[-1]
    first, second = (values[renderer.tokenizer.convert_tokens_to_ids(word)].exp().item() for word in words)
    return first / (first + second)


@pytest.mark.parametrize("budget", [1, 100, 16384])
def test_next_tokens_equal_a_naive_pass(judge, budget):
    draw = random.Random(0)
    prompts = [[draw.randrange(7, 64) for _ in range(draw.randint(1, 30))] for _ in range(9)]
    model, done = load_scorer(judge, "float32", "cpu"), []
    how = {"pad_id": PAD_ID, "token_budget": budget, "device": "cpu", "on_done": done.append}
    got = next_token_logprobs(model, prompts, [9, 50, 9], **how)
    for prompt, values in zip(prompts, got, strict=True):
        assert values == pytest.approx(all_logprobs(judge, prompt)[-1][[9, 50, 9]].tolist(), abs=1e-4)
    assert sum(done) == 9
    with pytest.raises(ValueError, match="empty prompt"):
        next_token_logprobs(model, [[1], []], [9], **how)


def test_both_orders_are_asked_and_averaged(judge, tmp_path):
    prompts, answers = made()
    work = job(tmp_path, (prompts, answers), {"judge": judge})
    got = JudgeLogit(template=TEMPLATE).annotate(work)
    found, question = compared(got), {p["prompt_id"]: p["messages"][0]["content"] for p in prompts}
    says_first, disagree = [], []
    for i, a in enumerate(answers):
        for b in answers[i + 1 :]:
            if a["prompt_id"] != b["prompt_id"]:
                continue
            asked = [
                fill(TEMPLATE, prompt=question[a["prompt_id"]], first=x["text"], second=y["text"])
                for x, y in ((a, b), (b, a))
            ]
            one, two = (naive(judge, text, ("A", "B")) for text in asked)
            assert found[a["sample_id"], b["sample_id"]] == pytest.approx((one + 1 - two) / 2, abs=1e-4)
            assert found[a["sample_id"], b["sample_id"]] != pytest.approx(one, abs=1e-4)  # one order is another thing
            says_first += [one, two]
            disagree.append((one > 0.5) == (two > 0.5))
    assert len(got.pairwise) == 12 == len(disagree)
    facts = work.context.report["facts"]
    assert facts["judge says first"] == pytest.approx(sum(says_first) / 24, abs=1e-4)
    assert facts["orders disagree"] == pytest.approx(sum(disagree) / 12)
    assert 0 < facts["verdict mass"] < 1
    assert work.context.report["rows"]["comparisons"] == {"in": 12, "out": 12, "dropped": {}}


def test_exchanging_two_answers_exchanges_their_probability(judge, tmp_path):
    prompts, answers = made(n=2)
    turned = [row | {"k": 1 - row["k"]} for row in answers]
    one, two = (
        compared(JudgeLogit(template=TEMPLATE).annotate(job(tmp_path, (prompts, rows), {"judge": judge})))
        for rows in (answers, turned)
    )
    for (a, b), p in one.items():
        assert p + one[b, a] == pytest.approx(1) and p == pytest.approx(two[a, b], abs=1e-6)


def test_the_scores_fit_the_comparisons(judge, tmp_path):
    got = JudgeLogit(template=TEMPLATE).annotate(job(tmp_path, made(n=2), {"judge": judge}))
    scores = rewards(got)
    for row in got.pairwise:
        gap = scores[row["first_sample_id"]] - scores[row["second_sample_id"]]
        assert matrix_from_scores([gap, 0])[0][1] == pytest.approx(row["p_first"], abs=1e-5)
    assert {row["tokens"] for row in got.scores} == {len(a["token_ids"]) for a in made(n=2)[1]}


@pytest.mark.parametrize("part", [JudgeLogit(template=TEMPLATE, limit=2), YesProb(questions={"q": QUESTION})])
def test_neither_batches_nor_row_order_matter(judge, tmp_path, part):
    prompts, answers = made(n=4)
    whole = part.annotate(job(tmp_path, (prompts, answers), {"judge": judge}))
    for rows, budget in ((answers, 1), (answers[::-1], 70), (random.Random(1).sample(answers, len(answers)), 16384)):
        got = part.annotate(job(tmp_path, (prompts[::-1], rows), {"judge": judge}, budget))
        assert rewards(got) == pytest.approx(rewards(whole), abs=1e-4)
        assert compared(got) == pytest.approx(compared(whole), abs=1e-5)


def test_few_comparisons_cover_the_answers_evenly():
    _, answers = made(n=6, count=1)
    assert len(pairs_of(answers, None, 0)) == 15 == len(pairs_of(answers, 99, 0))
    for limit, times in ((3, {1}), (6, {2}), (9, {3})):
        chosen = pairs_of(answers, limit, seed=1)
        counts = [sum(a in pair for pair in chosen) for a in answers]
        assert len(chosen) == limit and set(counts) == times
        assert all(a["k"] < b["k"] for a, b in chosen)
    five = pairs_of(answers[:5], 5, seed=1)
    assert {sum(a in pair for pair in five) for a in answers[:5]} <= {1, 2, 3} and len(set(map(str, five))) == 5
    assert {str(p) for p in pairs_of(answers, 14, 1)} < {str(p) for p in pairs_of(answers, None, 1)}
    assert pairs_of(answers, 3, 1) == pairs_of(answers, 3, 1) != pairs_of(answers, 3, 2)
    assert pairs_of(answers[:1], 3, 1) == []


def test_an_answer_that_was_compared_with_none_has_no_score(judge, tmp_path):
    prompts, answers = made(n=3, count=2)
    got = JudgeLogit(template=TEMPLATE, limit=1).annotate(job(tmp_path, (prompts, answers), {"judge": judge}))
    named = {row[s] for row in got.pairwise for s in ("first_sample_id", "second_sample_id")}
    assert len(got.scores) == 4 and set(rewards(got)) == named
    alone = JudgeLogit(template=TEMPLATE).annotate(job(tmp_path, (prompts, answers[:1]), {"judge": judge}))
    assert (alone.scores, alone.pairwise) == ([], [])


def test_yes_is_the_mean_over_questions(judge, tmp_path):
    prompts, answers = made()
    questions = {"good": QUESTION, "safe": "w30 {answer} w31 {prompt}"}
    work = job(tmp_path, (prompts, answers), {"judge": judge})
    got = rewards(YesProb(questions=questions).annotate(work))
    text_of = {p["prompt_id"]: p["messages"][0]["content"] for p in prompts}
    means = dict.fromkeys(questions, 0.0)
    for row in answers:
        values = {
            name: naive(judge, fill(q, prompt=text_of[row["prompt_id"]], answer=row["text"]), ("Yes", "No"))
            for name, q in questions.items()
        }
        assert got[row["sample_id"]] == pytest.approx(sum(values.values()) / 2, abs=1e-4)
        means = {name: means[name] + values[name] / len(answers) for name in means}
    assert work.context.report["facts"]["mean yes"] == pytest.approx(means, abs=1e-4)


def test_the_packages_own_prompts_have_their_places(judge, tmp_path):
    for part in (JudgeLogit(), YesProb()):
        got = part.annotate(job(tmp_path, made(), {"judge": judge}))
        assert len(got.scores) == 12 and len(set(rewards(got).values())) > 6  # it does see the answers
    assert len(QUESTIONS) == 2 and PAIR_PROMPT.index("{first}") < PAIR_PROMPT.index("{second}")


def test_what_an_answer_says_is_no_place_to_fill():
    text = fill("{prompt}|{first}|{other}", prompt="{first}", first="{prompt}")
    assert text == "{first}|{prompt}|{other}"


def test_what_does_not_fit_in_the_judge_is_counted(judge, tmp_path):
    prompts, answers = made(n=3, count=2)
    answers[0] |= {"text": " ".join(["w30"] * 300)}  # the judge has 256 positions
    work = job(tmp_path, (prompts, answers), {"judge": judge})
    got = JudgeLogit(template=TEMPLATE).annotate(work)
    assert work.context.report["rows"]["comparisons"]["dropped"] == {"prompt too long for the judge": 2}
    assert answers[0]["sample_id"] not in rewards(got) and len(got.scores) == 5
    work = job(tmp_path, (prompts, answers), {"judge": judge})
    assert len(YesProb(questions={"q": QUESTION}).annotate(work).scores) == 5
    assert work.context.report["rows"]["judged answers"]["out"] == 5


def test_every_field_of_a_judge_matters(judge, tmp_path):
    tables = made(n=4)
    other = judge_folder(tmp_path / "other", seed=4)
    part = JudgeLogit(template=TEMPLATE)
    changed = knobs(part, judge="initial", template=TEMPLATE + " w40", verdicts=["Yes", "No"], limit=3)
    before = outcome(part.annotate(job(tmp_path, tables, {"judge": judge})))
    for name, new in changed:
        model = other if name == "judge" else judge
        assert outcome(new.annotate(job(tmp_path, tables, {"judge": model}))) != before, name
    part = YesProb(questions={"q": QUESTION})
    before = outcome(part.annotate(job(tmp_path, tables, {"judge": judge})))
    changed = knobs(part, judge="initial", questions={"q": QUESTION + " w40"}, yes_word="A", no_word="B")
    for name, new in changed:
        model = other if name == "judge" else judge
        assert outcome(new.annotate(job(tmp_path, tables, {"judge": model}))) != before, name
    assert JudgeLogit(judge="previous").roles() == YesProb(judge="previous").roles() == {"judge": "previous"}


@pytest.mark.parametrize(
    ("cls", "fields", "said"),
    [
        (JudgeLogit, {"template": "{prompt} {first}"}, "annotator.template has no {second}"),
        (JudgeLogit, {"verdicts": ["A"]}, "annotator.verdicts.*two different words"),
        (JudgeLogit, {"verdicts": ["A", "A"]}, "annotator.verdicts.*two different words"),
        (JudgeLogit, {"limit": 0}, "annotator.limit=0 must be at least 1"),
        (YesProb, {"questions": {}}, "annotator.questions is empty"),
        (YesProb, {"questions": {"good": "{prompt}"}}, "annotator.questions.good has no {answer}"),
        (YesProb, {"yes_word": "No"}, "annotator.yes_word=No"),
    ],
)
def test_wrong_fields_are_named(cls, fields, said):
    with pytest.raises(ValueError, match=said):
        cls(**fields)


def test_verdicts_must_be_single_tokens(judge, tmp_path):
    plain = tiny_llama(tmp_path / "plain")  # knows neither A nor B
    with pytest.raises(UserError, match="annotator.verdicts='A' is not one token"):
        JudgeLogit(template=TEMPLATE).annotate(job(tmp_path, made(), {"judge": plain}))
    with pytest.raises(UserError, match="annotator.verdicts='w20 w21' is not one token.*'w20', 'w21'"):
        JudgeLogit(verdicts=["A", "w20 w21"]).annotate(job(tmp_path, made(), {"judge": judge}))
    with pytest.raises(UserError, match="annotator.no_word='Nope' is not one token"):
        YesProb(no_word="Nope").annotate(job(tmp_path, made(), {"judge": judge}))
    with pytest.raises(UserError, match="same token"):
        JudgeLogit(verdicts=["A", " A"]).annotate(job(tmp_path, made(), {"judge": judge}))


def test_answers_without_their_prompts_are_found(judge, tmp_path):
    prompts, answers = made()
    with pytest.raises(UserError, match="1 prompts that are not in the table, such as p3"):
        JudgeLogit().annotate(job(tmp_path, (prompts[:3], answers), {"judge": judge}))


def test_a_prompt_of_several_comparisons_is_fitted_as_a_whole(judge, tmp_path):
    prompts, answers = made(n=3, count=1)
    got = JudgeLogit(template=TEMPLATE).annotate(job(tmp_path, (prompts, answers), {"judge": judge}))
    found, ids = compared(got), [a["sample_id"] for a in answers]
    matrix = [[found.get((i, j), 0.5) for j in ids] for i in ids]
    assert rewards(got) == pytest.approx(dict(zip(ids, scores_from_matrix(matrix), strict=True)), abs=1e-9)
