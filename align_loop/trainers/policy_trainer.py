"""Training of a policy on examples of any kind: TRL's DPOTrainer with our token ids, objective and exact global batch.

What differs from the stock trainer, and why:

- Rows are pairs, points, demonstrations or groups with soft labels, margins, weights, betas, labels and token weights;
  nothing is tokenised again, cut or dropped.
- The loss of a step is the sum of the examples' losses over its whole global batch divided by the number of its
  examples, so the division into micro-batches and processes changes nothing, the short last batch of an epoch included.
- What a loss has to know about the whole step (flags of noisy pairs, KTO's and BCO's baselines, beta-DPO's beta) comes
  from a pass without gradient before it; its reference log-probs serve the loss. A step of one micro-batch takes it
  from the loss's own forward pass.
- An objective without a reference runs none.

With plain DPO, q = 1, m = 0, w = 1 and no noise handling, loss and gradients equal the stock trainer's.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from align_loop.objectives.batch import KINDS, PADDING, ExampleBatch, filled
from align_loop.objectives.noise import NoiseHandling, extrapolated_logprobs, shape_flagged, token_logprobs
from align_loop.objectives.objective import Objective
from align_loop.objectives.pair import pair_logits
from align_loop.objectives.scores import Side
from align_loop.trainers.common import EpochSampler, WholeSteps
from align_loop.trainers.lora import REFERENCE_ADAPTER
from align_loop.trainers.models import pad_id
from align_loop.trainers.noise_flags import NoiseFlags
from align_loop.trainers.policy_data import DEFAULTS, PolicyCollator
from align_loop.trainers.policy_state import PolicyCheckpoint, ValueHead, load_state
from align_loop.trainers.step_metrics import StepMetrics

Batch = dict[str, Tensor]
PAIR = KINDS.index("pair")


class PolicyTrainer(WholeSteps, DPOTrainer):
    """Training on the rows of ``policy_data.policy_rows``.

    ``ids``: example ids by row index; ``lam``: the extrapolation of the noise detector; other arguments as in
    ``DPOTrainer``. ``flags`` holds the detector and its record where ``noise`` is enabled, else None; ``trackers`` the
    state of the objective's terms. ``check_start`` is called after the first step with the mean |log-ratio| (nats; of a
    pair: |difference|) of its examples, before the update: 0 where the reference is the starting policy.
    """

    def __init__(
        self,
        *,
        ids: list[str],
        sampler: EpochSampler,
        objective: Objective,
        noise: NoiseHandling | None = None,
        lam: float = 0.0,
        check_start: Callable[[float], None] | None = None,
        **arguments: Any,
    ) -> None:
        self.sampler, self.objective, self.noise, self.lam = sampler, objective, noise, lam
        enabled = noise is not None and noise.enabled
        self.with_reference = objective.needs_reference or enabled
        self.trackers = objective.trackers()
        self.tags = sorted({term.tag for term in objective.terms.values() if term.tag is not None})
        collator = PolicyCollator(pad_id(arguments["processing_class"]), self.tags)
        self.value_head = ValueHead(arguments["model"]) if objective.needs_value else None
        super().__init__(data_collator=collator, **arguments)
        self.flags = NoiseFlags(noise, ids, self.accelerator.gather) if enabled else None
        self.step_metrics = StepMetrics(self.accelerator.gather, list(objective.terms), check_start)
        if self.flags is not None or self.trackers or self.value_head is not None:
            self.add_callback(PolicyCheckpoint(self.flags, self.trackers, self.value_head))

    # Data: as given.

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """Nothing: "precomputed" is how TRL is told to load no reference, where the objective has none."""
        return dataset

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        """All micro-batches of the next optimiser step, with its number of examples and what the loss must know."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        # With a single micro-batch the loss's own forward pass gives what is to be measured: see compute_loss.
        if batches and self._measures and (len(batches) > 1 or not self._measured_in_loss):
            self._measure(batches, self._score_quietly)
        return batches, None

    # The whole step, before its loss.

    @property
    def _measures(self) -> bool:
        return self.flags is not None or bool(self.trackers)

    @property
    def _measured_in_loss(self) -> bool:
        """Whether a training forward leaves what the detector needs (logits only where they are kept)."""
        return self.flags is None or self.lam == 0 or self._keeps_logits

    @property
    def _keeps_logits(self) -> bool:
        """On a processor a vocabulary's logits at the answers are affordable, and faster than TRL's fused head."""
        return self.accelerator.device.type == "cpu"

    @torch.no_grad()
    def _measure(self, batches: Sequence[Batch], score: Callable[[Batch], tuple[Tensor, Tensor | None]]) -> None:
        """Flags and trackers for one step; ``score`` gives a batch's policy log-probs and, for the detector, logits."""
        step, max_steps = self.state.global_step, self.state.max_steps
        flagging = self.flags is not None and self.flags.wants_margins(step, max_steps)
        margins: list[Tensor] = []
        found: dict[str, list[Tensor]] = {name: [] for name in self.trackers}
        seen = flagging or any(tracker.reads == "examples" for tracker in self.trackers.values())
        mismatched = any(tracker.reads == "mismatch" for tracker in self.trackers.values())
        for batch in batches:
            policy, logits = score(batch) if seen else (None, None)
            if seen and self.with_reference:
                reference, reference_logits = self._score_reference(batch, logits is not None)
                batch["reference_logprobs"] = reference
                if flagging:
                    margins.append(self._margins(batch, policy, logits, reference_logits))
            views = {"examples": self._view(batch, policy) if seen else None}
            views["mismatch"] = self._mismatched_view(batch) if mismatched else None
            for name, tracker in self.trackers.items():
                found[name].append(self._measured(name, views[tracker.reads]))
            batch["settled"] = batch["index"]
        if self.flags is not None:
            indices = [torch.where(batch["kind"] == PAIR, batch["index"], -1) for batch in batches]
            flags = self.flags.decide(indices, margins if flagging else None, step, max_steps)
            for batch, flag in zip(batches, flags, strict=True):
                batch["flags"] = flag
        self._settle(torch.cat([batch["index"] for batch in batches]), found)

    def _measured(self, name: str, view: ExampleBatch) -> Tensor:
        """What a tracker measures of a batch's examples (B, width), NaN for those that its term doesn't read."""
        tracker, term = self.trackers[name], self.objective.terms[name]
        rows = view.rows(term.kinds, term.tag)
        values = torch.full((len(view.index), tracker.width), math.nan, dtype=torch.float32, device=view.index.device)
        if len(rows):
            values[rows] = tracker.measure(view.select(rows)).float()
        return values

    def _settle(self, index: Tensor, found: dict[str, list[Tensor]]) -> None:
        """Show every tracker the values of the global batch, in the order of the table."""
        if not found:
            return
        everyone = self.accelerator.gather(index).cpu()
        for name, parts in found.items():
            values = self.accelerator.gather(torch.cat(parts)).double().cpu()
            real = ((everyone >= 0) & ~values[:, 0].isnan()).nonzero()[:, 0]
            order = real[everyone[real].argsort()]
            self.trackers[name].settle(everyone[order].tolist(), values[order])

    def _mismatched_view(self, batch: Batch) -> ExampleBatch:
        """The examples with other prompts' answers, for KTO's baseline."""
        other = {name.removeprefix("mismatched_"): v for name, v in batch.items() if name.startswith("mismatched_")}
        policy, logits = self._score_quietly(other)
        if self.with_reference:
            other["reference_logprobs"], _ = self._score_reference(other, logits is not None)
        rest = {k: v for k, v in batch.items() if k not in (*other, "token_weights", "reference_logprobs")}
        owner = torch.full((len(policy),), -1, device=policy.device)
        return self._view({**rest, **other, "owner": owner, "member_score": owner.float()}, policy)

    # Log-probabilities of the answers' tokens, in nats, float32: (N, A), one row a sequence of the stack.

    def _score(self, model: nn.Module, batch: Batch, logits: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probs that go with ``answer_labels``, 0 at its -100, and with ``logits`` the logits (N, A, V)."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        labels = answer_labels(batch)
        if not logits:
            output = model(**inputs, labels=batch_labels(batch), fused_lm_head=True)
            return output.log_probs[:, -labels.shape[1] :].float(), None
        full = model(**inputs, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
        return token_logprobs(full, labels), full

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
    def _score_quietly(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The policy's log-probs by a forward pass without gradient."""
        with self._without_checkpointing():
            return self._score(self.model, batch, (self.flags is not None and self.lam != 0) or self._keeps_logits)

    def _margins(self, batch: Batch, policy: Tensor, logits: Tensor | None, other: Tensor | None) -> Tensor:
        """Reward margins (B,) under the decoupled policy (Selfie/SPA, equations 10 and 11); 0 where there is no pair.

        ``logits`` of the policy, ``other`` of the reference. With lambda 0 the decoupled policy is the policy.
        """
        if self.lam != 0:
            policy = extrapolated_logprobs(logits, other, self.lam, answer_labels(batch))
        ratio = policy.sum(dim=1) - batch["reference_logprobs"].sum(dim=1)
        beta = filled(batch["beta"], self.objective.beta)
        margins = pair_logits(ratio[batch["chosen"]], ratio[batch["rejected"]], beta, 0.0)
        return torch.where(batch["kind"] == PAIR, margins, 0.0)

    # Loss and metrics.

    def _view(self, batch: Batch, policy: Tensor) -> ExampleBatch:
        """What the objective sees of a batch."""
        mask = (answer_labels(batch) != -100).long()
        weights = batch.get("token_weights")
        answers = Side(
            policy,
            batch.get("reference_logprobs"),
            mask,
            None if weights is None else weights[:, -mask.shape[1] :],
        )
        names = ("kind", "tag", "index", "chosen", "rejected", "owner", "member_score", *DEFAULTS)
        return ExampleBatch(**{name: batch[name] for name in names}, answers=answers, tags=self.tags)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This micro-batch's share of the step's loss; times the number of processes, whose gradients are averaged."""
        policy, logits = self._score(model, inputs, self._keeps_logits)
        values = self.value_head.of_prompts(inputs) if self.value_head is not None else None
        if self._measures and "settled" not in inputs:
            self._measure([inputs], lambda batch: (policy.detach(), None if logits is None else logits.detach()))
        if self.with_reference and "reference_logprobs" not in inputs:
            inputs["reference_logprobs"], _ = self._score_reference(inputs, self._keeps_logits)
        view = self._view(inputs, policy)
        if self.flags is not None:
            view.q, view.w = shape_flagged(view.q, view.w, inputs["flags"], self.noise)
        view.value = values
        losses = self.objective.losses(view, self.trackers)
        self._remember(view, losses)
        total = sum(losses.values()).sum()
        if values is not None:
            total = total + 0.0 * values.sum()  # every process uses the head in every micro-batch
        if bool((view.kind == PADDING).all()):
            total = total + 0.0 * policy.sum()
        return self.share_of_step(total, inputs)

    @torch.no_grad()
    def _remember(self, view: ExampleBatch, losses: dict[str, Tensor]) -> None:
        self.step_metrics.take(self.objective, view, losses)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all examples since the last log, over all processes, to the trainer's own metrics."""
        if self.step_metrics.seen:
            pairs = self.step_metrics.into(logs, first=self.state.global_step == 1, reference=self.with_reference)
            if self.flags is not None and pairs:
                logs.update(self._noise_metrics(pairs))
            for name, tracker in self.trackers.items():
                logs.update({f"{name}/{key}": value for key, value in tracker.metrics().items()})
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
        """As in TRL; a resumed run also takes up flags, trackers and value head where the checkpoint left them."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            rank = self.args.process_index
            load_state(Path(resume_from_checkpoint), rank, self.flags, self.trackers, self.value_head)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **arguments)


def batch_labels(batch: Batch) -> Tensor:
    """The answers' ids in place (N, T), -100 at prompts and padding."""
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


def answer_labels(batch: Batch) -> Tensor:
    """The labels (N, A) of the last A positions, which begin at the batch's first answer token."""
    first = int(batch["completion_mask"].argmax(dim=1).min())
    return batch_labels(batch)[:, first:]
