"""Supervised training: what is trained, how the loss is divided, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pair_fixtures import CPU, change, context_for, some_pairs, weights
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from align_loop.errors import UserError
from align_loop.trainers.config import LoraConfig, TrainingConfig
from align_loop.trainers.sft import train_sft

DEMONSTRATIONS = [(row["prompt_ids"], row["chosen_ids"]) for row in some_pairs(20)]
TRAINING = TrainingConfig(learning_rate=2e-3, epochs=2, batch_size=8)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("start"), seed=0)


def run(out: Path, model_dir: Path, micro: int = 8, demonstrations=DEMONSTRATIONS, **changes) -> tuple:
    context = context_for(out)
    arguments = {"training": TRAINING, "lora": None, "seed": 5, "hardware": {**CPU, "micro_batch_size": micro}}
    train_sft(model_dir=model_dir, demonstrations=demonstrations, out=out, context=context, **{**arguments, **changes})
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    return context, log


def answer_loss(directory: Path, demonstrations=DEMONSTRATIONS) -> float:
    """Mean negative log-probability over all answer tokens, one sequence at a time."""
    model, total, count = AutoModelForCausalLM.from_pretrained(directory), 0.0, 0
    for prompt, answer in demonstrations:
        with torch.no_grad():
            table = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        total -= sum(table[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        count += len(answer)
    return total / count


def test_the_loss_is_the_mean_over_the_answer_tokens_of_the_global_batch(tmp_path, start) -> None:
    for micro in (8, 2):
        training = TrainingConfig(learning_rate=1e-6, batch_size=8)
        _, log = run(tmp_path / str(micro), start, micro, DEMONSTRATIONS[:8], training=training)
        assert log[0]["loss"] == pytest.approx(answer_loss(start, DEMONSTRATIONS[:8]), rel=1e-5)


def test_the_micro_batch_does_not_change_the_weights(tmp_path, start) -> None:
    for micro in (8, 4, 1):
        run(tmp_path / str(micro), start, micro)
    for micro in (4, 1):
        assert change(start, tmp_path / str(micro) / "model", tmp_path / "8" / "model") <= 1e-4


def test_it_learns_the_answers_and_their_end(tmp_path, start) -> None:
    training = TrainingConfig(learning_rate=5e-3, epochs=40, batch_size=8)
    context, log = run(tmp_path, start, training=training, demonstrations=DEMONSTRATIONS[:8])
    assert answer_loss(tmp_path / "model", DEMONSTRATIONS[:8]) < 0.1 < log[0]["loss"]
    prompt, answer = DEMONSTRATIONS[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (
        model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)[0, len(prompt) :].tolist() == answer
    )
    assert context.report["rows"]["demonstrations"] == {"in": 8, "out": 8, "dropped": {}}
    assert context.report["tokens"] == 40 * sum(len(p) + len(a) for p, a in DEMONSTRATIONS[:8])


def test_the_folder_is_plain_and_the_log_is_the_same_each_time(tmp_path, start) -> None:
    for name in ("a", "b"):
        run(tmp_path / name, start)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["model", "train_log.jsonl"]
    assert (tmp_path / "a" / "model" / "chat_template.jinja").exists()
    assert torch.equal(weights(tmp_path / "a" / "model"), weights(tmp_path / "b" / "model"))
    assert (tmp_path / "a" / "train_log.jsonl").read_bytes() == (tmp_path / "b" / "train_log.jsonl").read_bytes()


def test_lora_is_merged_into_a_plain_folder(tmp_path, start) -> None:
    run(tmp_path, start, lora=LoraConfig(r=4, alpha=8), training=TrainingConfig(2e-2, epochs=4, batch_size=8))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert answer_loss(tmp_path / "model") < answer_loss(start) - 0.2


def test_data_that_cannot_be_trained_on_is_named(tmp_path, start) -> None:
    with pytest.raises(UserError, match="no demonstrations"):
        run(tmp_path, start, demonstrations=[])
    with pytest.raises(UserError, match="demonstration 1: prompt or answer has no tokens"):
        run(tmp_path, start, demonstrations=[([1], [2]), ([1], [])])
    with pytest.raises(UserError, match="demonstration 0: 257 tokens, the model takes 256"):
        run(tmp_path, start, demonstrations=[([7] * 200, [8] * 57)])
