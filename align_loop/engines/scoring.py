"""Log-probabilities of given answers under a model, by plain forward passes of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from align_loop.errors import UserError

Example = tuple[list[int], list[int]]  # prompt ids, answer ids

_CHUNK_ELEMENTS = 2**24  # fp32 log-probabilities in memory at once: 64 MiB


def load_scorer(model_dir: str | Path, dtype: str, device: str | torch.device) -> PreTrainedModel:
    """A causal language model for inference: from safetensors, without remote code.

    ``model_dir``: a folder (nothing is downloaded then) or a hub name; ``dtype``: "float32", "bfloat16", ...
    Raises ``UserError`` where there is no such model.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=Path(model_dir).is_dir(),
        )
    except OSError as error:
        raise UserError(f"{model_dir}: no model to load: {' '.join(str(error).split())}") from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    return model.to(device).eval()


def token_logprobs(
    model: PreTrainedModel,
    sequences: Sequence[Example],
    *,
    pad_id: int,
    token_budget: int,
    device: str | torch.device,
    on_done: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """log pi(answer token | prompt, answer so far) for each answer token, natural logs, fp32 from the logits.

    ``sequences``: (prompt ids, answer ids), in any order; the results come in that order, [] for an empty
    answer. Batches hold at most ``token_budget`` tokens, padding included (and at least one sequence); the
    longest comes first, so that memory runs out at once if at all. ``on_done(n)`` is called when ``n`` more
    sequences are scored. Raises ``ValueError`` for an empty prompt: its first token has no condition.
    """
    results: list[list[float]] = [[] for _ in sequences]
    if any(answer and not prompt for prompt, answer in sequences):
        raise ValueError("token_logprobs: an empty prompt")
    for batch in in_batches(model, sequences, token_budget, on_done):
        for index, values in zip(batch, _score([sequences[i] for i in batch], model, pad_id, device), strict=True):
            results[index] = values
    return results


def next_token_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    tokens: Sequence[int],
    *,
    pad_id: int,
    token_budget: int,
    device: str | torch.device,
    on_done: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """log p(token | prompt) of each of ``tokens`` as what follows each prompt: (prompts, tokens), nats, fp32.

    Batches, order and ``on_done`` as in ``token_logprobs``; their softmax is that of the tokens' logits. Raises
    ``ValueError`` for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("next_token_logprobs: an empty prompt")
    results: list[list[float]] = [[] for _ in prompts]
    wanted = torch.tensor(list(tokens), device=device)
    for batch in in_batches(model, [(prompt, [0]) for prompt in prompts], token_budget, on_done):
        logits = _last_logits([prompts[i] for i in batch], model, pad_id, device)
        values = torch.stack([_gather_log_softmax(logits, t.expand(len(batch))) for t in wanted], dim=1).tolist()
        for index, row in zip(batch, values, strict=True):
            results[index] = row
    return results


def sum_logprobs(logprobs: Sequence[Sequence[float]]) -> list[float]:
    """The log-probability of each whole answer, from ``token_logprobs``."""
    return [float(sum(values)) for values in logprobs]


def in_batches(
    model: PreTrainedModel, sequences: Sequence[Example], token_budget: int, on_done: Callable[[int], None] | None
) -> Iterator[list[int]]:
    """Indices in batches (see ``_batches``), the model in evaluation mode meanwhile; ``on_done(n)`` after each one."""
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(sequences, token_budget):
            yield batch
            if on_done is not None:
                on_done(len(batch))
    finally:
        model.train(was_training)
    if on_done is not None and (empty := sum(not answer for _, answer in sequences)):
        on_done(empty)


def _batches(sequences: Sequence[Example], token_budget: int) -> Iterator[list[int]]:
    """Indices of the sequences with an answer, longest first, in batches of at most ``token_budget`` tokens."""
    lengths = [len(prompt) + len(answer) for prompt, answer in sequences]
    order = sorted((i for i, (_, answer) in enumerate(sequences) if answer), key=lambda i: (-lengths[i], i))
    while order:
        rows = max(1, token_budget // lengths[order[0]])
        yield order[:rows]
        order = order[rows:]


@torch.no_grad()
def _score(
    batch: Sequence[Example], model: PreTrainedModel, pad_id: int, device: str | torch.device
) -> list[list[float]]:
    """Token log-probabilities of one batch, padded on the right."""
    full = [prompt + answer for prompt, answer in batch]
    width = max(map(len, full)) - 1  # the last token is predicted, never read
    ids = torch.tensor([(row + [pad_id] * width)[:width] for row in full])
    mask = torch.tensor([([1] * len(row) + [0] * width)[:width] for row in full])
    rows = torch.tensor([r for r, (_, answer) in enumerate(batch) for _ in answer])
    columns = torch.tensor([len(p) - 1 + t for p, answer in batch for t in range(len(answer))])
    targets = torch.tensor([token for _, answer in batch for token in answer], device=device)
    logits = _logits_at(model, ids.to(device), mask.to(device), rows.to(device), columns.to(device))
    values = iter(_gather_log_softmax(logits, targets).tolist())
    return [[next(values) for _ in answer] for _, answer in batch]


@torch.no_grad()
def _last_logits(
    prompts: Sequence[list[int]], model: PreTrainedModel, pad_id: int, device: str | torch.device
) -> torch.Tensor:
    """Logits (n, vocabulary) behind the last token of each prompt, padded on the right."""
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [pad_id] * (width - len(prompt)) for prompt in prompts], device=device)
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts], device=device)
    columns = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    return _logits_at(model, ids, mask, torch.arange(len(prompts), device=device), columns)


def _logits_at(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Logits (n, vocabulary) at the n positions (rows, columns) of ``ids`` (batch, width), and at no other.

    The positions are taken in front of the output layer, inside the model's own forward pass, so that
    whatever the model does to its logits afterwards (scaling, soft caps) is still done.
    """

    def take(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[torch.Tensor]:
        return (inputs[0][rows, columns][None],)

    hook = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    finally:
        hook.remove()


def _gather_log_softmax(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[targets] (n,) in fp32, for (n, vocabulary) logits, a bounded piece at a time."""
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    pieces = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([x.float().log_softmax(-1).gather(-1, t[:, None])[:, 0] for x, t in pieces])
