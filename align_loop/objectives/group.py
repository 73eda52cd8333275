"""Group losses: n scored answers to one prompt, seen together.

Rewards ``r = beta S`` (n,) of one group and the annotator's scores (n,), higher is better. Pure functions of tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

LossName = Literal["plackett_luce", "contrast", "regress"]
Weighting = Literal["uniform", "gap", "dcg"]


def plackett_luce(rewards: Tensor, scores: Tensor) -> Tensor:
    """Minus the log-likelihood of the ranking by ``scores`` (Plackett 1975; DPO, Rafailov et al. 2023, appendix A.3).

    Equal scores rank in the order given.
    """
    ordered = rewards[scores.argsort(descending=True, stable=True)]
    return (ordered.flip(0).logcumsumexp(0).flip(0) - ordered).sum()


def contrast(chosen: Tensor, rejected: Tensor, inner: Tensor | float, outer: Tensor) -> Tensor:
    """``sum_ij outer_ij * -log s(inner_ij (chosen_i - rejected_j))`` for rewards (n,) and (k,), weights (n, k).

    Relative preference optimisation (Yin et al. 2024) has the weights of its contrast matrix as ``inner`` and
    ``outer = 1/(nk)``; RankDPO (Karthik et al. 2024) has ``inner = 1`` and DCG weights as ``outer``.
    """
    from torch.nn.functional import logsigmoid

    return (outer * -logsigmoid(inner * (chosen[:, None] - rejected[None, :]))).sum()


def group_contrast(rewards: Tensor, scores: Tensor, weighting: str) -> Tensor:
    """The contrast over all ordered pairs of a group with different scores; 0 where all scores are equal.

    Weights: ``uniform`` (the mean over pairs), ``gap`` (in proportion to the difference of scores, summing to 1),
    ``dcg`` (RankDPO: see ``dcg_weights``, not normalised).
    """
    gap = scores[:, None] - scores[None, :]
    better = (gap > 0).to(rewards.dtype)
    if weighting == "dcg":
        outer = better * dcg_weights(scores).to(rewards.dtype)
    else:
        raw = better if weighting == "uniform" else better * gap.to(rewards.dtype)
        outer = raw / raw.sum().clamp(min=1e-12)
    return contrast(rewards, rewards, 1.0, outer)


def dcg_weights(scores: Tensor) -> Tensor:
    """``|G_i - G_j| |1/D_i - 1/D_j|`` (n, n) with gain ``G = 2^score - 1`` and discount ``D = log2(1 + rank)``."""
    import torch

    ranks = torch.empty_like(scores)
    ranks[scores.argsort(descending=True, stable=True)] = torch.arange(
        1, len(scores) + 1, dtype=scores.dtype, device=scores.device
    )
    gains, discounts = 2.0**scores - 1.0, 1.0 / torch.log2(1.0 + ranks)
    return (gains[:, None] - gains[None, :]).abs() * (discounts[:, None] - discounts[None, :]).abs()


def regress(rewards: Tensor, scores: Tensor) -> Tensor:
    """The mean over pairs i < j of ``((r_i - r_j) - (s_i - s_j))^2`` (REBEL, Gao et al. 2024).

    Differences leave the prompt's constant out, so no value head is needed.
    """
    n = len(rewards)
    residual = rewards - scores.to(rewards.dtype)
    differences = residual[:, None] - residual[None, :]
    return differences.pow(2).sum() / (n * (n - 1))
