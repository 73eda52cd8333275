"""What annotators that read answers with a model share: the model itself, its prompts, and the pairs to compare."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from align_loop.annotators.job import Job
from align_loop.errors import UserError
from align_loop.groups import matrix_of, scores_from_matrix
from align_loop.record import Message, Row, short_digest
from align_loop.render import Renderer
from align_loop.stage import StageContext

TOO_LONG = "prompt too long for the judge"
Pair = tuple[Row, Row]  # two answers to one prompt


class Reader:
    """A model that reads texts: its renderer, and its log-probs by plain forward passes (fp32 logs, in nats)."""

    def __init__(self, folder: Path, dtype: str, context: StageContext):
        from align_loop.engines import scoring  # imports torch

        self.device = context.hardware.get("device") or "cpu"
        self.budget = context.hardware.get("score_token_budget") or 16384
        self.context = context
        self.renderer = Renderer(folder)
        self.model = scoring.load_scorer(folder, dtype, self.device)
        self.room = getattr(self.model.config, "max_position_embeddings", None)

    def fits(self, tokens: int) -> bool:
        """Whether a text of so many tokens fits in the model's positions (always, where its config names none)."""
        return self.room is None or tokens <= self.room

    def answer_ids(self, row: Row) -> list[int]:
        """The ids of a sampled answer for this model: those sampled, where they mean the same text here.

        Ended by this model's own end-of-sequence token unless the answer was cut. A judge with another tokenizer than
        the policy's encodes the text anew.
        """
        ended = row["finish_reason"] == "stop"
        body = row["token_ids"][: -1 if ended else None]
        if not self._means(body, row["text"]):
            body = self.renderer.answer_ids(row["text"])[:-1]
        return [*body, *([self.renderer.tokenizer.eos_token_id] if ended else [])]

    def logprobs(self, sequences: Sequence[tuple[list[int], list[int]]], on_done=None) -> list[list[float]]:
        """The log-prob of each answer token, for (prompt ids, answer ids)."""
        from align_loop.engines import scoring

        self.context.tokens(sum(len(prompt) + len(answer) for prompt, answer in sequences))
        return scoring.token_logprobs(self.model, sequences, **self._how(on_done))

    def next_logprobs(self, prompts: Sequence[list[int]], tokens: Sequence[int], on_done=None) -> list[list[float]]:
        """log p(token | prompt) of each token as what follows each prompt: (prompts, tokens)."""
        from align_loop.engines import scoring

        self.context.tokens(sum(map(len, prompts)))
        return scoring.next_token_logprobs(self.model, prompts, tokens, **self._how(on_done))

    def _how(self, on_done) -> dict:
        return {
            "pad_id": self.renderer.pad_id,
            "token_budget": self.budget,
            "device": self.device,
            "on_done": on_done,
        }

    def _means(self, ids: list[int], text: str) -> bool:
        vocabulary = len(self.renderer.tokenizer)
        return all(i < vocabulary for i in ids) and self.renderer.text(ids) == text


def fill(template: str, **values: str) -> str:
    """``template`` with each ``{name}`` of ``values`` replaced, in one pass: braces in the values stay as they are."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda found: values[found.group(1)], template)


def check_template(key: str, template: str, names: Iterable[str]) -> None:
    """Raise ``ValueError`` where a prompt template lacks one of its places."""
    for name in names:
        if f"{{{name}}}" not in template:
            raise ValueError(f"{key} has no {{{name}}}: the judge would not see it; put it where it belongs")


def conversation(messages: Sequence[Message]) -> str:
    """A prompt's messages as a text for a judge; a single user message stands alone, others carry their role."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n".join(f"[{m['role']}] {m['content']}" for m in messages)


def by_prompt(job: Job) -> dict[str, list[Row]]:
    """Prompt id -> its answers in the order of ``k``; in the order of prompt ids, so row order never matters."""
    found: dict[str, list[Row]] = {}
    for row in sorted(job.answers, key=lambda a: (a["prompt_id"], a["k"])):
        found.setdefault(row["prompt_id"], []).append(row)
    return found


def messages_of(job: Job) -> dict[str, list[Message]]:
    """Prompt id -> messages; ``UserError`` where the table of prompts lacks one that was answered."""
    messages = job.messages()
    if missing := sorted({row["prompt_id"] for row in job.answers} - set(messages)):
        raise UserError(f"annotator: answers to {len(missing)} prompts that are not in the table, such as {missing[0]}")
    return messages


def pairs_of(answers: Sequence[Row], limit: int | None, seed: int) -> list[Pair]:
    """All pairs of a prompt's answers (in the order of ``k``), or ``limit`` of them that cover the answers evenly.

    The few are the first games of a tournament (every answer once in each round, the seats by chance from the seed and
    the prompt id); so with ``limit`` at least half the number of answers, each answer is compared.
    """
    pairs = list(combinations(range(len(answers)), 2))
    if limit is not None and limit < len(pairs):
        seats = list(range(len(answers) + len(answers) % 2))  # with an odd number the last seat is empty
        random.Random(short_digest("pairs", seed, answers[0]["prompt_id"])).shuffle(seats)
        games = []
        while len(games) < limit:
            round_ = [tuple(sorted((seats[i], seats[-1 - i]))) for i in range(len(seats) // 2)]
            games += [game for game in round_ if game[1] < len(answers)]
            seats = [seats[0], seats[-1], *seats[1:-1]]
        pairs = sorted(games[:limit])
    return [(answers[i], answers[j]) for i, j in pairs]


def score_row(answer: Row, reward: float, **more: float | None) -> Row:
    """A row of ``record.SCORES``."""
    ids = {"sample_id": answer["sample_id"], "prompt_id": answer["prompt_id"]}
    return {**ids, "reward": reward, "tokens": len(answer["token_ids"]), **more}


def scores_from_pairs(groups: Mapping[str, list[Row]], pairwise: Sequence[Row]) -> list[Row]:
    """Rows of ``record.SCORES`` of the answers that were compared: Bradley-Terry rewards, mean 0 in each prompt.

    An answer that was compared with none is not scored. Where a prompt's answers were not all compared with one
    another, a missing comparison counts as a tie, which draws the scores together.
    """
    compared: dict[str, list[Row]] = {}
    for row in pairwise:
        compared.setdefault(row["prompt_id"], []).append(row)
    scores = []
    for prompt, rows in compared.items():
        seen = {row[side] for row in rows for side in ("first_sample_id", "second_sample_id")}
        answers = [answer for answer in groups[prompt] if answer["sample_id"] in seen]
        rewards = scores_from_matrix(matrix_of([a["sample_id"] for a in answers], rows))
        scores += [score_row(a, r) for a, r in zip(answers, rewards, strict=True)]
    return scores


def pair_row(first: Row, second: Row, p_first: float) -> Row:
    """A row of ``record.PAIRWISE``."""
    ids = {"first_sample_id": first["sample_id"], "second_sample_id": second["sample_id"]}
    return {"prompt_id": first["prompt_id"], **ids, "p_first": p_first}


def inner_job(job: Job, name: str, context: StageContext | None = None) -> Job:
    """The job of an annotator inside another one, which finds its own models under ``name.``"""
    models = {key[len(name) + 1 :]: path for key, path in job.models.items() if key.startswith(f"{name}.")}
    return dataclasses.replace(job, models=models, context=context or job.context)


def inner_roles(parts: Mapping[str, object], method: str = "roles") -> dict[str, str]:
    """The ``roles()`` (or ``files()``) of annotators inside another one, their names prefixed."""
    return {
        f"{name}.{key}": value
        for name, part in parts.items()
        if hasattr(part, method)
        for key, value in getattr(part, method)().items()
    }
