"""The pair objective: soft-label logistic loss on the difference of two scores (DPO and its relatives).

Pure functions of tensors, without a model and without a trainer. With the log-ratio score
``s = log pi_theta(y|x) - log pi_ref(y|x)`` (nats, summed over the answer's tokens), ``q = 1`` and ``m = 0``
this is DPO (Rafailov et al. 2023, equation 7); ``0.5 < q < 1`` is conservative DPO (Mitchell 2023) and
the label smoothing of Selfie/SPA (arXiv 2406.04412, equation 12); ``m > 0`` is ODPO (Amini et al. 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PairObjective:
    """What the pair loss needs to know beyond the record: the default inverse temperature of the reward."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"objective.beta must be a positive number, got {self.beta!r}")


def summed_logprobs(token_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Sum the log-probabilities of the answer's tokens.

    ``token_logprobs`` (B, T) in nats, ``mask`` (B, T) with 1 (or True) at the answer's tokens; returns (B,) in
    float32 or better. Values outside the mask are ignored, even when they are infinite.
    """
    wide = token_logprobs if token_logprobs.element_size() >= 4 else token_logprobs.float()
    return wide.masked_fill(mask == 0, 0.0).sum(dim=-1)


def pair_logits(chosen_score: Tensor, rejected_score: Tensor, beta: Tensor | float, m: Tensor | float) -> Tensor:
    """``u = beta * (s_w - s_l) - m``, the log-odds that the chosen answer is the better one.

    Scores (B,) in nats; ``beta`` and the margin ``m`` (in reward units) per example (B,) or one number.
    """
    return beta * (chosen_score - rejected_score) - m


def pair_loss(u: Tensor, q: Tensor | float) -> Tensor:
    """``-q log sigmoid(u) - (1 - q) log sigmoid(-u)`` for every pair: (B,) and (B,) or a number -> (B,).

    Safe for any finite ``u``. ``q`` is the probability that the chosen answer is the better one; values outside
    [0, 1] are the weights of unbiased losses (robust DPO, Chowdhury et al. 2024) and are taken as they are.
    """
    from torch.nn.functional import logsigmoid

    return -q * logsigmoid(u) - (1.0 - q) * logsigmoid(-u)
