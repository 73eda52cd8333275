"""Scores of given answers under a reward model, by plain forward passes of transformers.

The score is read at an answer's last token (its end-of-sequence token, where it has one), found by the attention
mask. ``transformers`` looks for the last id that isn't the padding id instead: the same place, unless an answer ends
with that id. The head is computed in float32, since bfloat16 scores around 4 are 1/32 apart and would tie.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from align_loop.engines.reward_folder import RewardFolder, read_reward_folder
from align_loop.engines.scoring import Example, in_batches
from align_loop.errors import UserError
from align_loop.objectives.reward import preference_score

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # how far a score may move with the batch it is computed in


def load_reward_model(folder: str | Path, dtype: str, device: str | torch.device) -> PreTrainedModel:
    """One member for inference: a sequence-classification model from safetensors, without remote code.

    Raises ``UserError`` where there is no such model, and where ``folder`` has no weights for its score head.
    """
    model, missing = load_classifier(folder, dtype=getattr(torch, dtype))
    if missing:
        raise UserError(f"{folder}: no reward model: its weights lack {', '.join(sorted(missing)[:3])}")
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = 0  # asked for by transformers; it decides nothing here
    return model.to(device).eval()


def load_classifier(folder: str | Path, **arguments: Any) -> tuple[PreTrainedModel, set[str]]:
    """A sequence-classification model (``arguments`` as in ``from_pretrained``) and its weights that ``folder`` lacks.

    Quiet, since a fresh head is reported at length otherwise; the caller judges the second value.
    """
    verbosity, shown = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=Path(folder).is_dir(),
            output_loading_info=True,
            **arguments,
        )
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: no model that can carry a score head: {text}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
    return model, set(found["missing_keys"])


def score_head(model: nn.Module) -> nn.Linear:
    """The linear layer that makes scores of hidden states; under LoRA its trained copy."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "score" in (parts := name.split(".")) and "original_module" not in parts
    ]
    if len(found) != 1:
        raise UserError(f"{type(model).__name__}: {len(found)} score heads, one is needed: take another kind of model")
    return found[0]


def last_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The head's output (B, d) in float32 at the last attended position of each right-padded row of (B, T).

    Computed inside the model's own forward pass, so wrappers (data parallel, adapters) see an ordinary one.
    """
    rows, last = torch.arange(len(input_ids), device=input_ids.device), attention_mask.sum(dim=1) - 1

    def at_the_end(head: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias.float()
        scores = nn.functional.linear(inputs[0][rows, last].float(), head.weight.float(), bias)
        return scores[:, None].expand(-1, output.shape[1], -1)

    hook = score_head(model).register_forward_hook(at_the_end)
    try:
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    finally:
        hook.remove()


@torch.no_grad()
def reward_vectors(
    model: PreTrainedModel,
    sequences: Sequence[Example],
    *,
    token_budget: int,
    device: str | torch.device,
    names: Sequence[str] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Tensor:
    """What one member gives each of ``sequences`` (prompt ids, answer ids): (n, d) float32, on the CPU.

    Batches hold at most ``token_budget`` tokens, padding included (and at least one sequence), the longest first.
    Raises ``UserError``, by the sequence's name or number, for one without an answer or too long for the model.
    """
    _check_lengths(model, sequences, names)
    pad_id = model.config.get_text_config().pad_token_id
    vectors = torch.zeros(len(sequences), score_head(model).out_features)
    for batch in in_batches(model, sequences, token_budget, on_done):
        full = [sequences[i][0] + sequences[i][1] for i in batch]
        width = max(map(len, full))
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in full], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in full], device=device)
        vectors[batch] = last_scores(model, ids, mask).float().cpu()
    return vectors


def member_vectors(
    folder: str | Path | RewardFolder,
    sequences: Sequence[Example],
    *,
    dtype: str,
    device: str | torch.device,
    token_budget: int = 16384,
    names: Sequence[str] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Tensor:
    """What every member gives each sequence: (members, n, d) float32. One member is in memory at a time."""
    described = folder if isinstance(folder, RewardFolder) else read_reward_folder(folder)
    found = []
    for member in described.members:
        model = load_reward_model(member, dtype, device)
        if (width := score_head(model).out_features) != described.dim:
            raise UserError(f"{member}: a head of {width} numbers where {described.dim} were announced")
        found.append(
            reward_vectors(model, sequences, token_budget=token_budget, device=device, names=names, on_done=on_done)
        )
        del model
    return torch.stack(found)


def reward_scores(
    folder: str | Path | RewardFolder,
    sequences: Sequence[Example],
    *,
    dtype: str,
    device: str | torch.device,
    token_budget: int = 16384,
    groups: Sequence[Hashable] | None = None,
    names: Sequence[str] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> tuple[list[float], list[float | None]]:
    """One score for each of ``sequences`` (prompt ids, answer ids): mean and standard deviation over the members.

    ``groups``: which sequences belong together, for example prompt ids. A gpm head only says how an answer compares
    with others, so it needs them: the score is the mean log-odds against the other answers of the group, 0 for a lone
    one. The deviation is the sample's (n - 1), None for a single member. Training fixes differences within a prompt
    and not the level, which each member is free to choose, so with ``groups`` every member's mean over the group is
    taken off first (and a lone answer's deviation is None); without, the levels are part of it.

    ``on_done(n)`` is called after ``n`` more sequences of a member. ``TOLERANCE`` says how much results may depend on
    ``token_budget`` and order.
    """
    described = folder if isinstance(folder, RewardFolder) else read_reward_folder(folder)
    if described.head == "gpm" and groups is None:
        raise ValueError("reward_scores: a gpm head compares answers: say with `groups` which belong together")
    vectors = member_vectors(
        described, sequences, dtype=dtype, device=device, token_budget=token_budget, names=names, on_done=on_done
    )
    scores = torch.stack([scalar_scores(v, described.head, groups) for v in vectors.double()])
    return scores.mean(dim=0).tolist(), _deviations(scores, groups)


def _deviations(scores: Tensor, groups: Sequence[Hashable] | None) -> list[float | None]:
    """Standard deviation over the members (M, n) -> n numbers, see ``reward_scores``."""
    if len(scores) == 1:
        return [None] * scores.shape[1]
    if groups is None:
        return scores.std(dim=0).tolist()
    deviations: list[float | None] = [None] * scores.shape[1]
    for indices in _places(groups):
        if len(indices) > 1:
            relative = scores[:, indices] - scores[:, indices].mean(dim=1, keepdim=True)
            for index, value in zip(indices, relative.std(dim=0).tolist(), strict=True):
                deviations[index] = value
    return deviations


def _places(groups: Sequence[Hashable]) -> list[list[int]]:
    """The positions of each group's members, in the order in which groups occur."""
    places: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        places.setdefault(group, []).append(index)
    return list(places.values())


def scalar_scores(vectors: Tensor, head: str, groups: Sequence[Hashable] | None) -> Tensor:
    """One number an answer (n,) from one member's (n, d): see ``reward_scores``."""
    if head == "scalar":
        return vectors[:, 0]
    scores = torch.zeros(len(vectors), dtype=vectors.dtype)
    for indices in _places(groups):
        matrix = preference_matrix(vectors[indices], head)
        scores[indices] = matrix.sum(dim=1) / max(len(indices) - 1, 1)
    return scores


def preference_matrix(group: Tensor, head: str) -> Tensor:
    """``s(i > j)`` (n, n), log-odds, for the vectors (n, d) of one prompt's answers: skew-symmetric, 0 on the diagonal.

    Row i, column j: how much more answer i is liked than answer j. sigmoid of it is the matrix of probabilities.
    """
    return preference_score(group[:, None], group[None, :], head)


def _check_lengths(model: PreTrainedModel, sequences: Sequence[Example], names: Sequence[str] | None) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    for index, (prompt, answer) in enumerate(sequences):
        name = f"sequence {index}" if names is None else names[index]
        if not answer:
            raise UserError(f"{name}: an answer without tokens has no score: leave it out")
        if (length := len(prompt) + len(answer)) > limit:
            raise UserError(
                f"{name}: prompt and answer have {length} tokens, the reward model takes {limit}: "
                f"lower the length limits of prompts or answers"
            )
