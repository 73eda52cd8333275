"""Training on pairs: TRL's DPOTrainer with our token ids, our objective and an exact global batch.

What differs from the stock trainer, and why:

- Rows carry soft labels, margins, weights and beta; nothing is tokenised again, cut or dropped.
- The loss of a step is the sum of ``w * loss`` over its whole global batch divided by the number of its pairs, so
  the division into micro-batches and processes changes nothing, the short last batch of an epoch included.
- Before a step whose noise handling is active, a pass without gradient gives every pair's margin under the decoupled
  policy and the lowest are flagged; its reference log-probs serve the loss.

With q = 1, m = 0, w = 1 and no noise handling, loss and gradients equal the stock trainer's.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from align_loop.objectives.noise import NoiseHandling, extrapolated_logprobs, shape_flagged, token_logprobs
from align_loop.objectives.pair import pair_logits, pair_loss, summed_logprobs
from align_loop.trainers.common import EpochSampler
from align_loop.trainers.lora import REFERENCE_ADAPTER
from align_loop.trainers.models import pad_id
from align_loop.trainers.noise_flags import NoiseFlags
from align_loop.trainers.pair_data import PairCollator

Batch = dict[str, Tensor]


class PairTrainer(DPOTrainer):
    """DPO-like training on the rows of ``pair_data.pair_rows``.

    ``ids``: example ids by row index; ``lam``: the extrapolation of the noise detector; other arguments as in
    ``DPOTrainer``. ``flags`` holds the detector and its record where ``noise`` is enabled, else None.
    ``check_start`` is called after the first step with the mean |log-ratio difference| (nats) of its pairs, before
    the update: 0 where the reference is the starting policy.
    """

    def __init__(
        self,
        *,
        ids: list[str],
        sampler: EpochSampler,
        noise: NoiseHandling | None = None,
        lam: float = 0.0,
        check_start: Callable[[float], None] | None = None,
        **arguments: Any,
    ) -> None:
        self.sampler, self.noise, self.lam, self.check_start = sampler, noise, lam, check_start
        self.seen: list[Tensor] = []
        super().__init__(data_collator=PairCollator(pad_id(arguments["processing_class"])), **arguments)
        enabled = noise is not None and noise.enabled
        self.flags = NoiseFlags(noise, ids, self.accelerator.gather) if enabled else None
        if self.flags is not None:
            self.add_callback(NoiseCheckpoint(self.flags))

    # Data: as given.

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    def _send_telemetry(self) -> None:
        """Nothing is reported to anyone."""

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """Move a batch to the device; float inputs stay float32, which DeepSpeed would round to its own dtype."""
        floats = {k: v.to(self.args.device) for k, v in inputs.items() if v.is_floating_point()}
        return {**super()._prepare_inputs({k: v for k, v in inputs.items() if k not in floats}), **floats}

    # The loss is already divided by the pairs of the whole step, not of a micro-batch.
    loss_is_scaled_for_ga = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        """All micro-batches of the next optimiser step, with its number of pairs and, where noise acts, flags."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._prepare_inputs(batch) for batch in batches]
        if not batches:
            return batches, None
        pairs = (self.accelerator.gather(torch.cat([batch["index"] for batch in batches])) >= 0).sum().float()
        for batch in batches:
            batch["pairs_in_step"] = pairs
        # With a single micro-batch the loss's own forward pass gives the margins: see compute_loss.
        if self.flags is not None and (len(batches) > 1 or not self._flags_in_loss):
            self._flag(batches, self._detector_margins)
        return batches, None

    @property
    def _flags_in_loss(self) -> bool:
        """Whether a training forward leaves what the detector needs (logits only where they are kept)."""
        return self.lam == 0 or self._keeps_logits

    @property
    def _keeps_logits(self) -> bool:
        """On a processor a vocabulary's logits at the answers are affordable, and faster than TRL's fused head."""
        return self.accelerator.device.type == "cpu"

    def _flag(self, batches: list[Batch], margins_of: Callable[[Batch], Tensor]) -> None:
        step, max_steps = self.state.global_step, self.state.max_steps
        wanted = self.flags.wants_margins(step, max_steps)
        margins = [margins_of(batch) for batch in batches] if wanted else None
        flags = self.flags.decide([batch["index"] for batch in batches], margins, step, max_steps)
        for batch, flag in zip(batches, flags, strict=True):
            batch["flags"] = flag

    # Log-probabilities, in nats, summed over the answer's tokens, float32: (2B,), chosen answers first.

    def _score(self, model: nn.Module, batch: Batch, logits: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probs of a batch's answers and, with ``logits``, the logits (2B, A, V) that go with ``answer_labels``."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        labels = answer_labels(batch)
        if not logits:
            output = model(**inputs, labels=batch_labels(batch), fused_lm_head=True)
            return summed_logprobs(output.log_probs, batch["completion_mask"][:, 1:]), None
        full = model(**inputs, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
        return token_logprobs(full, labels).sum(dim=1), full

    @torch.no_grad()
    def _score_reference(self, batch: Batch, logits: bool) -> tuple[Tensor, Tensor | None]:
        """The same for the reference: its own model, or the policy with its frozen adapter, or with the adapter off."""
        if self.ref_model is not None:
            return self._score(self.ref_model, batch, logits)
        unwrapped = self.accelerator.unwrap_model(self.model)
        frozen = REFERENCE_ADAPTER if REFERENCE_ADAPTER in unwrapped.peft_config else None
        with self._without_checkpointing(), use_adapter(unwrapped, frozen):
            return self._score(self.model, batch, logits)

    def _without_checkpointing(self) -> contextlib.AbstractContextManager[None]:
        return disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)

    @torch.no_grad()
    def _detector_margins(self, batch: Batch) -> Tensor:
        """Reward margins (B,) of a batch under the decoupled policy, by a forward pass of its own."""
        with self._without_checkpointing():
            return self._margins_from(batch, *self._score(self.model, batch, self.lam != 0 or self._keeps_logits))

    @torch.no_grad()
    def _margins_from(self, batch: Batch, logprobs: Tensor, logits: Tensor | None) -> Tensor:
        """Reward margins (B,) under the decoupled policy (Selfie/SPA, equations 10 and 11) from the policy's scores.

        Leaves the reference's log-probs in the batch for the loss. With lambda 0 the decoupled policy is the policy.
        """
        reference, reference_logits = self._score_reference(batch, logits is not None)
        batch["reference_logprobs"] = reference
        if self.lam != 0:
            labels = answer_labels(batch)
            logprobs = extrapolated_logprobs(logits, reference_logits, self.lam, labels).sum(dim=1)
        chosen, rejected = (logprobs - reference).chunk(2)
        return pair_logits(chosen, rejected, batch["beta"], 0.0)

    # Loss and metrics.

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This micro-batch's share of the step's loss; times the number of processes, whose gradients are averaged."""
        policy, logits = self._score(model, inputs, self._keeps_logits)
        if self.flags is not None and "flags" not in inputs:
            self._flag([inputs], lambda batch: self._margins_from(batch, policy, logits))
        reference = inputs.get("reference_logprobs")
        if reference is None:
            reference, _ = self._score_reference(inputs, self._keeps_logits)
        chosen, rejected = (policy - reference).chunk(2)
        q, w = inputs["q"], inputs["w"]
        if self.flags is not None:
            q, w = shape_flagged(q, w, inputs["flags"], self.noise)
        losses = w * pair_loss(pair_logits(chosen, rejected, inputs["beta"], inputs["m"]), q)
        self._remember(inputs, chosen, rejected, policy)
        return losses.sum() * self.accelerator.num_processes / inputs["pairs_in_step"]

    def _remember(self, inputs: Batch, chosen: Tensor, rejected: Tensor, policy: Tensor) -> None:
        columns = (inputs["index"].float(), inputs["beta"], chosen, rejected, *policy.chunk(2))
        self.seen.append(torch.stack([column.detach().float() for column in columns], dim=1))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all pairs since the last log, over all processes, to the trainer's own metrics."""
        if self.seen:
            seen = self.accelerator.gather(torch.cat(self.seen)).double().cpu()
            self.seen.clear()
            index, beta, chosen, rejected, logp_chosen, logp_rejected = seen[seen[:, 0] >= 0].T
            margins = beta * (chosen - rejected)
            logs["rewards/chosen"] = (beta * chosen).mean().item()
            logs["rewards/rejected"] = (beta * rejected).mean().item()
            logs["rewards/margins"] = margins.mean().item()
            logs["rewards/accuracies"] = (margins > 0).double().mean().item()
            logs["logps/chosen"] = logp_chosen.mean().item()
            logs["logps/rejected"] = logp_rejected.mean().item()
            if self.state.global_step == 1 and self.check_start is not None:
                self.check_start((chosen - rejected).abs().mean().item())
            if self.flags is not None:
                logs.update(self._noise_metrics(len(index)))
        super().log(logs, start_time)

    def _noise_metrics(self, pairs: int) -> dict[str, float]:
        recent = self.flags.rows[-pairs:]
        step = self.state.global_step - 1  # the step just taken
        metrics = {
            "noise/flag_share": sum(row["flagged"] and row["alpha_active"] for row in recent) / pairs,
            "noise/alpha": self.noise.alpha_at(step, self.state.max_steps),
        }
        if (threshold := self.flags.detector.threshold) is not None:
            metrics["noise/threshold"] = threshold
        return metrics

    # Checkpoints.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in TRL, without the frozen adapter, which is rebuilt at the start of each run.

        With a folder of its own in the checkpoint, ``transformers`` would load that one alone when resuming, and the
        trained adapter would silently begin anew.
        """
        super()._save(output_dir, state_dict)
        shutil.rmtree(Path(output_dir or self.args.output_dir) / REFERENCE_ADAPTER, ignore_errors=True)

    def train(self, resume_from_checkpoint: str | bool | None = None, **arguments: Any) -> Any:
        """As in TRL; a resumed run also takes up the noise detector where the checkpoint left it."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if self.flags is not None and resume_from_checkpoint:
            path = noise_state_path(Path(resume_from_checkpoint), self.args.process_index)
            self.flags.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **arguments)


def batch_labels(batch: Batch) -> Tensor:
    """The answers' ids in place (2B, T), -100 at prompts and padding."""
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


def answer_labels(batch: Batch) -> Tensor:
    """The labels (2B, A) of the last A positions, which begin at the batch's first answer token."""
    first = int(batch["completion_mask"].argmax(dim=1).min())
    return batch_labels(batch)[:, first:]


class NoiseCheckpoint(TrainerCallback):
    """Writes the noise detector's state into each checkpoint, one file a process."""

    def __init__(self, flags: NoiseFlags) -> None:
        self.flags = flags

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        path = noise_state_path(Path(args.output_dir) / f"checkpoint-{state.global_step}", args.process_index)
        path.write_text(json.dumps(self.flags.state_dict()), encoding="utf-8")


def noise_state_path(checkpoint: Path, rank: int) -> Path:
    """Where a checkpoint keeps the noise detector of process ``rank``."""
    return checkpoint / f"noise_detector_{rank}.json"
