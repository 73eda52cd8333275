"""The plain sampler: n answers to each prompt from one policy, through vLLM or transformers.

Every request has its own seed, a function of (seed, iteration, prompt id, k). Requests are handed over in fixed
chunks of prompts in id order, so that neither the number of workers nor a restart changes an answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align_loop.engines.base import Completion, SamplingParams, SamplingRequest, open_engine
from align_loop.record import Message, Row, request_seed, short_digest
from align_loop.render import Renderer, with_system
from align_loop.stage import StageContext

TOO_LONG = "prompt too long for the model"
CUT = "answer cut at the length limit"


@dataclass
class PolicySampler:
    """``n`` answers a prompt. ``truncated``: what to do with an answer that was cut at ``max_new_tokens``.

    ``keep`` leaves it as it is, without an end it did not generate; ``drop`` takes it out (and counts it);
    ``append_eos`` adds an end-of-sequence token, as the released Selfie code does. ``variants``: name -> system prompt;
    under each of them ``n`` more answers are sampled, marked by the name, for builders that know which context makes
    the better answer. They are trained on under the plain prompt.
    """

    n: int = 2
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 300
    engine: Literal["auto", "vllm", "hf"] = "auto"
    chunk: int = 2048
    truncated: Literal["keep", "drop", "append_eos"] = "keep"
    variants: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low in (("n", 1), ("max_new_tokens", 1), ("chunk", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"sampler.{name}={getattr(self, name)} must be at least {low}")
        if self.temperature < 0:
            raise ValueError(f"sampler.temperature={self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampler.top_p={self.top_p} must be in (0, 1]")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"sampler.temperature=0 gives the same answer sampler.n={self.n} times: raise it or set n=1"
            )

    def sample(self, prompts: list[Row], policy: Path, run: Run, context: StageContext) -> list[Row]:
        """Rows of ``record.ANSWERS``: ``n`` for each prompt that fits and each context, in order of prompt id."""
        renderer = Renderer(policy)
        contexts = [None, *self.variants]
        rendered = {
            row["prompt_id"]: [renderer.prompt_ids(self._under(row["messages"], name)) for name in contexts]
            for row in prompts
        }
        room = run.max_length - self.max_new_tokens
        fitting = sorted(i for i, made in rendered.items() if max(map(len, made)) <= room)
        context.rows("prompts", into=len(prompts), out=len(fitting), dropped={TOO_LONG: len(prompts) - len(fitting)})
        engine = open_engine(
            self.engine, policy, dtype=run.dtype, max_model_len=run.max_length, hardware=context.hardware
        )
        context.fact("engine", f"{engine.name} {engine.version}")
        params = SamplingParams(self.temperature, self.top_p, self.max_new_tokens)
        rows: list[Row] = []
        count = self.n * len(contexts)
        with context.progress(len(fitting) * count, "answers") as progress:
            for start in range(0, len(fitting), self.chunk):
                asked = [(i, k) for i in fitting[start : start + self.chunk] for k in range(count)]
                requests = [
                    SamplingRequest(rendered[i][k // self.n], request_seed(run.seed, run.iteration, i, k))
                    for i, k in asked
                ]
                for (i, k), request, done in zip(asked, requests, engine.generate(requests, params), strict=True):
                    row = _row(i, k, run.iteration, request, done, renderer)
                    rows.append(row | {"variant": contexts[k // self.n]})
                progress.update(len(asked))
        context.tokens(sum(len(row["token_ids"]) for row in rows))
        kept = self._truncated(rows, renderer.tokenizer.eos_token_id)
        context.rows("answers", into=len(rows), out=len(kept), dropped={CUT: len(rows) - len(kept)})
        return kept

    def _under(self, messages: list[Message], variant: str | None) -> list[Message]:
        """``messages`` as a variant sees them; None is the plain prompt."""
        return messages if variant is None else with_system(messages, self.variants[variant])

    def _truncated(self, rows: list[Row], eos: int) -> list[Row]:
        """``rows`` after the action on answers that were cut."""
        if self.truncated == "drop":
            return [row for row in rows if row["finish_reason"] == "stop"]
        if self.truncated == "append_eos":
            for row in rows:
                if row["finish_reason"] == "length":
                    row["token_ids"] = [*row["token_ids"], eos]
                    row["logprobs"] = [*row["logprobs"], None]  # the model never drew it
        return rows


@dataclass(frozen=True)
class Run:
    """What a sampler has to know about the run: ``iteration`` is part of every request's seed."""

    seed: int
    iteration: int
    dtype: str
    max_length: int


def sample(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """The stage: ``config`` {sampler, run}; inputs ``prompts`` (table) and ``policy``; writes ``answers.parquet``."""
    from align_loop.parts import part
    from align_loop.record import ANSWERS, read_rows, write_table

    sampler = part(config["sampler"], "sampler")
    rows = sampler.sample(read_rows(inputs["prompts"]), inputs["policy"], Run(**config["run"]), context)
    write_table(context.out / "answers.parquet", rows, ANSWERS)


def _row(prompt: str, k: int, iteration: int, request: SamplingRequest, done: Completion, renderer: Renderer) -> Row:
    return {
        "sample_id": short_digest("sample", iteration, prompt, k),
        "prompt_id": prompt,
        "k": k,
        "text": renderer.text(done.token_ids),
        "prompt_token_ids": request.prompt_token_ids,
        "token_ids": done.token_ids,
        "finish_reason": done.finish_reason,
        "logprobs": done.logprobs,
        "request_seed": request.seed,
    }
