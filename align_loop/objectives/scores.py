"""Scores: one number for each answer, from the log-probabilities of its tokens.

``log_ratio``: ``log pi(y|x) - log pi_ref(y|x)``, summed over the answer's tokens (DPO, Rafailov et al. 2023).
``mean_log_ratio``: the same per token (LN-DPO; IPO in practice). ``log_prob``, ``mean_log_prob``: without a reference
(CPO, Xu et al. 2024; SimPO, Meng et al. 2024). ``log_odds``: ``log p - log(1 - p)`` with p the geometric mean of the
token probabilities (ORPO, Hong et al. 2024). All in nats.

Token weights multiply each token's term, 0 leaves a token out (turns of a tool or a user), and "per token" then divides
by the sum of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

ScoreName = Literal["log_ratio", "mean_log_ratio", "log_prob", "mean_log_prob", "log_odds"]
WITH_REFERENCE = ("log_ratio", "mean_log_ratio")
LARGEST_LOG_PROB = -1e-6  # of an answer in log_odds: at probability 1 the odds have no bound


@dataclass
class Side:
    """The token log-probabilities (nats) of n answers: each (n, T), ``mask`` with 1 at the answers' tokens.

    ``reference`` is None where no term needs one, ``weights`` where every token counts 1.
    """

    policy: Tensor
    reference: Tensor | None
    mask: Tensor
    weights: Tensor | None = None

    def score(self, name: str) -> Tensor:
        """The answers' scores (n,): one of the names above."""
        if name == "log_ratio":
            return self.summed(self.policy) - self.summed(self._held_against())
        if name == "mean_log_ratio":
            return (self.summed(self.policy) - self.summed(self._held_against())) / self.tokens()
        if name == "log_prob":
            return self.summed(self.policy)
        mean = self.summed(self.policy) / self.tokens()
        return mean if name == "mean_log_prob" else log_odds(mean)

    def token_ratios(self) -> Tensor:
        """The log-ratio of every token (n, T); 0 outside the answers."""
        return (self.policy - self._held_against()).masked_fill(self.mask == 0, 0.0)

    def summed(self, token_values: Tensor) -> Tensor:
        """The sum (n,) over the answers' tokens, by their weights."""
        return summed_logprobs(token_values, self.mask, self.weights)

    def tokens(self) -> Tensor:
        """The number of tokens (n,), or the sum of their weights; at least 1e-6."""
        weights = self.mask if self.weights is None else self.weights * self.mask
        return weights.to(self.policy.dtype).sum(dim=-1).clamp(min=1e-6)

    def _held_against(self) -> Tensor:
        if self.reference is None:
            raise ValueError("this score needs the reference's log-probs, and there are none")
        return self.reference


def summed_logprobs(token_logprobs: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum the log-probabilities of the answer's tokens, each times its weight where ``weights`` (B, T) is given.

    ``token_logprobs`` (B, T) in nats, ``mask`` (B, T) with 1 (or True) at the answer's tokens; returns (B,) in
    float32 or better. Values outside the mask are ignored, even when they are infinite.
    """
    wide = token_logprobs if token_logprobs.element_size() >= 4 else token_logprobs.float()
    kept = wide.masked_fill(mask == 0, 0.0)
    return (kept if weights is None else kept * weights).sum(dim=-1)


def log_odds(logprob: Tensor) -> Tensor:
    """``log p - log(1 - p)`` from ``log p`` (nats, any shape), exact for small and for large p up to 1 - 1e-6."""
    import torch

    logprob = logprob.clamp(max=LARGEST_LOG_PROB)
    return logprob - torch.log(-torch.expm1(logprob))
