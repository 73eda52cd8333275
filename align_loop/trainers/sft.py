"""Supervised fine-tuning on (prompt, answer) token ids, through TRL's SFTTrainer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from align_loop.errors import UserError
from align_loop.stage import StageContext
from align_loop.trainers import lora as adapters
from align_loop.trainers.common import EpochSampler, GivenRows, attach, set_threads, trainer_arguments
from align_loop.trainers.config import LoraConfig, TrainingConfig
from align_loop.trainers.models import (
    load_model,
    load_tokenizer,
    position_limit,
    save_model_folder,
)

Demonstration = tuple[list[int], list[int]]


class DemonstrationTrainer(GivenRows, SFTTrainer):
    """TRL's trainer over token ids as given, in our order.

    Its loss is the mean over the answer tokens of the optimiser step's whole global batch (the trainer counts them
    over all micro-batches and processes), so it doesn't depend on how the batch is divided.
    """

    def __init__(self, *args: Any, sampler: EpochSampler, **kwargs: Any) -> None:
        self.sampler = sampler
        super().__init__(*args, **kwargs)


def demonstration_rows(demonstrations: list[Demonstration], limit: int, padding: bool) -> Dataset:
    """Rows of ``input_ids`` and ``labels`` (-100 on the prompt).

    With ``padding`` one more row follows, which trains nothing. Raises ``UserError`` for an empty prompt or answer,
    and for a sequence longer than ``limit`` tokens: nothing is cut and nothing is dropped.
    """
    for number, (prompt_ids, answer_ids) in enumerate(demonstrations):
        if not prompt_ids or not answer_ids:
            raise UserError(f"demonstration {number}: prompt or answer has no tokens: remove it")
        if (length := len(prompt_ids) + len(answer_ids)) > limit:
            raise UserError(f"demonstration {number}: {length} tokens, the model takes {limit}: shorten or remove it")
    input_ids = [list(prompt) + list(answer) for prompt, answer in demonstrations]
    labels = [[-100] * len(prompt) + list(answer) for prompt, answer in demonstrations]
    if padding:
        shortest = min(input_ids, key=len)
        input_ids.append(shortest)
        labels.append([-100] * len(shortest))
    return Dataset.from_dict({"input_ids": input_ids, "labels": labels})


def train_sft(
    *,
    model_dir: Path,
    demonstrations: list[Demonstration],
    out: Path,
    training: TrainingConfig,
    lora: LoraConfig | None,
    seed: int,
    hardware: dict[str, Any],
    context: StageContext,
) -> None:
    """Train the model of ``model_dir`` on the answers and write a plain Hugging Face folder to ``out/model``.

    ``demonstrations``: (prompt ids, answer ids); the answer's ids are trained on as they are, so they end with an
    end-of-sequence id where the model shall learn to stop. With ``lora`` an adapter is trained and merged.
    Raises ``UserError`` for data that can't be trained on.
    """
    if not demonstrations:
        raise UserError("supervised training got no demonstrations: check the data of the seed split")
    set_threads(hardware)
    model, tokenizer = load_model(model_dir, hardware), load_tokenizer(model_dir)
    arguments = SFTConfig(**trainer_arguments(training, hardware, out, seed, len(demonstrations)))
    world_size = arguments.world_size
    multiple = arguments.per_device_train_batch_size * world_size if world_size > 1 else 1
    sampler = EpochSampler(len(demonstrations), seed, multiple)
    rows = demonstration_rows(demonstrations, position_limit(model), sampler.padding > 0)
    if lora is not None:
        model = adapters.with_adapter(model, lora, adapter_dir=None, seed=seed)
    with context.progress(int(len(demonstrations) * training.epochs), "sequences") as progress:
        trainer = DemonstrationTrainer(
            model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, sampler=sampler
        )
        attach(trainer, context, progress, training.batch_size)
        trainer.train()
    if trainer.is_world_process_zero():
        trained = trainer.accelerator.unwrap_model(trainer.model)
        if lora is not None:
            trained = trained.merge_and_unload(safe_merge=True)
        save_model_folder(trained, tokenizer, out / "model")
        shutil.rmtree(out / "trainer", ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    context.rows("demonstrations", into=len(demonstrations), out=len(demonstrations))
    context.tokens(int(sum(len(p) + len(a) for p, a in demonstrations) * training.epochs))
