"""The stage that trains a policy on examples: from checkpoint folders and a table of examples to a new folder."""

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
from align_loop.objectives.objective import Objective
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
from align_loop.trainers.policy_data import policy_rows, tokens_of
from align_loop.trainers.policy_trainer import PolicyTrainer

Example = dict[str, Any]
STEP0_LIMIT = {"float32": 1e-3, "bfloat16": 0.05}  # nats


@dataclass
class Folders:
    """The checkpoints that a training starts from.

    Under LoRA the policy is the model of ``base`` (the SFT model; ``policy`` where it is None) with the adapter of
    ``adapter`` (None: a fresh one), and ``reference`` says which reference is meant: ``policy`` the frozen copy of that
    adapter, ``base`` the adapter switched off.
    """

    policy: Path
    reference: Path
    base: Path | None = None
    adapter: Path | None = None


@dataclass
class PolicyTraining:
    """How a policy is trained: everything but the folders and the examples. ``noise`` None: no detection."""

    objective: Objective
    noise: NoiseHandling | None
    iteration: int
    training: TrainingConfig
    lora: LoraConfig | None
    seed: int
    hardware: dict[str, Any]

    @property
    def noisy(self) -> bool:
        """Whether noisy pairs are looked for."""
        return self.noise is not None and self.noise.enabled

    @property
    def with_reference(self) -> bool:
        """Whether a reference model runs: for the loss, or for the noise detector."""
        return self.objective.needs_reference or self.noisy


def train_policy(
    folders: Folders, examples: list[Example], out: Path, how: PolicyTraining, context: StageContext
) -> None:
    """Train ``folders.policy`` against ``folders.reference`` on ``examples`` (rows of ``record.EXAMPLES``).

    Writes ``out/model`` (a plain Hugging Face folder), ``out/flags.parquet`` (``record.FLAGS``) and, with ``how.lora``,
    ``out/adapter``.

    Raises ``UserError`` for examples that can't be trained on, ``RuntimeError`` where the reference is the
    starting policy and yet their margins aren't 0 at the first step.
    """
    if not examples:
        raise UserError("no training pairs: every pair was filtered out, or the seed data is empty")
    how.objective.check(examples)
    set_threads(how.hardware)
    start = load_start(folders, how)
    tokenizer = load_tokenizer(folders.policy)

    def check_start(margin: float) -> None:
        context.fact("step0_margin", margin)
        limit = STEP0_LIMIT[how.hardware.get("dtype") or "float32"]
        if start.reference_is_policy and not margin <= limit:
            raise RuntimeError(
                f"policy {folders.policy} and reference {folders.reference} should be the same model, but the margins "
                f"of the first step's pairs are {margin:.3g} nats on average (allowed: {limit}): one was loaded wrongly"
            )

    with context.progress(int(len(examples) * how.training.epochs), "pairs") as progress:
        trainer = build_trainer(start, tokenizer, examples, out, how, check_start)
        attach(trainer, context, progress, how.training.batch_size)
        trainer.train()
    if trainer.is_world_process_zero():
        _save(trainer, start, examples, out, how, context)
    trainer.accelerator.wait_for_everyone()
    context.rows("pairs", into=len(examples), out=len(examples))
    context.tokens(int(how.training.epochs * sum(map(tokens_of, examples))))


@dataclass
class Start:
    """The models that a training begins with, and what was loaded beside them."""

    model: PreTrainedModel
    reference: PreTrainedModel | None  # None: the policy with another state of its adapter, or no reference at all
    freeze_adapter: bool  # the reference is a frozen copy of the adapter, not the adapter switched off
    reference_is_policy: bool
    adapted: bool


def load_start(folders: Folders, how: PolicyTraining) -> Start:
    """Load what ``folders`` name; ``ValueError`` for folders that don't fit together under LoRA."""
    policy, reference = folders.policy, folders.reference
    same = policy.resolve() == reference.resolve()
    if how.lora is None:
        model = load_model(policy, how.hardware)
        return Start(model, load_model(reference, how.hardware) if how.with_reference else None, False, same, False)
    base_dir = policy if folders.base is None else folders.base
    off = reference.resolve() == base_dir.resolve()
    if folders.adapter is None and policy.resolve() != base_dir.resolve():
        raise ValueError(f"LoRA: policy {policy} is not the base {base_dir}, so its adapter_dir must be given")
    if folders.adapter is not None and policy.resolve() == base_dir.resolve():
        raise ValueError(
            f"LoRA: adapter {folders.adapter} needs its base: give base_dir (the SFT model) beside policy_dir"
        )
    if not (off or same):
        raise ValueError(f"LoRA: reference {reference} must be the policy {policy} or the base {base_dir}")
    base = load_model(base_dir, how.hardware)
    model = adapters.with_adapter(base, how.lora, folders.adapter, how.seed)
    return Start(model, None, how.with_reference and not off, same, True)


def build_trainer(
    start: Start,
    tokenizer: Any,
    examples: list[Example],
    out: Path,
    how: PolicyTraining,
    check_start: Callable[[float], None] | None = None,
    **overrides: Any,
) -> PolicyTrainer:
    """The trainer of ``train_policy``; ``overrides`` are further fields of ``DPOConfig``."""
    settings = trainer_arguments(how.training, how.hardware, out, how.seed, len(examples))
    without = not (how.with_reference or start.adapted)
    settings |= {"beta": how.objective.beta, "precompute_ref_log_probs": without}  # see PolicyTrainer
    arguments = DPOConfig(**{**settings, **overrides})
    world = arguments.world_size
    sampler = EpochSampler(len(examples), how.seed, arguments.per_device_train_batch_size * world if world > 1 else 1)
    mismatch = any(tracker.reads == "mismatch" for tracker in how.objective.trackers().values())
    trainer = PolicyTrainer(
        model=start.model,
        ref_model=start.reference,
        args=arguments,
        train_dataset=policy_rows(examples, position_limit(start.model), sampler.padding > 0, mismatch),
        processing_class=tokenizer,
        ids=[row["example_id"] for row in examples],
        sampler=sampler,
        objective=how.objective,
        noise=how.noise,
        lam=how.noise.decoupling_for(how.iteration) if how.noisy else 0.0,
        check_start=check_start,
    )
    if start.adapted and not start.freeze_adapter:
        trainer.model.delete_adapter(adapters.REFERENCE_ADAPTER)  # TRL adds it to every adapted model
    return trainer


def _save(
    trainer: PolicyTrainer,
    start: Start,
    examples: list[Example],
    out: Path,
    how: PolicyTraining,
    context: StageContext,
) -> None:
    """Write the trained policy, its adapter under LoRA, and the flags."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer = trainer.processing_class
    if trainer.value_head is not None:
        trainer.value_head.detach()
    if start.adapted:
        probes = adapters.probes_of(examples)
        adapters.save_adapter(model, out / "adapter")
        adapted = adapters.probe_logprobs(model.eval(), probes)
        save_model_folder(model.merge_and_unload(safe_merge=True), tokenizer, out / "model")
        merged = adapters.probe_logprobs(load_model(out / "model", how.hardware).to(model.device).eval(), probes)
        context.fact("merge_probe", adapters.prove_merge(adapted, merged, dtype_of(how.hardware)))
    else:
        save_model_folder(model, tokenizer, out / "model")
    rows = trainer.flags.rows if trainer.flags is not None else []
    record.write_table(out / "flags.parquet", rows, record.FLAGS)
    shutil.rmtree(out / "trainer", ignore_errors=True)
