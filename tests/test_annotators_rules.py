"""Annotators without a model of their own: construction, a user's function, simulated people, and ensembles."""

import math
from dataclasses import dataclass, field
from statistics import fmean

import pytest
from annotator_fixtures import compared, job, knobs, made, outcome, rewards
from tiny import tiny_llama

from align_loop.annotators.construct import Construct
from align_loop.annotators.ensemble import Ensemble, standardised
from align_loop.annotators.gold import Gold
from align_loop.annotators.implicit_reward import ImplicitReward
from align_loop.annotators.job import Annotation
from align_loop.annotators.judging import pair_row, score_row
from align_loop.annotators.stage import annotate
from align_loop.annotators.verifier import Verifier
from align_loop.errors import UserError
from align_loop.parts import code_of, node_of, part
from align_loop.record import ANSWERS, GOLD, PROMPTS, SCORES, read_rows, write_table
from align_loop.stage import StageContext

# --- construction -------------------------------------------------------------------------------------------------


def test_the_variant_says_who_is_better(tmp_path):
    prompts, answers = made(n=3)
    for row in answers:
        row["variant"] = {0: None, 1: "good", 2: "bad"}[row["k"]]
    got = rewards(Construct({"plain": 0, "good": 2, "bad": -1}).annotate(job(tmp_path, (prompts, answers[::-1]))))
    assert got == {row["sample_id"]: {0: 0, 1: 2, 2: -1}[row["k"]] for row in answers}
    with pytest.raises(UserError, match="annotator.scores has no 'bad', the variant of answer .* to prompt p0"):
        Construct({"plain": 0, "good": 2}).annotate(job(tmp_path, (prompts, answers)))
    with pytest.raises(UserError, match="annotator.scores has no 'plain'"):
        Construct({"bad": 0, "good": 2}).annotate(job(tmp_path, (prompts, answers)))
    with pytest.raises(ValueError, match="orders nothing"):
        Construct({"plain": 1, "good": 1})
    (_, new), *_ = knobs(Construct({"plain": 0, "good": 2, "bad": -1}), scores={"plain": 0, "good": 3, "bad": -1})
    assert rewards(new.annotate(job(tmp_path, (prompts, answers)))) != got


def test_the_variant_is_a_column_of_answers(tmp_path):
    _, answers = made(n=1, count=1)
    write_table(tmp_path / "a", [answers[0] | {"variant": "good"}, answers[0]], ANSWERS)
    assert [row["variant"] for row in read_rows(tmp_path / "a")] == ["good", None]
    assert (
        ANSWERS.names[-1] == "variant"
        and SCORES.names[-2:] == ["tokens", "cost"]
        and SCORES.names.count("reward_sd") == 1
    )


# --- a user's function --------------------------------------------------------------------------------------------

CHECKS = """
def length(messages, text, meta):
    return len(text.split()) + 100 * meta["number"] + 1000 * len(messages)

def even(messages, text, meta):
    messages.clear(), meta.clear()  # must not reach the next answer
    return len(text.split()) % 2 == 0

def fails(messages, text, meta):
    raise RuntimeError("no\\nworking tests")

def says(messages, text, meta):
    return "good"

def nan(messages, text, meta):
    return float("nan")
number = 3
"""


@pytest.fixture
def checks(tmp_path, monkeypatch):
    (tmp_path / "own_checks.py").write_text(CHECKS)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_function_judges_each_answer(tmp_path, checks):
    prompts, answers = made()
    got = rewards(Verifier("own_checks:length").annotate(job(tmp_path, (prompts, answers))))
    words = {row["sample_id"]: len(row["text"].split()) for row in answers}
    assert got == {r["sample_id"]: words[r["sample_id"]] + 1000 + 100 * int(r["prompt_id"][1:]) for r in answers}
    even = rewards(Verifier("own_checks:even").annotate(job(tmp_path, (prompts, answers))))
    assert even == {sample: float(count % 2 == 0) for sample, count in words.items()}
    assert rewards(Verifier("own_checks:length").annotate(job(tmp_path, (prompts, answers[::-1])))) == got


def test_what_a_function_gets_wrong_is_named_by_its_answer(tmp_path, checks):
    prompts, answers = made()
    for name, said in (
        ("fails", "RuntimeError: no working tests"),
        ("says", "it returned 'good'"),
        ("nan", "it returned nan"),
    ):
        with pytest.raises(UserError, match=f"own_checks:{name}: answer .* to prompt p0: {said}"):
            Verifier(f"own_checks:{name}").annotate(job(tmp_path, (prompts, answers)))
    for function, said in (
        ("own_checks", "package.module:function"),
        ("own_checks:number", "has no function 'number'"),
        ("own_checks:gone", "has no function 'gone'"),
        ("nowhere_at_all:f", "nowhere_at_all"),
    ):
        with pytest.raises(ValueError, match=f"annotator.function={function}.*{said}"):
            Verifier(function)


def test_the_code_of_a_function_counts(checks):
    check = Verifier("own_checks:even")
    here = "align_loop.annotators"
    assert code_of(check) == [f"{here}.verifier.Verifier", "own_checks:even"]
    both = code_of(Ensemble({"a": Gold(), "b": check}))
    assert both == [f"{here}.ensemble.Ensemble", f"{here}.gold.Gold", f"{here}.verifier.Verifier", "own_checks:even"]


# --- simulated people ---------------------------------------------------------------------------------------------


def quality(answers):
    return {row["sample_id"]: i % 7 / 6 for i, row in enumerate(answers)}


def test_exact_gold_is_the_quality(tmp_path):
    prompts, answers = made()
    got = Gold().annotate(job(tmp_path, (prompts, answers), gold=quality(answers)))
    assert rewards(got) == quality(answers) and got.pairwise == []
    with pytest.raises(UserError, match="not known"):
        Gold().annotate(job(tmp_path, (prompts, answers)))


def test_only_the_budget_is_labelled_and_by_chance_of_the_seed_alone(tmp_path):
    prompts, answers = made(n=2, count=20)

    def asked(rows=answers, seed=0, **fields):
        work = job(tmp_path, (prompts, rows), gold=quality(answers), seed=seed)
        found = {row["prompt_id"] for row in Gold(budget=5, **fields).annotate(work).scores}
        assert work.context.report["rows"]["prompts"] == {"in": 20, "out": 5, "dropped": {"outside the budget": 15}}
        return found

    assert asked() == asked(answers[::-1]) != asked(seed=1)
    assert asked(select="first") == asked(select="first", seed=1) == set(sorted({p["prompt_id"] for p in prompts})[:5])
    everything = Gold(budget=99).annotate(job(tmp_path, (prompts, answers), gold=quality(answers)))
    assert len(everything.scores) == 40


def test_coins_are_thrown_as_bradley_and_terry_say(tmp_path):
    prompts, answers = made(n=2, count=600)
    gold = {row["sample_id"]: 0.75 if row["k"] else 0.25 for row in answers}
    for sharpness in (1.0, 4.0, 100.0):
        got = Gold(sharpness=sharpness).annotate(job(tmp_path, (prompts, answers), gold=gold))
        right = fmean(1 - row["p_first"] for row in got.pairwise)  # the second of a pair is the better one
        expected = 1 / (1 + math.exp(-sharpness / 2))
        assert right == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 600) + 1e-9)
        scores = rewards(got)
        for row in got.pairwise:
            won = scores[row["first_sample_id"]] > scores[row["second_sample_id"]]
            assert row["p_first"] in (0.0, 1.0) and won == (row["p_first"] == 1.0)


def test_every_field_of_gold_matters(tmp_path):
    prompts, answers = made(n=3, count=8)
    gold = quality(answers)
    part_ = Gold(budget=4, sharpness=2.0)
    before = outcome(part_.annotate(job(tmp_path, (prompts, answers), gold=gold)))
    for name, new in knobs(part_, budget=5, select="first", sharpness=None):
        assert outcome(new.annotate(job(tmp_path, (prompts, answers), gold=gold))) != before, name
    again = job(tmp_path, (prompts[::-1], answers[::-1]), gold=gold)
    assert outcome(part_.annotate(again)) == before
    for fields, said in (({"budget": 0}, "annotator.budget=0"), ({"sharpness": 0.0}, "annotator.sharpness=0")):
        with pytest.raises(ValueError, match=said):
            Gold(**fields)


# --- ensembles ----------------------------------------------------------------------------------------------------


@dataclass
class Fixed:
    """Scores and comparisons as given: sample id -> reward, and (first, second, p)."""

    table: dict = field(default_factory=dict)
    pairs: list = field(default_factory=list)
    cost: float | None = None
    model: str = "policy"

    def roles(self):
        return {"judge": self.model}

    def annotate(self, job):
        job.context.tokens(10)
        job.context.fact("read", str(job.models["judge"]))
        by_id = {row["sample_id"]: row for row in job.answers}
        rows = [score_row(by_id[i], r, cost=self.cost) for i, r in self.table.items()]
        return Annotation(rows, [pair_row(by_id[a], by_id[b], p) for a, b, p in self.pairs])


def ensemble_job(tmp_path):
    prompts, answers = made(n=2, count=2)
    models = {"members.a.judge": "A", "members.b.judge": "B"}
    return job(tmp_path, (prompts, answers), models), [row["sample_id"] for row in answers]


def test_mean_and_spread_by_hand(tmp_path):
    work, (w, x, y, z) = ensemble_job(tmp_path)
    first = Fixed({w: 1.0, x: 3.0, y: 5.0}, [(w, x, 0.2), (y, z, 0.5)], cost=0.5)
    second = Fixed({z: 9.0, y: 40.0, x: 20.0, w: 30.0}, [(x, w, 0.6)], model="initial")
    got = Ensemble({"a": first, "b": second}, normalise=False).annotate(work)
    rows = {row["sample_id"]: row for row in got.scores}
    assert rewards(got) == {w: 15.5, x: 11.5, y: 22.5}  # z is scored by one member alone
    assert [rows[i]["reward_sd"] for i in (w, x, y)] == [14.5, 8.5, 17.5]
    assert rows[w]["cost"] == 0.5 and work.context.report["tokens"] == 20
    assert compared(got) == {(w, x): pytest.approx(0.3), (x, w): pytest.approx(0.7)}
    report = work.context.report["facts"]
    assert (report["members.a: read"], report["members.b: read"], report["members.a: answers scored"]) == ("A", "B", 3)
    normal = Ensemble({"a": first, "b": second}).annotate(work)
    step = math.sqrt(1.5)  # 1, 3, 5 become -step, 0, step
    assert rewards(normal) == pytest.approx({w: -step / 2, x: -step / 2, y: step})
    assert standardised([]) == [] and standardised([2.0, 2.0]) == [0.0, 0.0]


def test_members_are_parts_with_their_own_models_gold_and_code(tmp_path):
    members = {"a": Fixed(), "b": Gold()}
    whole = Ensemble(members)
    assert whole.roles() == {"members.a.judge": "policy"} and whole.needs_gold and whole.files() == {}
    assert not Ensemble({"a": Fixed(), "b": Fixed()}).needs_gold
    assert code_of(whole)[1:3] == [f"{__name__}.Fixed", "align_loop.annotators.gold.Gold"]
    node = node_of(whole)
    assert node["members"]["b"]["_target_"] == "align_loop.annotators.gold.Gold"
    assert part(node, "annotator") == whole
    with pytest.raises(ValueError, match="annotator.members has 1"):
        Ensemble({"a": Fixed()})
    work, ids = ensemble_job(tmp_path)
    table = Fixed({i: float(n * n) for n, i in enumerate(ids)})
    one = Ensemble({"a": table, "b": Fixed({i: float(n) for n, i in enumerate(ids)})})
    other = {"a": table, "b": Fixed(dict.fromkeys(ids, 1.0))}
    before = outcome(one.annotate(work))
    for name, new in knobs(one, members=other, normalise=False):
        assert outcome(new.annotate(work)) != before, name


def test_an_ensemble_runs_as_a_stage(tmp_path):
    prompts, answers = made()
    (tmp_path / "sample").mkdir()
    (tmp_path / "gold").mkdir()
    write_table(tmp_path / "sample" / "answers.parquet", answers, ANSWERS)
    write_table(tmp_path / "prompts.parquet", prompts, PROMPTS)
    rows = [{"sample_id": s, "prompt_id": "p", "gold": g} for s, g in quality(answers).items()]
    write_table(tmp_path / "gold" / "gold.parquet", rows, GOLD)
    whole = Ensemble({"self": ImplicitReward(), "person": Gold(budget=2)})
    models = {
        f"members.self.{name}": tiny_llama(tmp_path / name, seed=i) for i, name in enumerate(("policy", "reference"))
    }
    inputs = {"answers": tmp_path / "sample", "prompts": tmp_path / "prompts.parquet", "gold": tmp_path / "gold"}
    (tmp_path / "out").mkdir()
    context = StageContext("s", tmp_path / "out", hardware={"device": "cpu"}, quiet=True)
    assert set(whole.roles()) == set(models)
    annotate({"annotator": node_of(whole), "dtype": "float32", "seed": 0}, inputs | models, context)
    scores = read_rows(tmp_path / "out" / "scores.parquet")
    assert len(scores) == 6 and all(row["reward_sd"] >= 0 and row["logp_reference"] < 0 for row in scores)
    assert context.report["rows"]["answers"] == {"in": 12, "out": 6, "dropped": {"not scored": 6}}
    assert context.report["rows"]["members.person: prompts"] == {
        "in": 4,
        "out": 2,
        "dropped": {"outside the budget": 2},
    }
