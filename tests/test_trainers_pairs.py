"""Training on pairs: parity with the stock trainer, exact global batches, noise handling, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from pair_fixtures import CPU, TRAINING, change, some_pairs, train, trainer_for, weights
from tiny import EOS_ID, PAD_ID, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import DPOConfig, DPOTrainer

from align_loop import record
from align_loop.errors import UserError
from align_loop.objectives.noise import NoiseHandling
from align_loop.trainers import policy as policy_module
from align_loop.trainers.common import EpochSampler, trainer_arguments
from align_loop.trainers.config import TrainingConfig
from align_loop.trainers.models import load_model, load_tokenizer
from align_loop.trainers.policy_trainer import PolicyTrainer


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("policy"), seed=0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("reference"), seed=1)


def stock_trainer(out: Path, policy: Path, reference: Path, examples: list[dict]) -> DPOTrainer:
    """TRL's own trainer on the same pairs as text."""
    tokenizer = load_tokenizer(policy)
    columns = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    rows = [{name: " " + tokenizer.decode(row[ids]) for name, ids in columns.items()} for row in examples]
    hardware = {**CPU, "micro_batch_size": 8}
    arguments = {**trainer_arguments(TRAINING, hardware, out, 5, len(rows)), "remove_unused_columns": True}
    return DPOTrainer(
        model=load_model(policy, CPU),
        ref_model=load_model(reference, CPU),
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def gradients(trainer: DPOTrainer, batch: dict) -> tuple[float, torch.Tensor]:
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    flat = torch.cat([p.grad.flatten() for _, p in sorted(trainer.model.named_parameters())])
    return loss.item(), flat


@pytest.mark.parametrize("noise", [None, NoiseHandling(alpha=0.0), NoiseHandling(action="none")])
def test_plain_loss_and_gradients_equal_the_stock_trainer(tmp_path, policy, reference, noise) -> None:
    examples = some_pairs(8)
    stock, ours = (
        stock_trainer(tmp_path, policy, reference, examples),
        trainer_for(tmp_path, policy, reference, examples, noise),
    )
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert stock.train_dataset[name] == [row[name] for row in examples]  # the same ids, or nothing is compared
    expected_loss, expected = gradients(stock, next(iter(stock.get_train_dataloader())))
    batches, _ = ours.get_batch_samples(iter(ours.get_train_dataloader()), 1, torch.device("cpu"))
    loss, found = gradients(ours, batches[0])
    assert loss == pytest.approx(expected_loss, rel=1e-6) and abs(loss - 0.693) > 0.1
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_a_whole_plain_training_equals_the_stock_trainer(tmp_path, policy) -> None:
    examples = some_pairs(24)
    stock = stock_trainer(tmp_path / "trl", policy, policy, examples)
    stock.train()
    stock.model.save_pretrained(tmp_path / "stock")
    train(tmp_path / "ours", policy, examples)
    assert change(policy, tmp_path / "ours" / "model", tmp_path / "stock") < 1e-3
    log = [json.loads(line) for line in (tmp_path / "ours" / "train_log.jsonl").read_text().splitlines()]
    theirs = [entry for entry in stock.state.log_history if "loss" in entry]
    for name in ("loss", "grad_norm", "learning_rate", "rewards/margins", "rewards/chosen", "logps/rejected"):
        assert [e[name] for e in log] == pytest.approx([e[name] for e in theirs], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("noise", [None, NoiseHandling(share=0.25, warmup=0.2)])
def test_the_micro_batch_changes_neither_weights_nor_flags(tmp_path, policy, noise) -> None:
    """20 pairs in batches of 8: the last batch of each epoch is short, where dividing by micro-batches goes wrong."""
    examples, training = some_pairs(20), TrainingConfig(learning_rate=2e-3, epochs=2, batch_size=8)
    for micro in (8, 4, 2, 1):
        train(tmp_path / str(micro), policy, examples, micro=micro, noise=noise, training=training)
    flags = [(r["example_id"], r["step"], r["flagged"]) for r in record.read_rows(tmp_path / "8" / "flags.parquet")]
    assert len(flags) == (40 if noise else 0)
    for micro in (4, 2, 1):
        out = tmp_path / str(micro)
        assert change(policy, out / "model", tmp_path / "8" / "model") <= 1e-4
        assert [(r["example_id"], r["step"], r["flagged"]) for r in record.read_rows(out / "flags.parquet")] == flags


@pytest.mark.parametrize("rule", ["batch", "paper_code"])
def test_the_fused_head_used_on_gpus_trains_the_same(tmp_path, policy, rule, monkeypatch) -> None:
    examples, noise = some_pairs(32), NoiseHandling(rule=rule, share=0.25, warmup=0.0)
    train(tmp_path / "logits", policy, examples, noise=noise)
    monkeypatch.setattr(PolicyTrainer, "_keeps_logits", property(lambda self: False))
    train(tmp_path / "fused", policy, examples, noise=noise)
    assert change(policy, tmp_path / "fused" / "model", tmp_path / "logits" / "model") <= 1e-4
    one, other = (record.read_rows(tmp_path / name / "flags.parquet") for name in ("logits", "fused"))
    margins = [[row["detector_margin"] for row in rows] for rows in (one, other)]
    assert margins[0] == pytest.approx(margins[1], abs=1e-4) and max(margins[0]) > 0.01


def test_the_detector_sees_the_extrapolated_margin(tmp_path, policy, reference) -> None:
    """Against a computation that shares no code with the trainer: one pair at a time, no padding, whole logits."""
    examples = some_pairs(4)
    noise = NoiseHandling(decoupling=[0.5], warmup=0.0)
    trainer = trainer_for(tmp_path, policy, reference, examples, noise, micro=2, max_steps=1)
    trainer.state.max_steps = 1
    trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (policy, reference)]

    def logprob(prompt: list[int], answer: list[int], lam: float | None) -> float:
        with torch.no_grad():
            h, h_ref = (m(torch.tensor([prompt + answer])).logits[0].double() for m in models)
        mixed = h_ref if lam is None else (1 + lam) * h - lam * h_ref
        table = mixed.log_softmax(-1)
        return sum(table[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))

    for row in trainer.flags.rows:
        pair = examples[int(row["example_id"][1:])]
        sides = [
            logprob(pair["prompt_ids"], pair[side], 0.5) - logprob(pair["prompt_ids"], pair[side], None)
            for side in ("chosen_ids", "rejected_ids")
        ]
        assert row["detector_margin"] == pytest.approx(0.1 * (sides[0] - sides[1]), abs=1e-4)


def test_lambda_0_gives_the_plain_margins_of_the_log(tmp_path, policy) -> None:
    noise = NoiseHandling(decoupling=[0.0], warmup=0.0)
    train(tmp_path, policy, some_pairs(24), noise=noise)
    log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    rows = record.read_rows(tmp_path / "flags.parquet")
    for step, entry in enumerate(log):
        margins = [row["detector_margin"] for row in rows if row["step"] == step]
        assert sum(margins) / len(margins) == pytest.approx(entry["rewards/margins"], abs=1e-5)


def test_dropped_pairs_have_no_gradient_and_still_count(tmp_path, policy, reference) -> None:
    """Dropping pairs equals giving the same pairs weight 0 by hand."""
    examples = some_pairs(8)
    noisy = trainer_for(tmp_path, policy, reference, examples, NoiseHandling(action="drop", share=0.25, warmup=0.0))
    noisy.state.max_steps = 1
    batches, _ = noisy.get_batch_samples(iter(noisy.get_train_dataloader()), 1, torch.device("cpu"))
    loss, found = gradients(noisy, batches[0])
    flagged = {row["example_id"] for row in noisy.flags.rows if row["flagged"]}
    assert len(flagged) == 2
    by_hand = [{**row, "w": 0.0 if row["example_id"] in flagged else 1.0} for row in examples]
    plain = trainer_for(tmp_path, policy, reference, by_hand)
    batches, _ = plain.get_batch_samples(iter(plain.get_train_dataloader()), 1, torch.device("cpu"))
    expected_loss, expected = gradients(plain, batches[0])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert torch.allclose(found, expected, atol=1e-6 * expected.abs().max().item())


def test_soft_labels_margins_weights_and_betas_reach_the_loss(tmp_path, policy, reference) -> None:
    examples = some_pairs(4)
    for row, values in zip(
        examples, [(0.8, 0.0, 1.0, 0.1), (1.0, 0.5, 2.0, None), (0.3, -1.0, 0.5, 0.7)], strict=False
    ):
        row.update(zip(("q", "m", "w", "beta"), values, strict=True))
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (policy, reference)]

    def ratio(row: dict, side: str) -> float:
        ids, start = torch.tensor([row["prompt_ids"] + row[side]]), len(row["prompt_ids"])
        with torch.no_grad():
            tables = [m(ids).logits[0, :-1].double().log_softmax(-1) for m in models]
        picked = [t.gather(1, ids[0, 1:, None])[start - 1 :].sum().item() for t in tables]
        return picked[0] - picked[1]

    expected = 0.0
    for row in examples:
        beta = 0.1 if row["beta"] is None else row["beta"]
        u = torch.tensor(beta * (ratio(row, "chosen_ids") - ratio(row, "rejected_ids")) - row["m"])
        p = torch.sigmoid(u)
        expected -= row["w"] * (row["q"] * p.log() + (1 - row["q"]) * (1 - p).log()).item() / 4
    trainer = trainer_for(tmp_path, policy, reference, examples, micro=4, training=TrainingConfig(1e-3, batch_size=4))
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    assert trainer.compute_loss(trainer.model, batches[0]).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rule", ["batch", "paper_code"])
def test_a_resumed_training_has_the_same_weights_and_flags_to_the_bit(tmp_path, policy, rule) -> None:
    examples, training = some_pairs(20), TrainingConfig(learning_rate=2e-3, epochs=2, batch_size=8)
    noise = NoiseHandling(rule=rule, share=0.25, warmup=0.2)
    settings = {"noise": noise, "micro": 4, "training": training, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_for(tmp_path, policy, policy, examples, **settings)
    whole.train()
    resumed = trainer_for(tmp_path, policy, policy, examples, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-4"))
    assert resumed.state.global_step == whole.state.global_step == 6
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert resumed.flags.rows == whole.flags.rows and len(whole.flags.rows) == 40


def test_a_training_of_one_step_trains(tmp_path, policy) -> None:
    """The first step of a warm-up has learning rate 0."""
    train(tmp_path, policy, some_pairs(8))
    assert not torch.equal(weights(tmp_path / "model"), weights(policy))


def test_margins_are_0_at_the_first_step_and_the_fact_is_kept(tmp_path, policy) -> None:
    context = train(tmp_path, policy, some_pairs(8))
    assert context.report["facts"]["step0_margin"] == 0.0


def test_a_reference_that_is_not_the_policy_it_should_be_stops_the_training(
    tmp_path, policy, reference, monkeypatch
) -> None:
    """The fault: the second load of the same folder gives other weights."""
    loads = iter([policy, reference])
    monkeypatch.setattr(policy_module, "load_model", lambda path, hardware: load_model(next(loads), hardware))
    with pytest.raises(RuntimeError, match=f"{policy}.*{policy}"):
        train(tmp_path, policy, some_pairs(8))
    assert not (tmp_path / "model").exists()


def test_another_reference_is_no_fault(tmp_path, policy, reference) -> None:
    context = train(tmp_path, policy, some_pairs(8), reference=reference)
    assert context.report["facts"]["step0_margin"] > 1


def test_the_output_is_a_plain_folder_with_everything_to_sample_from(tmp_path, policy) -> None:
    GenerationConfig(eos_token_id=[EOS_ID, 9], bos_token_id=1).save_pretrained(tmp_path / "start")
    start = tmp_path / "start"
    for file in policy.iterdir():
        if file.name != "generation_config.json":
            (start / file.name).write_bytes(file.read_bytes())
    context = train(tmp_path / "out", start, some_pairs(8))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert model.generation_config.eos_token_id == [EOS_ID, 9]  # every stop id survives training
    assert model.generation_config.pad_token_id == model.config.pad_token_id == PAD_ID
    assert model.config.eos_token_id == EOS_ID and tokenizer.chat_template
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["flags.parquet", "model", "train_log.jsonl"]
    assert context.report["rows"]["pairs"] == {"in": 8, "out": 8, "dropped": {}}
    assert not torch.equal(weights(tmp_path / "out" / "model"), weights(policy))


def test_two_trainings_write_the_same_bytes(tmp_path, policy) -> None:
    for name in ("a", "b"):
        train(tmp_path / name, policy, some_pairs(16), noise=NoiseHandling(warmup=0.0))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert Path("train_log.jsonl") in files and Path("model/model.safetensors") in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_bfloat16_stays_bfloat16_and_small_updates_arrive(tmp_path, policy) -> None:
    """At this learning rate every single update is below half the distance between bfloat16 numbers."""
    training = TrainingConfig(learning_rate=2e-5, epochs=8, batch_size=8, schedule="constant", warmup_ratio=0.0)
    hardware = {**CPU, "dtype": "bfloat16", "micro_batch_size": 8}
    context = train(tmp_path, policy, some_pairs(32), training=training, hardware=hardware)
    assert context.report["facts"]["step0_margin"] <= 0.05
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    moved = (weights(tmp_path / "model") != weights(policy).bfloat16().double()).double().mean().item()
    assert moved > 0.1 and log[-1]["rewards/margins"] > 0.02


def test_a_diverged_training_stops_and_says_so(tmp_path, policy) -> None:
    training = TrainingConfig(learning_rate=1e30, epochs=4, batch_size=8, warmup_ratio=0.0)
    with pytest.raises(RuntimeError, match="diverged"):
        train(tmp_path, policy, some_pairs(8), training=training)


def test_gradient_checkpointing_changes_nothing(tmp_path, policy) -> None:
    noise, hardware = NoiseHandling(warmup=0.0), {**CPU, "micro_batch_size": 4, "gradient_checkpointing": True}
    train(tmp_path / "plain", policy, some_pairs(16), micro=4, noise=noise)
    train(tmp_path / "checkpointed", policy, some_pairs(16), noise=noise, hardware=hardware)
    assert change(policy, tmp_path / "checkpointed" / "model", tmp_path / "plain" / "model") <= 1e-5


def test_deepspeed_does_not_round_the_record_to_its_dtype(tmp_path, policy, monkeypatch) -> None:
    """The trainer's base class casts float inputs under DeepSpeed; stands in for it with the flag and the plugin."""
    trainer = trainer_for(tmp_path, policy, policy, [{**row, "m": 0.123456} for row in some_pairs(8)])
    batch = {**next(iter(trainer.get_train_dataloader())), "reference_logprobs": torch.ones(16)}
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin, raising=False)
    batch = trainer._prepare_inputs(batch)
    assert batch["m"].tolist() == pytest.approx([0.123456] * 8, rel=1e-6)
    assert {batch[name].dtype for name in ("q", "m", "w", "beta", "reference_logprobs")} == {torch.float32}


def test_no_pairs_empty_answers_and_long_answers_are_the_users_to_mend(tmp_path, policy) -> None:
    with pytest.raises(UserError, match="no training pairs"):
        train(tmp_path, policy, [])
    with pytest.raises(UserError, match="e001.*rejected_ids has no tokens"):
        train(tmp_path, policy, [some_pairs(2)[0], {**some_pairs(2)[1], "rejected_ids": []}])
    with pytest.raises(UserError, match="e000.*257 tokens, the model takes 256"):
        train(tmp_path, policy, [{**some_pairs(1)[0], "prompt_ids": [7] * 250, "chosen_ids": [8] * 7}])


def test_the_micro_batch_must_divide_the_batch(tmp_path, policy) -> None:
    with pytest.raises(ValueError, match="batch_size 8 can't be divided into micro-batches of 3"):
        train(tmp_path, policy, some_pairs(8), micro=3)


def test_epochs_have_their_own_order_and_each_example_once() -> None:
    sampler = EpochSampler(10, seed=3, multiple=4)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again != second and len(sampler) == 12
    for order in (first, second):
        assert sorted(order[:10]) == list(range(10)) and order[10:] == [10, 10]


def test_every_epoch_of_a_training_trains_each_pair_once_in_another_order(tmp_path, policy) -> None:
    training = TrainingConfig(learning_rate=1e-3, epochs=3, batch_size=4)
    examples = some_pairs(8)
    train(tmp_path, policy, examples, micro=4, training=training, noise=NoiseHandling(warmup=0.0))
    rows = record.read_rows(tmp_path / "flags.parquet")
    halves = [{r["example_id"] for r in rows if r["step"] == step} for step in range(6)]
    for epoch in range(3):
        assert halves[2 * epoch] | halves[2 * epoch + 1] == {row["example_id"] for row in examples}
    assert len({frozenset(half) for half in halves[::2]}) > 1
