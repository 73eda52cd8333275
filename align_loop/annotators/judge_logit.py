"""A judge that compares two answers by the probability of its verdict word, asked in both orders.

Source: online self-preferring language models (OSP): the policy itself judges its answers in pairs, and the probability
of the verdict token is the strength of the preference. Its prompt is not known here; the default below is this
package's own. A judge that prefers what it reads first (or last) is corrected by asking in both orders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from align_loop.annotators.job import Annotation, Job
from align_loop.annotators.judging import (
    TOO_LONG,
    Pair,
    Reader,
    by_prompt,
    check_template,
    conversation,
    fill,
    messages_of,
    pair_row,
    pairs_of,
    scores_from_pairs,
)
from align_loop.errors import UserError

PAIR_PROMPT = """Here are an instruction and two answers to it. Which of them is better? \
Judge what they say and how well they do what was asked, not their order or their length.

Instruction:
{prompt}

Answer A:
{first}

Answer B:
{second}

Reply with the letter of the better answer alone, A or B."""


@dataclass
class JudgeLogit:
    """P(i better than j) = mean over both orders of softmax over the ``verdicts`` [word for first, word for second].

    ``judge``: policy (it judges itself), another role, or a model folder. ``template``: the user message, with
    {prompt}, {first} and {second} (null: this package's own); the verdict is what follows in the judge's chat
    template. Both words must be single tokens. ``limit``: most comparisons a prompt (null: all pairs).

    Facts of the stage: ``judge says first``, the mean probability of the verdict for the answer that stood first (0.5
    without bias); ``orders disagree``, the share of pairs with another winner in the other order; ``verdict mass``, the
    mean probability that the judge gives any verdict at all (where it is small, the judge does not follow the prompt).
    """

    judge: str = "policy"
    template: str | None = None
    verdicts: list[str] = field(default_factory=lambda: ["A", "B"])
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.template is not None:
            check_template("annotator.template", self.template, ("prompt", "first", "second"))
        if len(self.verdicts) != 2 or self.verdicts[0] == self.verdicts[1]:
            raise ValueError(f"annotator.verdicts={self.verdicts} must be two different words")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"annotator.limit={self.limit} must be at least 1; null compares all pairs")

    def roles(self) -> dict[str, str]:
        """The model that it reads."""
        return {"judge": self.judge}

    def annotate(self, job: Job) -> Annotation:
        """Comparisons of each prompt's answers, and the Bradley-Terry rewards (mean 0) that fit them best.

        Pairs whose prompt does not fit in the judge are dropped and counted.
        """
        groups = by_prompt(job)
        pairs = [pair for answers in groups.values() for pair in pairs_of(answers, self.limit, job.seed)]
        reader = Reader(job.models["judge"], job.dtype, job.context)
        tokens = [reader.renderer.single_token(word, "annotator.verdicts") for word in self.verdicts]
        if tokens[0] == tokens[1]:
            words = " and ".join(repr(word) for word in self.verdicts)
            raise UserError(f"annotator.verdicts: {words} are the same token for the judge; choose others")
        prompts = self._prompts(pairs, job, reader)
        kept = [i for i in range(len(pairs)) if all(reader.fits(len(ids) + 1) for ids in prompts[2 * i : 2 * i + 2])]
        dropped = {TOO_LONG: len(pairs) - len(kept)}
        job.context.rows("comparisons", into=len(pairs), out=len(kept), dropped=dropped)
        asked = [prompts[2 * i + order] for i in kept for order in (0, 1)]
        with job.context.progress(len(asked), "verdicts") as progress:
            read = reader.next_logprobs(asked, tokens, progress.update)
        says_first = [softmax_first(row) for row in read]
        report_bias(job, says_first)
        if read:
            job.context.fact("verdict mass", fmean(sum(map(math.exp, row)) for row in read))
        pairwise = [
            pair_row(*pairs[i], (says_first[2 * place] + 1 - says_first[2 * place + 1]) / 2)
            for place, i in enumerate(kept)
        ]
        return Annotation(scores_from_pairs(groups, pairwise), pairwise)

    def _prompts(self, pairs: Sequence[Pair], job: Job, reader: Reader) -> list[list[int]]:
        """Two prompts a pair: the answers in their order, then in the other one."""
        messages, template = messages_of(job), self.template or PAIR_PROMPT
        prompts = []
        for pair in pairs:
            question = conversation(messages[pair[0]["prompt_id"]])
            for first, second in (pair, pair[::-1]):
                text = fill(template, prompt=question, first=first["text"], second=second["text"])
                prompts.append(reader.renderer.prompt_ids([{"role": "user", "content": text}]))
        return prompts


def softmax_first(logprobs: Sequence[float]) -> float:
    """The share of the first of two log-probs in the sum of their probabilities."""
    return 1 / (1 + math.exp(min(logprobs[1] - logprobs[0], 700.0)))


def report_bias(job: Job, says_first: Sequence[float]) -> None:
    """Record what position did to the verdicts: two a pair, in the order (i, j) and then (j, i)."""
    if not says_first:
        return
    both = list(zip(says_first[::2], says_first[1::2], strict=True))
    job.context.fact("judge says first", fmean(says_first))
    job.context.fact("orders disagree", fmean((a > 0.5) == (b > 0.5) for a, b in both))
