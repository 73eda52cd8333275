"""What every training shares: trainer arguments, deterministic logs, progress, the order of the examples."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback

from align_loop.stage import Progress, StageContext
from align_loop.trainers.config import TrainingConfig, micro_batches
from align_loop.trainers.optimizer import keep_master_weights

# Measured times and rates: never in the log, so that the same inputs give the same file.
UNLOGGED = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


def trainer_arguments(
    training: TrainingConfig, hardware: dict[str, Any], out: Path, seed: int, examples: int
) -> dict[str, Any]:
    """The keyword arguments of TRL's config classes that follow from our settings, for ``examples`` rows of data.

    Weights, activations and saved files share one dtype (that of the loaded model), so the trainer's mixed
    precision stays off. Nothing is reported, uploaded or saved by the trainer itself.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    micro, accumulation = micro_batches(training.batch_size, hardware, world_size)
    steps = math.ceil(math.ceil(examples / training.batch_size) * training.epochs)
    on_cpu = (hardware.get("device") or "cpu") == "cpu"
    return {
        "output_dir": str(out / "trainer"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": training.epochs,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule,
        # A fraction of the steps when below 1. The first step of a warm-up has learning rate 0, so a training of a
        # single step would train nothing.
        "warmup_steps": training.warmup_ratio if steps > 1 else 0,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch",
        "seed": seed,
        "data_seed": seed,
        "bf16": False,
        "fp16": False,
        "use_cpu": on_cpu,
        "gradient_checkpointing": bool(hardware.get("gradient_checkpointing", False)),
        "logging_steps": training.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would hide a diverged training: StageReport stops it instead
        "save_strategy": "no",
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
        "max_length": None,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": not on_cpu,
    }


def set_threads(hardware: dict[str, Any]) -> None:
    """Use ``hardware['threads']`` processor threads where it is set."""
    if threads := hardware.get("threads"):
        torch.set_num_threads(int(threads))


class EpochSampler(Sampler[int]):
    """A fresh permutation of ``size`` examples in each epoch, from (seed, epoch) alone.

    The order is a function of nothing else, so a resumed run and any number of processes see the same global
    batches. ``multiple``: the length is filled up to a multiple of it with the index ``size``, which stands
    for padding; without that, data-parallel loaders would silently repeat examples in the last batch.
    """

    def __init__(self, size: int, seed: int, multiple: int = 1) -> None:
        self.size, self.seed, self.epoch = size, seed, 0
        self.padding = -size % multiple

    def __len__(self) -> int:
        return self.size + self.padding

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.size, generator=generator).tolist()
        yield from [self.size] * self.padding

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next pass; the trainer's loader calls it when an epoch begins."""
        self.epoch = epoch


class GivenRows:
    """For TRL's trainers: the rows as they are given, in the order of ``self.sampler`` (set before ``__init__``)."""

    sampler: EpochSampler

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    def _send_telemetry(self) -> None:
        """Nothing is reported to anyone."""


class WholeSteps(GivenRows):
    """A loss that is the mean over an optimiser step's whole global batch, however that is divided.

    Batches have ``index``: each example's position in the table, -1 for padding.
    """

    # The loss is already divided by the examples of the whole step, not of a micro-batch.
    loss_is_scaled_for_ga = True

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move a batch to the device; float inputs stay float32, which DeepSpeed would round to its own dtype."""
        floats = {k: v.to(self.args.device) for k, v in inputs.items() if v.is_floating_point()}
        return {**super()._prepare_inputs({k: v for k, v in inputs.items() if k not in floats}), **floats}

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], None]:
        """All micro-batches of the next optimiser step, each with the number of examples of the step."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._prepare_inputs(batch) for batch in batches]
        if batches:
            index = self.accelerator.gather(torch.cat([batch["index"] for batch in batches]))
            for batch in batches:
                batch["examples_in_step"] = (index >= 0).sum().float()
        return batches, None

    def share_of_step(self, total: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """A micro-batch's share of the step's loss, from the sum of its examples' losses.

        Times the number of processes, whose gradients are averaged.
        """
        return total * self.accelerator.num_processes / inputs["examples_in_step"]


class StageReport(TrainerCallback):
    """Passes the trainer's metrics and its progress on to the stage."""

    def __init__(self, context: StageContext, progress: Progress, per_step: int) -> None:
        self.context, self.progress, self.per_step = context, progress, per_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        metrics = {name: value for name, value in logs.items() if name not in UNLOGGED}
        if "loss" not in metrics:  # the summary at the end of training
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics.get(name, 0.0)):
                raise RuntimeError(
                    f"{self.context.name}: {name} is {metrics[name]} at step {state.global_step}: the training has "
                    f"diverged (learning rate {args.learning_rate:g}, batch_size {self.per_step})"
                )
        if state.is_world_process_zero:
            # The trainer's own epoch counts micro-batches; the log shall not depend on how batches are divided.
            epoch = round(args.num_train_epochs * state.global_step / state.max_steps, 6)
            self.context.log({**metrics, "step": state.global_step, "epoch": epoch})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        left = max(self.progress.total - self.progress.done, 0)
        self.progress.update(min(self.per_step, left))


def attach(trainer: Trainer, context: StageContext, progress: Progress, batch_size: int) -> None:
    """Make ``trainer`` report to the stage and to nothing else, and train bfloat16 weights through master copies."""
    keep_master_weights(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StageReport(context, progress, batch_size))
