"""Point losses: one answer with a label, no partner.

``r = beta S``; a label above 0 marks a good answer, below 0 a bad one (sign +1, -1); b is a baseline in reward units.

- ``kto``: ``s(-sign (r - b))`` (Ethayarajh et al. 2024, equation 8); with b = 0 APO-zero (D'Oosterlinck et al. 2024).
- ``bco``: ``-log s(sign (r - b))`` (Jung et al. 2024).
- ``nca``: good ``-log s(r) - log s(-r) / 2``, bad ``-log s(-r) / 2`` (Chen et al. 2024).
- ``npo``: bad answers alone, ``-(2 / beta) log s(-r)`` (Zhang et al. 2024).
- ``sppo``: ``(S - label / (2 beta))^2`` (Wu et al. 2024: eta = 1/beta, label = 2P - 1 with P the win rate).
- ``dro``: ``(label - V - r)^2 / 2`` (Richemond et al. 2024), beta is their tau, V the prompt's value.
- ``dro_v``: the same value, and the same gradient for V; the policy's is divided by tau, as in their DRO-V.
- ``linear``: ``-sign r`` (PMPO, Abdolmaleki et al. 2024, on log-probs; SPAC's critic on log-ratios).

Pure functions of tensors (n,); ``s`` is the sigmoid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

LossName = Literal["kto", "bco", "nca", "npo", "sppo", "dro", "dro_v", "linear"]


def point_loss(loss: str, score: Tensor, label: Tensor, beta: Tensor | float, baseline: Tensor | float = 0.0) -> Tensor:
    """The loss (n,) of answers with ``score`` (nats) and ``label``, both (n,).

    ``baseline``: b for kto and bco (reward units), V for dro and dro_v (units of the label); the others have none.
    """
    import torch
    from torch.nn.functional import logsigmoid

    good = label > 0
    reward = beta * score
    signed = torch.where(good, 1.0, -1.0).to(reward.dtype)
    if loss == "kto":
        return (-signed * (reward - baseline)).sigmoid()
    if loss == "bco":
        return -logsigmoid(signed * (reward - baseline))
    if loss == "nca":
        down = -0.5 * logsigmoid(-reward)
        return torch.where(good, down - logsigmoid(reward), down)
    if loss == "npo":
        return torch.where(good, torch.zeros_like(reward), -(2.0 / beta) * logsigmoid(-reward))
    if loss == "sppo":
        return (score - label / (2.0 * beta)) ** 2
    if loss == "dro":
        return 0.5 * (label - baseline - reward) ** 2
    if loss == "dro_v":
        scaled = score.detach() + (score - score.detach()) / beta
        return 0.5 * (label - baseline - beta * scaled) ** 2
    if loss == "linear":
        return -signed * reward
    raise ValueError(f"no point loss {loss!r}")


def kl_loss(token_ratios: Tensor, weights: Tensor | None, level: str) -> Tensor:
    """Half the squared log-ratio of each answer (n,): its gradient estimates that of the KL to the reference.

    ``token_ratios`` (n, T), 0 outside the answers. Level ``sequence``: ``S^2 / 2``; on answers sampled from the policy
    its gradient ``S grad log pi`` is the unbiased estimate of ``grad KL(pi || ref)`` that HyPO uses (Song et al. 2024).
    ``token``: ``sum_t d_t^2 / 2``, of smaller variance, without the effect of a token on later ones. On other
    answers both still pull the policy to the reference, and estimate no KL.
    """
    ratios = token_ratios if weights is None else token_ratios * weights
    if level == "sequence":
        return 0.5 * ratios.sum(dim=-1) ** 2
    return 0.5 * (ratios * token_ratios).sum(dim=-1)
