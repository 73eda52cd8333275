"""A judge by a trained reward model, or by an ensemble of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from align_loop.annotators.job import Annotation, Job
from align_loop.engines.reward_folder import RewardFolder, read_reward_folder
from align_loop.errors import UserError
from align_loop.record import Row
from align_loop.render import Renderer


@dataclass
class RewardModelScore:
    """``reward_model``: the role of this name (the run's latest), or a reward model's folder.

    ``length_penalty``: taken off the score for each token of the answer (RLHF Workflow, Dong et al., arXiv
    2405.07863).
    """

    reward_model: str = "reward_model"
    length_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"annotator.length_penalty={self.length_penalty} must be a number, in reward per token")

    def roles(self) -> dict[str, str]:
        """The models that it reads: name of the input -> role."""
        return {"reward_model": self.reward_model}

    def annotate(self, job: Job) -> Annotation:
        """Each answer's score less the penalty, and the ensemble's deviation.

        A scalar head's score is its own; a gpm head's is the mean log-odds against the prompt's other answers. See
        ``engines.reward_scoring.reward_scores``. Raises ``UserError`` where the answers' ids are of another tokenizer.
        """
        from align_loop.engines.reward_scoring import reward_scores  # imports torch

        answers, context = job.answers, job.context
        model = read_reward_folder(job.models["reward_model"])
        check_tokenizer(model, answers)
        hardware = context.hardware
        with context.progress(len(model.members) * len(answers), "answers") as progress:
            scores, deviations = reward_scores(
                model,
                [(row["prompt_token_ids"], row["token_ids"]) for row in answers],
                dtype=job.dtype,
                device=hardware.get("device") or "cpu",
                token_budget=hardware.get("score_token_budget") or 16384,
                groups=[row["prompt_id"] for row in answers],
                names=[f"answer {row['sample_id']}" for row in answers],
                on_done=progress.update,
            )
        tokens = sum(len(row["prompt_token_ids"]) + len(row["token_ids"]) for row in answers)
        context.tokens(len(model.members) * tokens)
        rows = [
            {
                "sample_id": row["sample_id"],
                "prompt_id": row["prompt_id"],
                "reward": score - self.length_penalty * len(row["token_ids"]),
                "reward_sd": deviation,
                "tokens": len(row["token_ids"]),
            }
            for row, score, deviation in zip(answers, scores, deviations, strict=True)
        ]
        return Annotation(rows)


def check_tokenizer(model: RewardFolder, answers: list[Row]) -> None:
    """Raise ``UserError`` where the model's tokenizer (its members share one) reads an answer's ids as another text."""
    renderer = Renderer(model.members[0])
    for row in answers:
        if row.get("text") is not None and renderer.text(row["token_ids"]) != row["text"]:
            raise UserError(
                f"{renderer.folder}: the reward model's tokenizer reads answer {row['sample_id']} as another text than "
                f"the policy's: take a reward model trained from the same model family"
            )
