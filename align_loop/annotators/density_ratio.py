"""How much more likely a strong model finds an answer than a weak one does.

Source: customizable density ratios of strong-over-weak models (CDR): ``r(x, y) = log pi_strong(y | x, c) -
log pi_weak(y | x)``, where the strong model may be shown criteria ``c`` in its prompt (safety, code, ...). The further
apart the two models are in alignment, the better the reward: an aligned model against its base, for example.
"""

from __future__ import annotations

from dataclasses import dataclass

from align_loop.annotators.job import Annotation, Job
from align_loop.annotators.judging import TOO_LONG, Reader, by_prompt, messages_of, score_row
from align_loop.errors import UserError
from align_loop.record import Row
from align_loop.render import with_system


@dataclass
class DensityRatio:
    """``strong``, ``weak``: roles or model folders. ``criteria``: a system message for the strong model (null: none).

    Reward in nats, summed over the answer's tokens; with criteria null it is the implicit reward at beta 1. Each model
    reads the answer in its own chat template and tokens: without a common tokenizer the two sums are of different
    pieces, and comparable only as log-probs of the same text. Answers that don't fit in both models are not scored.
    """

    strong: str = "policy"
    weak: str = "initial"
    criteria: str | None = None

    def __post_init__(self) -> None:
        if self.strong == self.weak and not self.criteria:
            raise ValueError(f"annotator.strong={self.strong} is annotator.weak: without criteria all rewards are 0")

    def roles(self) -> dict[str, str]:
        """The models that it reads."""
        return {"strong": self.strong, "weak": self.weak}

    def annotate(self, job: Job) -> Annotation:
        """The reward of each answer, and its two log-probs: ``logp_policy`` of strong, ``logp_reference`` of weak.

        Raises ``UserError`` where both models score every answer alike.
        """
        answers = [row for rows in by_prompt(job).values() for row in rows]
        with job.context.progress(2 * len(answers), "answers") as progress:
            strong = self._logps("strong", self.criteria, answers, job, progress.update)
            weak = self._logps("weak", None, answers, job, progress.update)
        scored = [row for row in answers if row["sample_id"] in strong and row["sample_id"] in weak]
        dropped = {TOO_LONG: len(answers) - len(scored)}
        job.context.rows("judged answers", into=len(answers), out=len(scored), dropped=dropped)
        if scored and strong == weak:
            raise UserError(
                f"annotator.strong={self.strong} and annotator.weak={self.weak} give every answer the same log-probs, "
                "so all rewards are 0; name two models that differ"
            )
        rows = []
        for row in scored:
            p, r = strong[row["sample_id"]], weak[row["sample_id"]]
            rows.append(score_row(row, p - r, logp_policy=p, logp_reference=r))
        return Annotation(rows)

    def _logps(self, name: str, system: str | None, answers: list[Row], job: Job, on_done) -> dict[str, float]:
        """Sample id -> log-prob of the answer (nats) under one of the models, without those too long for it."""
        reader, messages = Reader(job.models[name], job.dtype, job.context), messages_of(job)
        wanted = {row["prompt_id"] for row in answers}
        prompts = {
            prompt: reader.renderer.prompt_ids(with_system(turns, system) if system else turns)
            for prompt, turns in messages.items()
            if prompt in wanted
        }
        sequences = {row["sample_id"]: (prompts[row["prompt_id"]], reader.answer_ids(row)) for row in answers}
        fitting = {sample: pair for sample, pair in sequences.items() if reader.fits(len(pair[0]) + len(pair[1]))}
        values = reader.logprobs(list(fitting.values()), on_done)
        return {sample: float(sum(value)) for sample, value in zip(fitting, values, strict=True)}
