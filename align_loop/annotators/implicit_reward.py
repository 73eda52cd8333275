"""Selfie's judge: the policy's own implicit reward against a fixed reference.

Source: Selfie/SPA (Kim et al., arXiv 2406.04412), equations 7 and 8: ``r(x, y) = beta * [log pi(y|x) -
log pi_ref(y|x)]``, summed over the answer's tokens, with the SFT model as reference in every iteration. Answers are
scored, not pairs, so any number of answers to a prompt works.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from align_loop.annotators.job import Annotation, Job
from align_loop.errors import UserError
from align_loop.record import Row
from align_loop.render import Renderer
from align_loop.stage import StageContext


@dataclass
class ImplicitReward:
    """``reference``: initial (the SFT model), previous (the policy one iteration before), or a model folder."""

    reference: str = "initial"
    beta: float = 0.1

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"annotator.beta={self.beta} must be positive")

    def roles(self) -> dict[str, str]:
        """The models that it reads: name of the input -> role."""
        return {"policy": "policy", "reference": self.reference}

    def annotate(self, job: Job) -> Annotation:
        """The reward of each answer, and the two log-probs (nats) it is made of.

        Raises ``UserError`` where policy and reference score every answer alike: then all rewards are 0.
        """
        answers, models, dtype, context = job.answers, job.models, job.dtype, job.context
        with context.progress(2 * len(answers), "answers") as progress:
            policy = answer_logprobs(models["policy"], answers, dtype, context, progress.update)
            reference = answer_logprobs(models["reference"], answers, dtype, context, progress.update)
        context.tokens(2 * sum(len(row["prompt_token_ids"]) + len(row["token_ids"]) for row in answers))
        if answers and policy == reference:
            raise UserError(
                f"annotator.reference={self.reference}: judge and reference give every answer the same log-probs, so "
                "all rewards are 0; name the model that the policy was trained from"
            )
        rows = [
            {
                "sample_id": row["sample_id"],
                "prompt_id": row["prompt_id"],
                "reward": self.beta * (p - r),
                "logp_policy": p,
                "logp_reference": r,
                "tokens": len(row["token_ids"]),
            }
            for row, p, r in zip(answers, policy, reference, strict=True)
        ]
        return Annotation(rows)


def answer_logprobs(model: Path, answers: list[Row], dtype: str, context: StageContext, on_done=None) -> list[float]:
    """log pi(answer | prompt) in nats, summed over the answer's tokens, for rows with ids as in ``record.ANSWERS``."""
    from align_loop.engines import scoring  # imports torch

    hardware = context.hardware
    device = hardware.get("device") or "cpu"
    scorer = scoring.load_scorer(model, dtype, device)
    values = scoring.token_logprobs(
        scorer,
        [(row["prompt_token_ids"], row["token_ids"]) for row in answers],
        pad_id=Renderer(model).pad_id,
        token_budget=hardware.get("score_token_budget") or 16384,
        device=device,
        on_done=on_done,
    )
    return scoring.sum_logprobs(values)
