"""The stage that trains a policy on pairs: from two checkpoint folders and a table of examples to a new folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from trl import DPOConfig

from align_loop import record
from align_loop.errors import UserError
from align_loop.objectives.noise import NoiseHandling
from align_loop.objectives.pair import PairObjective
from align_loop.stage import StageContext
from align_loop.trainers import lora as adapters
from align_loop.trainers.common import EpochSampler, attach, set_threads, trainer_arguments
from align_loop.trainers.config import LoraConfig, TrainingConfig
from align_loop.trainers.models import (
    dtype_of,
    load_model,
    load_tokenizer,
    position_limit,
    save_model_folder,
)
from align_loop.trainers.pair_data import pair_rows
from align_loop.trainers.pair_trainer import PairTrainer

Example = dict[str, Any]
STEP0_LIMIT = {"float32": 1e-3, "bfloat16": 0.05}  # nats


def train_pairs(
    *,
    policy_dir: Path,
    reference_dir: Path,
    examples: list[Example],
    out: Path,
    objective: PairObjective,
    noise: NoiseHandling | None,
    iteration: int,
    training: TrainingConfig,
    lora: LoraConfig | None,
    adapter_dir: Path | None,
    seed: int,
    hardware: dict[str, Any],
    context: StageContext,
    base_dir: Path | None = None,
) -> None:
    """Train from ``policy_dir`` against ``reference_dir`` on ``examples`` (rows of ``record.EXAMPLES``).

    Writes ``out/model`` (a plain Hugging Face folder), ``out/flags.parquet`` (``record.FLAGS``) and, with ``lora``,
    ``out/adapter``. Under LoRA the policy is the model of ``base_dir`` (the SFT model; ``policy_dir`` where it is
    None) with the adapter of ``adapter_dir`` (None: a fresh one), and ``reference_dir`` says which reference is meant:
    ``policy_dir`` the frozen copy of that adapter, ``base_dir`` the adapter switched off.

    Raises ``UserError`` for examples that can't be trained on, ``RuntimeError`` where the reference is the
    starting policy and yet their margins aren't 0 at the first step.
    """
    if not examples:
        raise UserError("no training pairs: every pair was filtered out, or the seed data is empty")
    set_threads(hardware)
    start = _start(policy_dir, reference_dir, base_dir, adapter_dir, lora, seed, hardware)
    tokenizer = load_tokenizer(policy_dir)

    def check_start(margin: float) -> None:
        context.fact("step0_margin", margin)
        limit = STEP0_LIMIT[hardware.get("dtype") or "float32"]
        if start.reference_is_policy and not margin <= limit:
            raise RuntimeError(
                f"policy {policy_dir} and reference {reference_dir} should be the same model, but the margins of "
                f"the first step's pairs are {margin:.3g} nats on average (allowed: {limit}): one was loaded wrongly"
            )

    with context.progress(int(len(examples) * training.epochs), "pairs") as progress:
        trainer = build_trainer(
            start=start,
            tokenizer=tokenizer,
            examples=examples,
            out=out,
            objective=objective,
            noise=noise,
            iteration=iteration,
            training=training,
            seed=seed,
            hardware=hardware,
            check_start=check_start,
        )
        attach(trainer, context, progress, training.batch_size)
        trainer.train()
    if trainer.is_world_process_zero():
        _save(trainer, start, examples, out, hardware, context)
    trainer.accelerator.wait_for_everyone()
    context.rows("pairs", into=len(examples), out=len(examples))
    context.tokens(int(training.epochs * sum(map(_tokens, examples))))


@dataclass
class Start:
    """The models that a training begins with, and what was loaded beside them."""

    model: PreTrainedModel
    reference: PreTrainedModel | None  # None: the policy with another state of its adapter
    freeze_adapter: bool  # the reference is a frozen copy of the adapter, not the adapter switched off
    reference_is_policy: bool


def _start(
    policy_dir: Path,
    reference_dir: Path,
    base_dir: Path | None,
    adapter_dir: Path | None,
    lora: LoraConfig | None,
    seed: int,
    hardware: dict[str, Any],
) -> Start:
    same = policy_dir.resolve() == reference_dir.resolve()
    if lora is None:
        model, reference = load_model(policy_dir, hardware), load_model(reference_dir, hardware)
        return Start(model, reference, False, same)
    base_dir = policy_dir if base_dir is None else base_dir
    off = reference_dir.resolve() == base_dir.resolve()
    if adapter_dir is None and policy_dir.resolve() != base_dir.resolve():
        raise ValueError(f"LoRA: policy {policy_dir} is not the base {base_dir}, so its adapter_dir must be given")
    if adapter_dir is not None and policy_dir.resolve() == base_dir.resolve():
        raise ValueError(f"LoRA: adapter {adapter_dir} needs its base: give base_dir (the SFT model) beside policy_dir")
    if not (off or same):
        raise ValueError(f"LoRA: reference {reference_dir} must be the policy {policy_dir} or the base {base_dir}")
    base = load_model(base_dir, hardware)
    model = adapters.with_adapter(base, lora, adapter_dir, seed)
    return Start(model, None, not off, same)


def build_trainer(
    *,
    start: Start,
    tokenizer: Any,
    examples: list[Example],
    out: Path,
    objective: PairObjective,
    noise: NoiseHandling | None,
    iteration: int,
    training: TrainingConfig,
    seed: int,
    hardware: dict[str, Any],
    check_start: Callable[[float], None] | None = None,
    **overrides: Any,
) -> PairTrainer:
    """The trainer of ``train_pairs``; ``overrides`` are further fields of ``DPOConfig``."""
    settings = trainer_arguments(training, hardware, out, seed, len(examples))
    arguments = DPOConfig(**{**settings, "beta": objective.beta, **overrides})
    world = arguments.world_size
    sampler = EpochSampler(len(examples), seed, arguments.per_device_train_batch_size * world if world > 1 else 1)
    rows = pair_rows(examples, objective.beta, position_limit(start.model), sampler.padding > 0)
    noisy = noise is not None and noise.enabled
    trainer = PairTrainer(
        model=start.model,
        ref_model=start.reference,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        ids=[row["example_id"] for row in examples],
        sampler=sampler,
        noise=noise,
        lam=noise.decoupling_for(iteration) if noisy else 0.0,
        check_start=check_start,
    )
    if start.reference is None and not start.freeze_adapter:
        trainer.model.delete_adapter(adapters.REFERENCE_ADAPTER)  # TRL adds it to every adapted model
    return trainer


def _save(
    trainer: PairTrainer,
    start: Start,
    examples: list[Example],
    out: Path,
    hardware: dict[str, Any],
    context: StageContext,
) -> None:
    """Write the trained policy, its adapter under LoRA, and the flags."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer = trainer.processing_class
    if start.reference is None:
        probes = adapters.probes_of(examples)
        adapters.save_adapter(model, out / "adapter")
        adapted = adapters.probe_logprobs(model.eval(), probes)
        save_model_folder(model.merge_and_unload(safe_merge=True), tokenizer, out / "model")
        merged = adapters.probe_logprobs(load_model(out / "model", hardware).to(model.device).eval(), probes)
        context.fact("merge_probe", adapters.prove_merge(adapted, merged, dtype_of(hardware)))
    else:
        save_model_folder(model, tokenizer, out / "model")
    rows = trainer.flags.rows if trainer.flags is not None else []
    record.write_table(out / "flags.parquet", rows, record.FLAGS)
    shutil.rmtree(out / "trainer", ignore_errors=True)


def _tokens(row: Example) -> int:
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
