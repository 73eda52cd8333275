"""LoRA: one adapter through two rounds, its frozen copy as the reference, merged copies that need no peft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pair_fixtures import CPU, change, how, some_pairs, train, weights
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from align_loop.objectives.noise import NoiseHandling
from align_loop.trainers import lora as adapters
from align_loop.trainers.config import LoraConfig, TrainingConfig
from align_loop.trainers.models import load_tokenizer
from align_loop.trainers.policy import Folders, build_trainer, load_start

LORA = LoraConfig(r=4, alpha=8)
TRAINING = TrainingConfig(learning_rate=2e-2, epochs=1, batch_size=8)
HARDWARE = {**CPU, "micro_batch_size": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), seed=0)


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first round: a fresh adapter on the base."""
    out = tmp_path_factory.mktemp("first")
    context = train(out, base, some_pairs(24), lora=LORA, training=TRAINING)
    assert context.report["facts"]["step0_margin"] <= 1e-3
    assert 0 <= context.report["facts"]["merge_probe"] <= 1e-3
    return out


def trainer(tmp_path: Path, base: Path, policy: Path, reference: Path, adapter: Path | None, **overrides):
    settings = how(noise=NoiseHandling(warmup=0.0, share=0.25), training=TRAINING, lora=LORA, hardware=HARDWARE)
    start = load_start(Folders(policy, reference, base, adapter), settings)
    return build_trainer(start, load_tokenizer(base), some_pairs(24, seed=1), tmp_path, settings, **overrides)


def first_batch(trainer_) -> dict:
    trainer_.state.max_steps = 3
    batches, _ = trainer_.get_batch_samples(iter(trainer_.get_train_dataloader()), 1, torch.device("cpu"))
    return batches[0]


def test_the_first_round_trains_the_adapter_and_writes_a_merged_folder(base, first) -> None:
    merged = AutoModelForCausalLM.from_pretrained(first / "model")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first / "adapter")
    ids = torch.tensor([[1, 20, 30, 40, 2]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)
    moved = (weights(first / "model") != weights(base)).double().mean().item()
    assert moved > 0.3


def test_the_adapter_folder_holds_the_trained_adapter_alone(first) -> None:
    assert sorted(p.name for p in (first / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((first / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ""  # where the run lay must not show in what it made


def test_the_merged_folder_is_like_the_base_and_needs_no_peft(base, first) -> None:
    assert {p.name for p in (first / "model").iterdir()} == {p.name for p in base.iterdir()}
    names = [set(load_file(path / "model.safetensors")) for path in (base, first / "model")]
    assert names[0] == names[1]


def test_the_second_round_starts_from_the_adapter_against_its_frozen_copy(tmp_path, base, first) -> None:
    context = train(
        tmp_path,
        first / "model",
        some_pairs(24, seed=1),
        lora=LORA,
        training=TRAINING,
        base=base,
        adapter=first / "adapter",
        noise=NoiseHandling(warmup=0.0),
    )
    assert context.report["facts"]["step0_margin"] <= 1e-3  # not the base: margins to that would be large
    assert not (tmp_path / "adapter" / "ref").exists()
    assert change(base, tmp_path / "model", first / "model") > 0.1
    log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["rewards/margins"] > 0.01


def test_reference_initial_is_the_adapter_switched_off(tmp_path, base, first) -> None:
    started = trainer(tmp_path, base, first / "model", base, first / "adapter")
    assert list(started.model.peft_config) == ["default"]
    batch = first_batch(started)
    found, _ = started._score_reference(batch, True)
    model = AutoModelForCausalLM.from_pretrained(base)
    expected, _ = started._score(model, batch, True)
    policy, _ = started._score(started.model, batch, True)
    assert torch.allclose(found, expected, atol=1e-4) and (policy - found).abs().max() > 0.1


def test_only_the_trained_adapter_moves_and_the_reference_stays(tmp_path, base, first) -> None:
    started = trainer(tmp_path, base, first / "model", first / "model", first / "adapter")
    before = {name: p.detach().clone() for name, p in started.model.named_parameters()}
    started.train()
    moved = {name for name, p in started.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".default." in name for name in moved)
    assert any(".ref." in name for name in before)


def test_a_resumed_training_has_the_same_adapter_to_the_bit(tmp_path, base, first) -> None:
    runs = []
    for resume in (None, str(tmp_path / "trainer" / "checkpoint-2")):
        run = trainer(
            tmp_path, base, first / "model", first / "model", first / "adapter", save_strategy="steps", save_steps=2
        )
        run.train(resume_from_checkpoint=resume)
        runs.append(run)
    for (name, one), (_, other) in zip(*(run.model.named_parameters() for run in runs), strict=True):
        assert torch.equal(one, other), name
    assert runs[0].flags.rows == runs[1].flags.rows


def test_gradient_checkpointing_changes_nothing(tmp_path, base, first) -> None:
    for name, on in (("plain", False), ("checkpointed", True)):
        train(
            tmp_path / name,
            first / "model",
            some_pairs(16, seed=1),
            lora=LORA,
            base=base,
            adapter=first / "adapter",
            noise=NoiseHandling(warmup=0.0),
            hardware={**HARDWARE, "micro_batch_size": 4, "gradient_checkpointing": on},
        )
    assert change(first / "model", tmp_path / "checkpointed" / "model", tmp_path / "plain" / "model") <= 1e-4


def test_a_merge_that_is_not_exact_is_refused() -> None:
    with pytest.raises(RuntimeError, match="0.5 nats"):
        adapters.prove_merge([-10.0, -20.0], [-10.0, -20.5], torch.float32)
    with pytest.raises(RuntimeError, match="nan nats"):
        adapters.prove_merge([-10.0], [float("nan")], torch.float32)
    assert adapters.prove_merge([-10.0, -20.0], [-10.01, -20.05], torch.bfloat16) == pytest.approx(0.05)


def test_folders_that_do_not_fit_together_are_refused(tmp_path, base, first) -> None:
    with pytest.raises(ValueError, match="needs its base"):
        train(tmp_path, base, some_pairs(8), lora=LORA, adapter=first / "adapter")
    with pytest.raises(ValueError, match="its adapter_dir must be given"):
        train(tmp_path, first / "model", some_pairs(8), lora=LORA, base=base)
    other = tiny_llama(tmp_path / "other", seed=9)
    with pytest.raises(ValueError, match="must be the policy .* or the base"):
        train(
            tmp_path,
            first / "model",
            some_pairs(8),
            lora=LORA,
            base=base,
            adapter=first / "adapter",
            reference=other,
        )
