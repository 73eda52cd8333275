"""The sampler: seeds of their own, no row lost, and cut answers treated as asked for."""

import itertools

import pytest
from tiny import EOS_ID, tiny_llama

from align_loop.engines.base import release_engines
from align_loop.record import ANSWERS, PROMPTS, prompt_id, read_rows, request_seed, write_table
from align_loop.samplers.policy import CUT, TOO_LONG, PolicySampler, Run, sample
from align_loop.stage import StageContext

RUN = {"seed": 3, "iteration": 2, "dtype": "float32", "max_length": 24}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    yield tiny_llama(tmp_path_factory.mktemp("model"), scale=0.4)
    release_engines()


def prompts(count=6, words=3):
    texts = [" ".join(f"w{7 + (i * 5 + j) % 57}" for j in range(words)) for i in range(count)]
    messages = [[{"role": "user", "content": text}] for text in texts]
    return [{"prompt_id": prompt_id(m), "messages": m} for m in messages]


def answers(model, rows, tmp_path, run=RUN, **config):
    """What the stage writes, and its report."""
    out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    write_table(out / "prompts.parquet", rows, PROMPTS)
    node = {"_target_": "align_loop.samplers.policy.PolicySampler", "engine": "hf", "temperature": 1.0, **config}
    context = StageContext("sample", out, hardware={"device": "cpu", "threads": 1}, quiet=True)
    inputs = {"prompts": out / "prompts.parquet", "policy": model}
    sample({"sampler": {"max_new_tokens": 8} | node, "run": run}, inputs, context)
    return read_rows(out / "answers.parquet"), context.report


def test_every_prompt_has_its_n_answers_in_order_of_prompt_id(model, tmp_path):
    rows, report = answers(model, prompts(), tmp_path, n=3)
    assert [(r["prompt_id"], r["k"]) for r in rows] == sorted(
        itertools.product([p["prompt_id"] for p in prompts()], range(3))
    )
    assert len({r["sample_id"] for r in rows}) == 18
    assert report["rows"] == {
        "prompts": {"in": 6, "out": 6, "dropped": {}},
        "answers": {"in": 18, "out": 18, "dropped": {}},
    }
    assert report["tokens"] == sum(len(r["token_ids"]) for r in rows)
    for row in rows:
        assert row["request_seed"] == request_seed(3, 2, row["prompt_id"], row["k"])
        assert len(row["logprobs"]) == len(row["token_ids"]) and max(row["logprobs"]) <= 0
        assert (row["finish_reason"] == "stop") == (row["token_ids"][-1] == EOS_ID)
        assert row["prompt_token_ids"][0] == 1 and len(row["prompt_token_ids"]) == 6  # BOS, role, three words, role


def test_the_order_and_the_company_of_a_prompt_change_nothing(model, tmp_path):
    rows, _ = answers(model, prompts(), tmp_path, n=2)
    assert answers(model, prompts()[::-1], tmp_path, n=2)[0] == rows
    few, _ = answers(model, prompts()[1:3], tmp_path, n=2)
    by_sample = {r["sample_id"]: r for r in rows}
    assert len(few) == 4
    for row in few:
        assert row["token_ids"] == by_sample[row["sample_id"]]["token_ids"]
    chunked, _ = answers(model, prompts(), tmp_path, n=2, chunk=1)
    assert [r["token_ids"] for r in chunked] == [r["token_ids"] for r in rows]


def test_a_longer_run_of_answers_begins_with_the_shorter(model, tmp_path):
    one, _ = answers(model, prompts(), tmp_path, n=1)
    three, _ = answers(model, prompts(), tmp_path, n=3)
    assert [r["token_ids"] for r in three if r["k"] == 0] == [r["token_ids"] for r in one]


@pytest.mark.parametrize("change", [{"seed": 4}, {"iteration": 3}])
def test_seed_and_iteration_give_other_draws(change, model, tmp_path):
    rows, _ = answers(model, prompts(), tmp_path, n=1)
    other, _ = answers(model, prompts(), tmp_path, run=RUN | change, n=1)
    assert [r["request_seed"] for r in rows] != [r["request_seed"] for r in other]
    assert [r["token_ids"] for r in rows] != [r["token_ids"] for r in other]
    samples = {r["sample_id"] for r in rows} & {r["sample_id"] for r in other}
    assert bool(samples) == (change == {"seed": 4})  # sample ids name the iteration, so rounds can be joined


def test_prompts_that_do_not_fit_are_counted(model, tmp_path):
    long = prompts(count=2, words=14)  # 17 tokens; 24 - 8 are allowed
    fits = prompts(count=1, words=13)
    rows, report = answers(model, [*prompts(), *long, *fits], tmp_path, n=2)
    assert report["rows"]["prompts"] == {"in": 9, "out": 7, "dropped": {TOO_LONG: 2}}
    assert {r["prompt_id"] for r in rows} == {p["prompt_id"] for p in [*prompts(), *fits]}


def test_what_becomes_of_answers_that_were_cut(model, tmp_path):
    given = {"n": 4, "max_new_tokens": 6}
    kept, _ = answers(model, prompts(), tmp_path, **given)
    cut = {r["sample_id"] for r in kept if r["finish_reason"] == "length"}
    assert 0 < len(cut) < len(kept)  # both kinds are there, or this test shows nothing
    assert all(EOS_ID not in r["token_ids"] for r in kept if r["sample_id"] in cut)  # no end that it didn't generate
    dropped, report = answers(model, prompts(), tmp_path, truncated="drop", **given)
    assert dropped == [r for r in kept if r["sample_id"] not in cut]
    assert report["rows"]["answers"] == {"in": len(kept), "out": len(dropped), "dropped": {CUT: len(cut)}}
    ended, _ = answers(model, prompts(), tmp_path, truncated="append_eos", **given)
    for was, now in zip(kept, ended, strict=True):
        extra = [EOS_ID] if was["sample_id"] in cut else []
        assert now["token_ids"] == was["token_ids"] + extra
        assert now["logprobs"] == was["logprobs"] + [None] * len(extra)
        assert now["finish_reason"] == was["finish_reason"]


def test_no_prompts_no_answers(model, tmp_path):
    rows, report = answers(model, [], tmp_path)
    assert rows == [] and report["rows"]["answers"] == {"in": 0, "out": 0, "dropped": {}}


def test_log_probs_are_the_models_own_whatever_the_temperature(model, tmp_path):
    rows, _ = answers(model, prompts(), tmp_path, n=2, temperature=0.3)
    from align_loop.annotators.implicit_reward import answer_logprobs

    context = StageContext("s", tmp_path, hardware={"device": "cpu"}, quiet=True)
    scored = answer_logprobs(model, rows, "float32", context)
    assert [sum(r["logprobs"]) for r in rows] == pytest.approx(scored, abs=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"max_new_tokens": 0}, {"chunk": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_values_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"sampler.{next(iter(wrong))}="):
        PolicySampler(**wrong)


def test_greedy_is_for_one_answer():
    assert PolicySampler(n=1, temperature=0).temperature == 0
    with pytest.raises(ValueError, match="sampler.n=2"):
        PolicySampler(temperature=0)


def test_the_table_has_the_records_columns():
    assert Run(**RUN).iteration == 2 and "request_seed" in ANSWERS.names


def test_each_variant_has_answers_of_its_own_under_its_system_prompt(model, tmp_path):
    plain, _ = answers(model, prompts(), tmp_path, n=2)
    rows, report = answers(model, prompts(), tmp_path, n=2, variants={"short": "w50", "long": "w51 w52"})
    assert [r["variant"] for r in rows[:6]] == [None, None, "short", "short", "long", "long"]
    assert [r["k"] for r in rows[:6]] == [0, 1, 2, 3, 4, 5] and len({r["request_seed"] for r in rows}) == len(rows)
    ids = [(r["sample_id"], r["token_ids"]) for r in rows if r["variant"] is None]
    assert ids == [(r["sample_id"], r["token_ids"]) for r in plain]  # what is sampled beside them changes nothing
    assert all(r["variant"] is None for r in plain) and report["rows"]["answers"]["out"] == 36
    system = rows[2]["prompt_token_ids"]
    assert system[:3] == [1, 6, 50] and system[3:] == rows[0]["prompt_token_ids"][1:]


def test_a_variant_follows_the_system_prompt_that_is_there(model, tmp_path):
    messages = [{"role": "system", "content": "w20"}, {"role": "user", "content": "w30"}]
    rows, _ = answers(model, [{"prompt_id": "p", "messages": messages}], tmp_path, n=1, variants={"a": "w50"})
    assert rows[1]["prompt_token_ids"][:4] == [1, 6, 20, 50]


def test_a_prompt_that_a_variant_makes_too_long_is_counted(model, tmp_path):
    long = " ".join(["w50"] * 12)
    rows, report = answers(model, prompts(), tmp_path, n=1, variants={"long": long})
    assert rows == [] and report["rows"]["prompts"]["dropped"] == {TOO_LONG: 6}
