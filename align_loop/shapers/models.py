"""What a model says about the answers of pairs, for the shapers that read one. Each distinct answer is scored once."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_loop.record import Row
from align_loop.render import Renderer
from align_loop.shapers.context import ShapeContext

if TYPE_CHECKING:
    from torch import Tensor

Key = tuple[tuple[int, ...], tuple[int, ...]]  # prompt ids, answer ids


def key(row: Row, side: str) -> Key:
    """What a model is shown of one answer of a pair."""
    return tuple(row["prompt_ids"]), tuple(row[f"{side}_ids"])


def logprobs(model: Path, rows: list[Row], context: ShapeContext) -> dict[Key, float]:
    """log pi(answer | prompt) in nats, summed over its tokens, for both answers of each pair."""
    from align_loop.engines import scoring  # imports torch

    def score(*arguments: Any, **settings: Any) -> list[float]:
        return scoring.sum_logprobs(scoring.token_logprobs(*arguments, **settings))

    return _for_each(score, model, rows, context)


def hidden_sums(model: Path, rows: list[Row], context: ShapeContext) -> dict[Key, Tensor]:
    """The sum of the last hidden states (hidden,) over the answer, for both answers of each pair."""
    from align_loop.engines import hidden

    return _for_each(hidden.summed_hidden_states, model, rows, context)


def _for_each(compute: Any, model: Path, rows: list[Row], context: ShapeContext) -> dict[Key, Any]:
    """``compute`` (as ``scoring.token_logprobs`` is called) for every distinct answer of ``rows``."""
    from align_loop.engines import scoring

    if not rows:
        return {}
    keys = sorted({key(row, side) for row in rows for side in ("chosen", "rejected")})
    stage = context.stage
    hardware = stage.hardware if stage else {}
    device = hardware.get("device") or "cpu"
    progress = stage.progress(len(keys), "answers") if stage else contextlib.nullcontext()
    with progress as shown:
        values = compute(
            scoring.load_scorer(model, context.dtype, device),
            [(list(prompt), list(answer)) for prompt, answer in keys],
            pad_id=Renderer(model).pad_id,
            token_budget=hardware.get("score_token_budget") or 16384,
            device=device,
            on_done=shown.update if shown else None,
        )
    if stage:
        stage.tokens(sum(len(prompt) + len(answer) for prompt, answer in keys))
    return dict(zip(keys, values, strict=True))
