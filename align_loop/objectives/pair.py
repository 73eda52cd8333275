"""The pair loss: a link of the difference of two scores, averaged over a soft label.

``u = b_w S(y_w) - b_l S(y_l) - m``, ``loss = sum_k c_k [q l_k(u) + (1 - q) l_k(-u)]``. The scores come from anywhere: a
log-ratio to a reference, a mean log-probability, a reward head, a verdict's logit. With the log-ratio, the logistic
link, q = 1 and m = 0 this is DPO (Rafailov et al. 2023, equation 7). Links:

- ``logistic``: ``-log s(u)``, s the sigmoid.
- ``hinge``: ``max(0, 1 - u)``, SLiC (Zhao et al. 2023).
- ``square``: ``(u - 1/2)^2``.
- ``ipo``: the same over ``b_w^2``, which for ``u = b h`` is IPO's ``(h - 1/(2b))^2`` (Azar et al. 2023, equation 17).
- ``sigmoid``: ``s(-u)``, bounded, so that gradients fade for pairs that contradict the policy (ROPO).

Pure functions of tensors, without a model and without a trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LINKS = ("logistic", "hinge", "square", "ipo", "sigmoid")
LOGISTIC = {"logistic": 1.0}


def pair_logits(
    chosen_score: Tensor,
    rejected_score: Tensor,
    beta: Tensor | float,
    m: Tensor | float,
    beta_rejected: Tensor | float | None = None,
) -> Tensor:
    """``u = beta * s_w - beta_rejected * s_l - m``, the log-odds that the chosen answer is the better one.

    Scores (B,); the two betas (one where ``beta_rejected`` is None) and the margin ``m`` (in reward units) per example
    (B,) or one number.
    """
    u = beta * (chosen_score - rejected_score) - m
    if beta_rejected is None:
        return u
    return u + (beta - beta_rejected) * rejected_score  # exact where both betas are equal


def link_loss(link: str, u: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """The link ``l(u)`` for every pair; ``beta`` is read by ``ipo`` alone."""
    from torch.nn.functional import logsigmoid

    if link == "logistic":
        return -logsigmoid(u)
    if link == "hinge":
        return (1.0 - u).clamp(min=0.0)
    if link == "square":
        return (u - 0.5) ** 2
    if link == "ipo":
        return ((u - 0.5) / beta) ** 2
    if link == "sigmoid":
        return (-u).sigmoid()
    raise ValueError(f"no link {link!r}; there are {', '.join(LINKS)}")


def pair_loss(
    u: Tensor, q: Tensor | float, links: Mapping[str, float] = LOGISTIC, beta: Tensor | float = 1.0
) -> Tensor:
    """``sum_k c_k [q l_k(u) + (1 - q) l_k(-u)]`` for every pair: (B,) and (B,) or a number -> (B,).

    Safe for any finite ``u``. ``q`` is the probability that the chosen answer is the better one; values outside
    [0, 1] are the weights of unbiased losses (robust DPO, Chowdhury et al. 2024) and are taken as they are.
    """
    losses = [c * (q * link_loss(k, u, beta) + (1.0 - q) * link_loss(k, -u, beta)) for k, c in links.items()]
    return sum(losses[1:], start=losses[0])
