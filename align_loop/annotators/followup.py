"""How likely a person's contented reply is after the answer.

Source: follow-up likelihood as reward (FLR): the mean log-likelihood of positive follow-ups of the user after the
answer, less that of negative ones, under a chat model. How the paper normalises by length is not known here; the
default is the mean a token. The follow-ups below are this package's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

from align_loop.annotators.job import Annotation, Job
from align_loop.annotators.judging import TOO_LONG, Reader, by_prompt, messages_of, score_row


@dataclass
class FollowupLikelihood:
    """Reward (nats) = mean over ``positive`` of log p(follow-up | prompt, answer) - mean over ``negative``.

    ``judge``: policy, another role, or a model folder. Each follow-up is the user's next turn in the judge's chat
    template; a list may be empty, then it counts nothing. ``per_token``: divide each follow-up's log-prob by its
    number of tokens. An answer that was cut is read as if it had ended there. Answers after which a follow-up does not
    fit in the judge are not scored.
    """

    judge: str = "policy"
    positive: list[str] = field(default_factory=lambda: ["Thank you, that is just what I needed.", "Well done."])
    negative: list[str] = field(default_factory=lambda: ["That is not what I asked for.", "This is wrong."])
    per_token: bool = True

    def __post_init__(self) -> None:
        if not self.positive and not self.negative:
            raise ValueError("annotator.positive and annotator.negative are both empty: give follow-ups")
        for name in ("positive", "negative"):
            if any(not text.strip() or text != text.strip() for text in getattr(self, name)):
                raise ValueError(f"annotator.{name} has an empty text or one with outer spaces: take them out")

    def roles(self) -> dict[str, str]:
        """The model that it reads."""
        return {"judge": self.judge}

    def annotate(self, job: Job) -> Annotation:
        """The reward of each answer."""
        answers = [row for rows in by_prompt(job).values() for row in rows]
        messages, reader = messages_of(job), Reader(job.models["judge"], job.dtype, job.context)
        texts = [*self.positive, *self.negative]
        sequences, kept = [], []
        for row in answers:
            said = [*messages[row["prompt_id"]], {"role": "assistant", "content": row["text"]}]
            pairs = [reader.renderer.followed_by(said, text) for text in texts]
            if all(reader.fits(len(before) + len(after)) for before, after in pairs):
                sequences += pairs
                kept.append(row)
        dropped = {TOO_LONG: len(answers) - len(kept)}
        job.context.rows("judged answers", into=len(answers), out=len(kept), dropped=dropped)
        with job.context.progress(len(sequences), "follow-ups") as progress:
            read = reader.logprobs(sequences, progress.update)
        values = [sum(row) / (len(row) if self.per_token else 1) for row in read]
        scores = []
        for i, row in enumerate(kept):
            own = values[i * len(texts) : (i + 1) * len(texts)]
            good, bad = own[: len(self.positive)], own[len(self.positive) :]
            scores.append(score_row(row, (fmean(good) if good else 0.0) - (fmean(bad) if bad else 0.0)))
        return Annotation(scores)
