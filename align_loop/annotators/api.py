"""A judge behind an endpoint that speaks OpenAI's chat completions: it compares two answers, or rates one.

The judge replies in words, so its verdict is a label and no probability: 1, 1/2 or 0 in each order. The prompts below
are this package's own; the bracketed verdict at the end lets a judge think first.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from align_loop.annotators.job import Annotation, Job
from align_loop.annotators.judging import (
    Pair,
    by_prompt,
    check_template,
    conversation,
    fill,
    messages_of,
    pair_row,
    pairs_of,
    score_row,
    scores_from_pairs,
)
from align_loop.engines.endpoint import Asked, Endpoint
from align_loop.engines.replies import Reply
from align_loop.record import Message, Row, short_digest

PAIR_PROMPT = """Here are an instruction and two answers to it. Judge what they say and how well they do what was \
asked, not their order or their length.

Instruction:
{prompt}

Answer A:
{first}

Answer B:
{second}

Which answer is better? You may give your reasons first. End with [[A]], [[B]], or [[C]] if neither is better."""

RATE_PROMPT = """Here are an instruction and an answer to it.

Instruction:
{prompt}

Answer:
{answer}

How good is the answer, from {lowest} (useless) to {highest} (could not be better)? You may give your reasons first. \
End with the number in double brackets, for example [[{highest}]]."""

UNREAD, REFUSED = "reply not understood", "refused by the endpoint"
_VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5}


@dataclass
class ApiJudge:
    """``mode`` pairwise: P(first better) from verdicts A, B or C (neither); pointwise: a number in [lowest, highest].

    ``endpoint``: see ``engines.endpoint.Endpoint``. ``template``: the user message, with {prompt} and {first}, {second}
    or {answer} (also {lowest}, {highest}); null: this package's own. The verdict is the last one in double brackets,
    [[A]] or [[7]], or the whole reply where that is nothing but a verdict. What can't be read so is counted, never
    guessed. ``both_orders``: ask each pair in both orders and average (otherwise one order, by chance);
    ``limit``: most pairs a prompt (null: all). ``cost`` of an answer is its share of what its replies cost.
    """

    endpoint: Endpoint
    mode: Literal["pairwise", "pointwise"] = "pairwise"
    template: str | None = None
    both_orders: bool = True
    limit: int | None = None
    lowest: float = 1
    highest: float = 10

    def __post_init__(self) -> None:
        places = ("prompt", "first", "second") if self.mode == "pairwise" else ("prompt", "answer")
        if self.template is not None:
            check_template("annotator.template", self.template, places)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"annotator.limit={self.limit} must be at least 1; null compares all pairs")
        if not self.lowest < self.highest:
            raise ValueError(f"annotator.lowest={self.lowest:g} must be less than annotator.highest={self.highest:g}")

    def annotate(self, job: Job) -> Annotation:
        """Comparisons with Bradley-Terry rewards (mean 0 a prompt), or ratings as rewards."""
        groups = by_prompt(job)
        return self._compare(groups, job) if self.mode == "pairwise" else self._rate(groups, job)

    def _compare(self, groups: dict[str, list[Row]], job: Job) -> Annotation:
        pairs = [pair for answers in groups.values() for pair in pairs_of(answers, self.limit, job.seed)]
        orders = [self._orders(pair, job.seed) for pair in pairs]
        messages = messages_of(job)
        asked = self._ask([self._pair_prompt(pair, messages) for own in orders for pair in own], job, "verdicts")
        replies = iter(asked.replies)
        pairwise, cost, dropped = [], {}, {UNREAD: 0, REFUSED: 0}
        for pair, own in zip(pairs, orders, strict=True):
            got = [next(replies) for _ in own]
            for row in pair:
                cost[row["sample_id"]] = cost.get(row["sample_id"], 0.0) + sum(r.cost for r in got) / 2
            verdicts = [read_verdict(reply.text) for reply in got]
            if None in verdicts:
                dropped[_reason(got)] += 1
                continue
            turned = [v if order is pair else 1 - v for v, order in zip(verdicts, own, strict=True)]
            pairwise.append(pair_row(*pair, fmean(turned)))
        job.context.rows("comparisons", into=len(pairs), out=len(pairwise), dropped=dropped)
        _report_order(asked.replies, self.both_orders, job)
        scores = scores_from_pairs(groups, pairwise)
        return Annotation([row | {"cost": cost[row["sample_id"]]} for row in scores], pairwise)

    def _rate(self, groups: dict[str, list[Row]], job: Job) -> Annotation:
        answers = [row for rows in groups.values() for row in rows]
        messages, template = messages_of(job), self.template or RATE_PROMPT
        limits = {"lowest": f"{self.lowest:g}", "highest": f"{self.highest:g}"}
        prompts = [
            fill(template, prompt=conversation(messages[row["prompt_id"]]), answer=row["text"], **limits)
            for row in answers
        ]
        asked = self._ask(prompts, job, "ratings")
        scores, dropped = [], {UNREAD: 0, REFUSED: 0}
        for row, reply in zip(answers, asked.replies, strict=True):
            rating = read_rating(reply.text, self.lowest, self.highest)
            if rating is None:
                dropped[_reason([reply])] += 1
            else:
                scores.append(score_row(row, rating, cost=reply.cost))
        job.context.rows("ratings", into=len(answers), out=len(scores), dropped=dropped)
        return Annotation(scores)

    def _orders(self, pair: Pair, seed: int) -> list[Pair]:
        """The orders to ask in; ``pair`` itself is one object among them."""
        if self.both_orders:
            return [pair, pair[::-1]]
        turn = random.Random(short_digest("order", seed, *(row["sample_id"] for row in pair))).random() < 0.5
        return [pair[::-1] if turn else pair]

    def _pair_prompt(self, pair: Pair, messages: dict[str, list[Message]]) -> str:
        question = conversation(messages[pair[0]["prompt_id"]])
        return fill(self.template or PAIR_PROMPT, prompt=question, first=pair[0]["text"], second=pair[1]["text"])

    def _ask(self, prompts: Sequence[str], job: Job, what: str) -> Asked:
        """The replies; what they cost, and how many came from the cache, are facts of the stage."""
        conversations: list[list[Message]] = [[{"role": "user", "content": text}] for text in prompts]
        with job.context.progress(len(prompts), what) as progress:
            asked = self.endpoint.ask(conversations, progress.update)
        job.context.tokens(asked.tokens)
        job.context.fact("endpoint", {"url": self.endpoint.url, "model": self.endpoint.model})
        job.context.fact("replies", {"sent": asked.sent, "from the cache": asked.known})
        job.context.fact("cost", sum(reply.cost for reply in asked.replies))
        return asked


def read_verdict(text: str | None) -> float | None:
    """1, 1/2 or 0 for A, C, B, of the last double brackets or of a reply that is the letter alone; else None."""
    found = _last_bracketed(text)
    return _VERDICTS.get(found) if found is not None else None


def read_rating(text: str | None, lowest: float, highest: float) -> float | None:
    """The number in the last double brackets, or the whole reply; None where it is none or out of range."""
    found = _last_bracketed(text)
    if found is None or not re.fullmatch(r"-?\d+(\.\d+)?", found):
        return None
    return float(found) if lowest <= float(found) <= highest else None


def _last_bracketed(text: str | None) -> str | None:
    if text is None:
        return None
    found = re.findall(r"\[\[\s*([^\[\]]*?)\s*\]\]", text)
    return found[-1] if found else text.strip().strip("*.'\"` \n")


def _reason(replies: Sequence[Reply]) -> str:
    return REFUSED if any(reply.text is None for reply in replies) else UNREAD


def _report_order(replies: Sequence[Reply], both: bool, job: Job) -> None:
    """The share of readable verdicts for the answer that stood first (0.5 without bias, ties a half)."""
    verdicts = [v for reply in replies if (v := read_verdict(reply.text)) is not None]
    if verdicts:
        job.context.fact("judge says first", fmean(verdicts))
    if both and replies:
        read = [(read_verdict(a.text), read_verdict(b.text)) for a, b in zip(replies[::2], replies[1::2], strict=True)]
        if full := [(a, b) for a, b in read if a is not None and b is not None]:
            job.context.fact("orders disagree", fmean(a + b != 1 for a, b in full))
