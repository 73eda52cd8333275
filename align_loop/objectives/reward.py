"""The reward model's objective: the soft-label logistic loss on how much one answer's score exceeds another's.

Pure functions of tensors. A reward model gives each answer a vector of ``d`` numbers, and two vectors give the
log-odds that the first answer is the better one:

- ``scalar`` (d = 1): ``s(i > j) = r_i - r_j`` (Bradley and Terry 1952), which orders all answers on one line;
- ``gpm`` (d even): ``s(i > j) = v_i^T R v_j`` with R of blocks [[0, -1], [1, 0]] on the diagonal (general preference
  model, Zhang et al., arXiv 2410.02197): skew-symmetric, so s(i > j) = -s(j > i), and cycles are possible. With
  ``v = (1, r)`` it is the scalar one. The paper's normalised vectors, temperature and prompt-dependent scales are
  left out: the head's own size takes their place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from align_loop.objectives.pair import pair_loss

if TYPE_CHECKING:
    from torch import Tensor


def preference_score(first: Tensor, second: Tensor, head: str) -> Tensor:
    """``s(first > second)``, the log-odds that the first answer is better: (..., d) twice -> (...)."""
    if head == "scalar":
        return (first - second).squeeze(-1)
    one, other = first.unflatten(-1, (-1, 2)), second.unflatten(-1, (-1, 2))
    return (one[..., 1] * other[..., 0] - one[..., 0] * other[..., 1]).sum(-1)


def reward_losses(
    chosen: Tensor,
    rejected: Tensor,
    q: Tensor,
    m: Tensor,
    *,
    head: str = "scalar",
    smoothing: float = 0.0,
    centring: float = 0.0,
) -> Tensor:
    """The loss of every pair: (B, d) twice, ``q`` and ``m`` (B,) -> (B,).

    ``u = s(chosen > rejected) - m`` with the label ``q`` moved by ``smoothing`` e to ``(1 - e) q + e (1 - q)``, plus
    ``centring * (r_chosen + r_rejected)^2`` (Eisenstein et al., arXiv 2312.09244), which fixes the level that a
    Bradley-Terry loss leaves open; scalar head only, since the other has no level.
    """
    losses = pair_loss(preference_score(chosen, rejected, head) - m, q + smoothing * (1.0 - 2.0 * q))
    if centring:
        losses = losses + centring * (chosen + rejected).squeeze(-1) ** 2
    return losses
