"""Annotators that read how likely something is: density ratios and follow-ups, against naive passes."""

import pytest
from annotator_fixtures import all_logprobs, job, judge_folder, knobs, made, outcome, rewards
from tiny import EOS_ID, tiny_llama

from align_loop.annotators.density_ratio import DensityRatio
from align_loop.annotators.followup import FollowupLikelihood
from align_loop.annotators.implicit_reward import ImplicitReward
from align_loop.annotators.judging import Reader
from align_loop.errors import UserError
from align_loop.render import Renderer
from align_loop.stage import StageContext

GOOD, BAD = ["w30 w31 w32", "w33"], ["w40 w41"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_llama(folder / name, seed=i) for i, name in enumerate(("strong", "weak"))}


def logprob(folder, before, after):
    """Sum of the log-probs of ``after`` behind ``before``."""
    values = all_logprobs(folder, before + after)
    return sum(values[len(before) - 1 + t, token].item() for t, token in enumerate(after))


def test_the_ratio_is_a_difference_of_log_probs_under_two_prompts(models, tmp_path):
    prompts, answers = made()
    got = DensityRatio(criteria="w50 w51").annotate(job(tmp_path, (prompts, answers), models))
    scores = {row["sample_id"]: row for row in got.scores}
    messages = {p["prompt_id"]: p["messages"] for p in prompts}
    for row in answers:
        told = [{"role": "system", "content": "w50 w51"}, *messages[row["prompt_id"]]]
        strong = logprob(models["strong"], Renderer(models["strong"]).prompt_ids(told), row["token_ids"])
        weak = logprob(models["weak"], row["prompt_token_ids"], row["token_ids"])
        found = scores[row["sample_id"]]
        assert (found["logp_policy"], found["logp_reference"]) == pytest.approx((strong, weak), abs=1e-4)
        assert found["reward"] == pytest.approx(strong - weak, abs=1e-4)


def test_without_criteria_it_is_the_implicit_reward_at_beta_one(models, tmp_path):
    tables = made()
    ratio = DensityRatio().annotate(job(tmp_path, tables, models))
    two = {"policy": models["strong"], "reference": models["weak"]}
    implicit = ImplicitReward(beta=1.0).annotate(job(tmp_path, tables, two))
    assert rewards(ratio) == pytest.approx(rewards(implicit), abs=1e-4)


def test_criteria_that_are_empty_are_none(models, tmp_path):
    tables = made(count=2)
    before = rewards(DensityRatio().annotate(job(tmp_path, tables, models)))
    assert rewards(DensityRatio(criteria="").annotate(job(tmp_path, tables, models))) == before


def test_models_that_are_the_same_are_refused(models, tmp_path):
    with pytest.raises(ValueError, match="annotator.strong=policy is annotator.weak"):
        DensityRatio(weak="policy")
    assert DensityRatio(weak="policy", criteria="w50").roles() == {"strong": "policy", "weak": "policy"}
    same = {"strong": models["strong"], "weak": models["strong"]}
    with pytest.raises(UserError, match="annotator.strong=policy.*rewards are 0"):
        DensityRatio().annotate(job(tmp_path, made(), same))


def test_follow_ups_are_read_as_the_users_next_turn(models, tmp_path):
    prompts, answers = made()
    work = job(tmp_path, (prompts, answers), {"judge": models["strong"]})
    got = rewards(FollowupLikelihood(positive=GOOD, negative=BAD).annotate(work))
    renderer = Renderer(models["strong"])
    user = renderer.tokenizer.convert_tokens_to_ids("<user>")
    for row in answers:
        body = row["token_ids"][: -1 if row["finish_reason"] == "stop" else None]
        before = [*row["prompt_token_ids"], *body, EOS_ID, user]  # what the tiny template makes of it
        mean = {}
        for text in (*GOOD, *BAD):
            after = renderer.answer_ids(text)[:-1]
            mean[text] = logprob(models["strong"], before, after) / len(after)
        expected = (mean[GOOD[0]] + mean[GOOD[1]]) / 2 - mean[BAD[0]]
        assert got[row["sample_id"]] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("part", [DensityRatio(), FollowupLikelihood(positive=GOOD, negative=BAD)])
def test_neither_batches_nor_row_order_matter(models, tmp_path, part):
    prompts, answers = made()
    given = models | {"judge": models["strong"]}
    whole = rewards(part.annotate(job(tmp_path, (prompts, answers), given)))
    for rows, budget in ((answers, 1), (answers[::-1], 60), (answers[5:] + answers[:5], 16384)):
        assert rewards(part.annotate(job(tmp_path, (prompts, rows), given, budget))) == pytest.approx(whole, abs=1e-4)


def test_every_field_matters(models, tmp_path):
    tables = made()
    part = DensityRatio(strong="initial", weak="previous")
    before = outcome(part.annotate(job(tmp_path, tables, models)))
    for name, new in knobs(part, strong="policy", weak="policy", criteria="w50"):
        swapped = {"strong": models["weak"], "weak": models["strong"]} if name in new.roles() else models
        assert outcome(new.annotate(job(tmp_path, tables, swapped))) != before, name
        assert new.roles() == {"strong": new.strong, "weak": new.weak}
    part = FollowupLikelihood(positive=GOOD, negative=BAD)
    before = outcome(part.annotate(job(tmp_path, tables, {"judge": models["strong"]})))
    for name, new in knobs(part, judge="initial", positive=["w30"], negative=[], per_token=False):
        folder = models["weak"] if name == "judge" else models["strong"]
        assert outcome(new.annotate(job(tmp_path, tables, {"judge": folder}))) != before, name
        assert new.roles() == {"judge": new.judge}


def test_an_answer_too_long_for_a_model_is_counted(models, tmp_path):
    prompts, answers = made(n=2)
    answers[1] |= {"text": " ".join(["w30"] * 252), "token_ids": [30] * 252}
    for part in (DensityRatio(), FollowupLikelihood(positive=GOOD, negative=BAD)):
        work = job(tmp_path, (prompts, answers), models | {"judge": models["strong"]})
        assert answers[1]["sample_id"] not in rewards(part.annotate(work))
        counted = work.context.report["rows"]["judged answers"]
        assert counted == {"in": 8, "out": 7, "dropped": {"prompt too long for the judge": 1}}


def test_a_judge_with_other_tokens_reads_the_text_anew(models, tmp_path):
    other = judge_folder(tmp_path / "other", seed=1)  # id 60 is the word A here
    reader = Reader(other, "float32", StageContext("s", tmp_path, {"device": "cpu"}))
    row = {"text": "w20 w21", "token_ids": [20, 21, EOS_ID], "finish_reason": "stop"}
    assert reader.answer_ids(row) == [20, 21, EOS_ID]
    assert reader.answer_ids(row | {"token_ids": [20, 21], "finish_reason": "length"}) == [20, 21]
    assert reader.answer_ids(row | {"text": "A", "token_ids": [33, EOS_ID]}) == [60, EOS_ID]
    assert reader.answer_ids(row | {"text": "w20", "token_ids": [999, 2]}) == [20, EOS_ID]  # no such id here
    assert reader.answer_ids(row | {"text": "w20", "token_ids": [20, 63]})[-1] == EOS_ID  # its own end


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"positive": [], "negative": []}, "both empty"),
        ({"positive": ["  "]}, "annotator.positive"),
        ({"negative": ["x "]}, "annotator.negative"),
    ],
)
def test_wrong_follow_ups_are_named(fields, said):
    with pytest.raises(ValueError, match=said):
        FollowupLikelihood(**fields)


def test_a_template_that_changes_the_follow_up_is_refused(tmp_path):
    folder = tiny_llama(tmp_path / "m")
    file = folder / "chat_template.jinja"
    assert "m['content']" in file.read_text()
    file.write_text(file.read_text().replace("m['content']", "m['content'] | upper"))
    with pytest.raises(UserError, match="changes the text 'w30'"):
        Renderer(folder).followed_by([{"role": "user", "content": "w20"}], "w30")
