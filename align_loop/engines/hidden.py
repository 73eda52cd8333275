"""What a model makes of given answers inside: sums of its last hidden states, by plain forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from align_loop.engines.scoring import Example, in_batches


def summed_hidden_states(
    model: PreTrainedModel,
    sequences: Sequence[Example],
    *,
    pad_id: int,
    token_budget: int,
    device: str | torch.device,
    on_done: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """The sum over an answer of the last hidden states from which its tokens were predicted: (n, hidden), fp32, CPU.

    Those are the states at the prompt's last token and at all of the answer's tokens but the last, as the output layer
    reads them (after the final norm). ``sequences``: (prompt ids, answer ids) in any order, the rows come in that
    order; zeros for an empty answer. Batches hold at most ``token_budget`` tokens, padding included (and at least one
    sequence). Raises ``ValueError`` for an empty prompt.
    """
    if any(answer and not prompt for prompt, answer in sequences):
        raise ValueError("summed_hidden_states: an empty prompt")
    results = torch.zeros(len(sequences), model.config.get_text_config().hidden_size)
    for batch in in_batches(model, sequences, token_budget, on_done):
        results[batch] = _sums([sequences[i] for i in batch], model, pad_id, device).cpu()
    return results


@torch.no_grad()
def _sums(batch: Sequence[Example], model: PreTrainedModel, pad_id: int, device: str | torch.device) -> torch.Tensor:
    """The sums of one batch (rows, hidden), padded on the right; the last token of a sequence is never read."""
    full = [(prompt + answer)[:-1] for prompt, answer in batch]
    width = max(map(len, full))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in full], device=device)
    lengths = torch.tensor([len(row) for row in full], device=device)[:, None]
    starts = torch.tensor([len(prompt) - 1 for prompt, _ in batch], device=device)[:, None]
    positions = torch.arange(width, device=device)[None]
    mask = positions < lengths
    states = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    summed = mask & (positions >= starts)
    return states.float().masked_fill(~summed[..., None], 0.0).sum(dim=1)
