"""Generation with transformers' ``generate``: slower than vLLM, and runs wherever torch does.

Each request has a random generator of its own, so an answer depends on its prompt and seed and not on
the other requests of its batch (but for the last bits of the kernels).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import TopPLogitsWarper

from align_loop.engines import surroundings
from align_loop.engines.base import Completion, SamplingParams, SamplingRequest, check_lengths, stop_token_ids
from align_loop.engines.scoring import load_scorer
from align_loop.errors import UserError


class SeededChoice(LogitsProcessor):
    """Turns greedy search into sampling with a seed for each row, and notes what is taken.

    Gumbel-max: argmax(log p - log E) with E ~ Exp(1) independent for each token is a draw from p
    (Maddison et al. 2014, "A* Sampling"). ``logprobs`` and ``tokens`` get one (rows,) tensor a step.
    """

    def __init__(self, seeds: Sequence[int], params: SamplingParams, device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature = params.temperature
        self.top_p = TopPLogitsWarper(float(params.top_p)) if params.top_p < 1 else None
        self.logprobs: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``scores``: raw logits (rows, vocabulary) in fp32; returns what greedy search shall compare."""
        compared = self._with_noise(input_ids, scores) if self.temperature > 0 else scores
        tokens = compared.argmax(-1)
        self.tokens.append(tokens)
        self.logprobs.append(scores.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
        return compared

    def _with_noise(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        warped = scores / self.temperature
        if self.top_p is not None:
            warped = self.top_p(input_ids, warped)
        noise = torch.empty_like(warped)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return warped - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()


class HfEngine:
    """A transformers model behind the ``Engine`` protocol; made by ``start``."""

    name = "hf"
    version = transformers.__version__
    batch_rows = 128  # most requests in one batch
    batch_tokens = 65_536  # most prompt and answer tokens in one batch, padding included: bounds the KV cache

    def __init__(self, model: torch.nn.Module, stop_ids: list[int], max_model_len: int, threads: int | None):
        self._model: torch.nn.Module | None = model
        self._stop_ids, self._max_model_len, self._threads = stop_ids, max_model_len, threads

    def generate(self, requests: Sequence[SamplingRequest], params: SamplingParams) -> list[Completion]:
        """One completion a request, in order."""
        check_lengths(requests, params, self._max_model_len)
        done: dict[int, Completion] = {}
        with surroundings.threads(self._threads):
            for batch in self._batches(requests, params.max_new_tokens):
                done.update(zip(batch, self._generate([requests[i] for i in batch], params), strict=True))
        return [done[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[SamplingRequest], new_tokens: int) -> Iterator[list[int]]:
        """Indices of ``requests``, longest prompts first, in batches within the two bounds."""
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_token_ids), i))
        while order:
            longest = len(requests[order[0]].prompt_token_ids) + new_tokens
            rows = max(1, min(self.batch_rows, self.batch_tokens // longest))
            yield order[:rows]
            order = order[rows:]

    @torch.no_grad()
    def _generate(self, requests: Sequence[SamplingRequest], params: SamplingParams) -> list[Completion]:
        """Completions of one batch."""
        device = self._model.device
        width = max(len(r.prompt_token_ids) for r in requests)
        pad = self._stop_ids[0] if self._stop_ids else 0
        ids = [[pad] * (width - len(r.prompt_token_ids)) + list(r.prompt_token_ids) for r in requests]
        mask = [[0] * (width - len(r.prompt_token_ids)) + [1] * len(r.prompt_token_ids) for r in requests]
        choice = SeededChoice([r.seed for r in requests], params, device)
        self._model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            logits_processor=LogitsProcessorList([choice]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=params.max_new_tokens,
                eos_token_id=self._stop_ids or None,
                pad_token_id=pad,
            ),
        )
        tokens, logprobs = torch.stack(choice.tokens, 1).tolist(), torch.stack(choice.logprobs, 1).tolist()
        return [self._completion(*row) for row in zip(tokens, logprobs, strict=True)]

    def _completion(self, ids: list[int], logprobs: list[float]) -> Completion:
        """The answer up to its first stop token; the batch may have gone on for other rows."""
        for position, token in enumerate(ids, start=1):
            if token in self._stop_ids:
                return Completion(ids[:position], "stop", logprobs[:position])
        return Completion(ids, "length", logprobs)

    def close(self) -> None:
        """Drop the model and give cached GPU memory back."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def start(
    model_dir: str, *, dtype: str, max_model_len: int, device: str, threads: int | None, **_unused: object
) -> HfEngine:
    """Load the weights in ``model_dir`` for generation; see ``open_engine`` for the settings."""
    model = load_scorer(model_dir, dtype, device)
    if max_model_len > (limit := getattr(model.config, "max_position_embeddings", max_model_len)):
        raise UserError(f"{model_dir}: max_model_len={max_model_len}, but the model has {limit} positions")
    model.generation_config = GenerationConfig()  # not the checkpoint's own temperature, top_k, ...
    return HfEngine(model, stop_token_ids(model_dir), max_model_len, threads)
