"""Selfie's judge against a naive forward pass, and what must not change its labels."""

import random

import pytest
import torch
from tiny import EOS_ID, tiny_llama
from transformers import AutoModelForCausalLM

from align_loop.annotators.implicit_reward import ImplicitReward
from align_loop.annotators.job import Job
from align_loop.annotators.stage import annotate, gold
from align_loop.errors import UserError
from align_loop.prompts import embedded, world
from align_loop.record import ANSWERS, GOLD, PROMPTS, read_rows, short_digest, write_table
from align_loop.stage import RowsLost, StageContext


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"policy": tiny_llama(folder / "a", seed=1), "reference": tiny_llama(folder / "b", seed=2)}


def made_answers(n=3, count=5):
    """``n`` answers of different lengths to each of ``count`` prompts, some of them cut."""
    rng = random.Random(0)
    rows = []
    for i in range(count):
        prompt = [1, 4, *rng.choices(range(7, 64), k=3 + i), 5]
        for k in range(n):
            ids = rng.choices(range(7, 64), k=1 + (i * 3 + k * 5) % 11)
            cut = (i + k) % 3 == 0
            rows.append(
                {
                    "sample_id": short_digest(i, k),
                    "prompt_id": f"p{i}",
                    "k": k,
                    "prompt_token_ids": prompt,
                    "token_ids": ids if cut else [*ids, EOS_ID],
                    "finish_reason": "length" if cut else "stop",
                }
            )
    return rows


def naive_logprob(folder, row):
    """One answer at a time, no padding, straight from the definition."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt, answer = row["prompt_token_ids"], row["token_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer))


def score(models, rows, tmp_path, budget=16384, **config):
    context = StageContext("annotate", tmp_path, hardware={"device": "cpu", "score_token_budget": budget}, quiet=True)
    return ImplicitReward(**config).annotate(Job([], rows, models, "float32", 0, context)).scores, context


def test_the_reward_is_beta_times_the_difference_of_summed_log_probs(models, tmp_path):
    rows = made_answers(n=3)  # an odd number of answers is as good as an even one
    scored, context = score(models, rows, tmp_path, beta=0.3)
    assert [r["sample_id"] for r in scored] == [r["sample_id"] for r in rows]
    for row, got in zip(rows, scored, strict=True):
        policy, reference = (naive_logprob(models[name], row) for name in ("policy", "reference"))
        assert got["logp_policy"] == pytest.approx(policy, abs=1e-4)
        assert got["logp_reference"] == pytest.approx(reference, abs=1e-4)
        assert got["reward"] == pytest.approx(0.3 * (policy - reference), abs=1e-4)
        assert got["tokens"] == len(row["token_ids"])
    assert context.report["tokens"] == 2 * sum(len(r["prompt_token_ids"]) + len(r["token_ids"]) for r in rows)


def order_of(scored):
    """Sample ids of each prompt, best first: all that labels depend on."""
    ranked = sorted(scored, key=lambda r: (r["prompt_id"], -r["reward"]))
    return [r["sample_id"] for r in ranked]


def test_labels_do_not_depend_on_batches_order_or_the_padding_side(models, tmp_path):
    rows = made_answers(n=4)
    whole, _ = score(models, rows, tmp_path)
    rewards = {r["sample_id"]: r["reward"] for r in whole}
    for folder in models.values():  # a tokenizer that pads on the left must make no difference
        file = folder / "tokenizer_config.json"
        file.write_text(file.read_text().replace("{", '{"padding_side": "left",', 1))
    shuffled = random.Random(1).sample(rows, len(rows))
    for given, budget in ((rows, 1), (rows, 40), (shuffled, 60), (rows[::-1], 16384)):
        scored, _ = score(models, given, tmp_path, budget=budget)
        assert order_of(scored) == order_of(whole)
        assert {r["sample_id"]: r["reward"] for r in scored} == pytest.approx(rewards, abs=1e-5)


def test_beta_scales_and_never_relabels(models, tmp_path):
    rows = made_answers()
    small, large = (score(models, rows, tmp_path, beta=b)[0] for b in (0.1, 2.0))
    assert order_of(small) == order_of(large)
    assert [r["reward"] * 20 for r in small] == pytest.approx([r["reward"] for r in large])


def test_the_end_of_an_answer_counts(models, tmp_path):
    row = made_answers()[1]
    without = row | {"token_ids": row["token_ids"][:-1]}
    (a, b), _ = score(models, [row, without], tmp_path)
    assert row["token_ids"][-1] == EOS_ID and a["logp_policy"] < b["logp_policy"]


def test_a_judge_that_is_its_own_reference_is_refused(models, tmp_path):
    with pytest.raises(UserError, match="annotator.reference=initial.*rewards are 0"):
        score({"policy": models["policy"], "reference": models["policy"]}, made_answers(), tmp_path)
    assert score(models, [], tmp_path)[0] == []


def test_the_annotator_asks_for_two_roles_by_name():
    assert ImplicitReward().roles() == {"policy": "policy", "reference": "initial"}
    assert ImplicitReward(reference="previous").roles() == {"policy": "policy", "reference": "previous"}
    with pytest.raises(ValueError, match="annotator.beta=0"):
        ImplicitReward(beta=0)


def run_stage(stage, config, inputs, out):
    out.mkdir()
    context = StageContext("s", out, hardware={"device": "cpu"}, quiet=True)
    stage(config, inputs, context)
    return context.report


def test_the_stage_writes_scores_in_the_order_of_answers(models, tmp_path):
    (tmp_path / "sample").mkdir()
    write_table(tmp_path / "sample" / "answers.parquet", made_answers(), ANSWERS)
    node = {"_target_": "align_loop.annotators.implicit_reward.ImplicitReward", "reference": "initial", "beta": 0.1}
    write_table(tmp_path / "prompts.parquet", [], PROMPTS)
    inputs = {"answers": tmp_path / "sample", "prompts": tmp_path / "prompts.parquet", **models}
    report = run_stage(annotate, {"annotator": node, "dtype": "float32", "seed": 0}, inputs, tmp_path / "out")
    scores = read_rows(tmp_path / "out" / "scores.parquet")
    assert [s["sample_id"] for s in scores] == [a["sample_id"] for a in made_answers()]
    assert report["rows"]["answers"] == {"in": 15, "out": 15, "dropped": {}}


SKIPPER = """
from dataclasses import dataclass
from align_loop.annotators.job import Annotation

@dataclass
class Skipper:
    needs_gold = True
    def annotate(self, job):
        rows = [dict(sample_id=a["sample_id"], prompt_id=a["prompt_id"], reward=job.gold[a["sample_id"]])
                for a in job.answers[3::-1]]
        first, second = rows[0]["sample_id"], rows[1]["sample_id"]
        pair = dict(prompt_id=rows[0]["prompt_id"], first_sample_id=first, second_sample_id=second, p_first=0.75)
        return Annotation(rows, [pair])
"""


def test_answers_that_an_annotator_leaves_out_are_counted(tmp_path, monkeypatch):
    (tmp_path / "skipper.py").write_text(SKIPPER)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "sample").mkdir()
    write_table(tmp_path / "sample" / "answers.parquet", made_answers(), ANSWERS)
    (tmp_path / "gold").mkdir()
    write_table(tmp_path / "prompts.parquet", [], PROMPTS)
    golds = [{"sample_id": a["sample_id"], "prompt_id": "p", "gold": i / 20} for i, a in enumerate(made_answers())]
    write_table(tmp_path / "gold" / "gold.parquet", golds, GOLD)
    config = {"annotator": {"_target_": "skipper.Skipper"}, "dtype": "float32", "seed": 0}
    inputs = {"answers": tmp_path / "sample", "prompts": tmp_path / "prompts.parquet", "gold": tmp_path / "gold"}
    report = run_stage(annotate, config, inputs, tmp_path / "out")
    assert report["rows"]["answers"] == {"in": 15, "out": 4, "dropped": {"not scored": 11}}
    scores = read_rows(tmp_path / "out" / "scores.parquet")
    assert [s["sample_id"] for s in scores] == [a["sample_id"] for a in made_answers()[:4]]
    assert [s["reward"] for s in scores] == [0, 0.05, 0.1, 0.15]
    assert [row["p_first"] for row in read_rows(tmp_path / "out" / "pairwise.parquet")] == [0.75]


def test_gold_is_joined_by_prompt_and_not_by_position(tmp_path):
    rng = random.Random(0)
    seen = set()
    prompts = [embedded._prompt(rng, seen) for _ in range(4)]
    made = [
        {"sample_id": f"{i}", "prompt_id": p["prompt_id"], "text": world.compose(embedded.demands_of(p))}
        for i, p in enumerate(prompts)
    ]
    (tmp_path / "sample").mkdir()
    write_table(tmp_path / "prompts.parquet", prompts[::-1], PROMPTS)
    write_table(tmp_path / "sample" / "answers.parquet", [*made, made[0] | {"text": "", "sample_id": "e"}], ANSWERS)
    inputs = {"answers": tmp_path / "sample", "prompts": tmp_path / "prompts.parquet"}
    run_stage(gold, {"world": "align_loop.prompts.embedded"}, inputs, tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "gold.parquet")
    assert [(r["sample_id"], r["gold"]) for r in rows] == [("0", 1), ("1", 1), ("2", 1), ("3", 1), ("e", 0)]


LOSER = "def gold_rewards(prompts, answers):\n    return []\n"


def test_a_world_that_loses_answers_is_found_out(tmp_path, monkeypatch):
    (tmp_path / "loser.py").write_text(LOSER)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "sample").mkdir()
    write_table(tmp_path / "prompts.parquet", [], PROMPTS)
    write_table(tmp_path / "sample" / "answers.parquet", made_answers(), ANSWERS)
    inputs = {"answers": tmp_path / "sample", "prompts": tmp_path / "prompts.parquet"}
    with pytest.raises(RowsLost):
        run_stage(gold, {"world": "loser"}, inputs, tmp_path / "out")
