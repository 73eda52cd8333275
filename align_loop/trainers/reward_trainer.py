"""Training of a reward model: TRL's RewardTrainer with our token ids, our objective and an exact global batch.

What differs from the stock trainer, and why:

- Rows carry soft labels, margins and weights; nothing is tokenised again, cut or dropped.
- The loss of a step is the sum of ``w * loss`` over its whole global batch divided by the number of its pairs, so
  the division into micro-batches and processes changes nothing, the short last batch of an epoch included.
- The score is read at the last attended token and the head is computed in float32 (see ``engines.reward_scoring``).
- The head may give a vector instead of a number.

With q = 1, m = 0, w = 1 (or any margin m) and a scalar head, loss and gradients equal the stock trainer's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl import RewardTrainer

from align_loop.engines.reward_scoring import last_scores
from align_loop.objectives.reward import preference_score, reward_losses
from align_loop.trainers.common import EpochSampler, WholeSteps
from align_loop.trainers.reward_config import RewardModel
from align_loop.trainers.reward_data import RewardCollator

Batch = dict[str, Tensor]


class PairRewardTrainer(WholeSteps, RewardTrainer):
    """Trains a sequence-classification model on the rows of ``reward_data.reward_rows``.

    ``pad_id``: what fills up a batch; other arguments as in ``RewardTrainer``.
    """

    def __init__(self, *, config: RewardModel, sampler: EpochSampler, pad_id: int, **arguments: Any) -> None:
        self.config, self.sampler = config, sampler
        self.seen: list[Tensor] = []
        model_config = arguments["model"].config
        model_config.num_labels = 1  # the stock trainer refuses any other number, and needs none here
        try:
            super().__init__(data_collator=RewardCollator(pad_id), **arguments)
        finally:
            model_config.num_labels = config.dim

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This micro-batch's share of the step's loss."""
        chosen, rejected = last_scores(model, inputs["input_ids"], inputs["attention_mask"]).chunk(2)
        settings = {name: getattr(self.config, name) for name in ("head", "smoothing", "centring")}
        losses = inputs["w"] * reward_losses(chosen, rejected, inputs["q"], inputs["m"], **settings)
        columns = (inputs["index"].float(), preference_score(chosen, rejected, self.config.head))
        if self.config.head == "scalar":
            columns += (chosen[:, 0], rejected[:, 0])
        self.seen.append(torch.stack([column.detach().float() for column in columns], dim=1))
        return self.share_of_step(losses.sum(), inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all pairs since the last log, over all processes, to the trainer's own metrics."""
        if self.seen:
            seen = self.accelerator.gather(torch.cat(self.seen)).double().cpu()
            self.seen.clear()
            index, margins, *scores = seen[seen[:, 0] >= 0].T
            logs["rewards/margins"] = margins.mean().item()
            logs["rewards/accuracies"] = (margins > 0).double().mean().item()
            for name, column in zip(("rewards/chosen", "rewards/rejected"), scores, strict=False):
                logs[name] = column.mean().item()
        super().log(logs, start_time)
