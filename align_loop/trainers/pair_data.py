"""From the record's training pairs to padded batches: our token ids, untouched, with q, m, w and beta beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from align_loop.errors import UserError

FLOAT_COLUMNS = ("q", "m", "w", "beta")


def pair_rows(examples: list[dict[str, Any]], beta: float, limit: int, padding: bool) -> Dataset:
    """The columns that training needs, one row an example, in order; ``index`` is the position in ``examples``.

    ``beta`` fills in where an example has none. With ``padding`` one more row follows (``index`` -1, weight 0), which
    fills up the last batch of data-parallel training. Raises ``UserError`` for an empty prompt or answer and for a
    sequence longer than ``limit`` tokens: nothing is cut and nothing is dropped here.
    """
    for row in examples:
        _check_lengths(row, limit)
    columns: dict[str, list[Any]] = {
        "index": list(range(len(examples))),
        "prompt_ids": [row["prompt_ids"] for row in examples],
        "chosen_ids": [row["chosen_ids"] for row in examples],
        "rejected_ids": [row["rejected_ids"] for row in examples],
        "q": [_number(row, "q", 1.0) for row in examples],
        "m": [_number(row, "m", 0.0) for row in examples],
        "w": [_number(row, "w", 1.0) for row in examples],
        "beta": [_number(row, "beta", beta) for row in examples],
    }
    if padding:
        first = examples[0]
        ids = {"prompt_ids": first["prompt_ids"][-1:], "chosen_ids": first["chosen_ids"][:1]}
        blank = {"index": -1, **ids, "rejected_ids": ids["chosen_ids"], "q": 1.0, "m": 0.0, "w": 0.0, "beta": beta}
        for name, values in columns.items():
            values.append(blank[name])
    return Dataset.from_dict(columns)


def _number(row: dict[str, Any], name: str, default: float) -> float:
    value = row.get(name)
    return default if value is None else float(value)


def _check_lengths(row: dict[str, Any], limit: int) -> None:
    for side in ("chosen_ids", "rejected_ids"):
        if not row["prompt_ids"] or not row[side]:
            raise UserError(f"example {row['example_id']}: prompt or {side} has no tokens: filter such pairs out")
        if (length := len(row["prompt_ids"]) + len(row[side])) > limit:
            raise UserError(
                f"example {row['example_id']}: prompt and {side} have {length} tokens, the model takes {limit}: "
                f"lower the length limits of prompts or answers"
            )


@dataclass
class PairCollator:
    """Stacks B pairs as 2B right-padded sequences, all chosen answers first, then all rejected ones.

    ``input_ids``, ``attention_mask``, ``completion_mask`` (2B, T); ``index`` and q, m, w, beta (B,), the latter
    in float32.
    """

    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pairs = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
        ids = [torch.tensor(prompt + answer) for prompt, answer in pairs]
        lengths = torch.tensor([len(sequence) for sequence in ids]).unsqueeze(1)
        prompts = torch.tensor([len(prompt) for prompt, _ in pairs]).unsqueeze(1)
        positions = torch.arange(int(lengths.max())).unsqueeze(0)
        attention = positions < lengths
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": attention.long(),
            "completion_mask": (attention & (positions >= prompts)).long(),
            "index": torch.tensor([row["index"] for row in rows]),
        }
        for name in FLOAT_COLUMNS:
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch
