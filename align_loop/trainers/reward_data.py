"""Pairs for a reward model: our token ids, untouched, with q, m and w beside them; and which member sees which pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from align_loop.errors import UserError
from align_loop.record import short_digest
from align_loop.trainers.reward_config import RewardModel

Example = dict[str, Any]
FLOAT_COLUMNS = {"q": 1.0, "m": 0.0, "w": 1.0}  # with what an example has where it has none


def check_examples(examples: list[Example], limit: int = 2**31) -> None:
    """Raise ``UserError`` for no examples, for one that is no pair, is empty or has more than ``limit`` tokens."""
    if not examples:
        raise UserError("no pairs for the reward model: every pair was filtered out, or the seed data is empty")
    for row in examples:
        name, kind = f"example {row['example_id']}", row.get("kind") or "pair"
        if kind != "pair":
            raise UserError(f"{name}: kind={kind}; a reward model is trained on pairs: leave this table's others out")
        for side in ("chosen_ids", "rejected_ids"):
            if not row["prompt_ids"] or not row.get(side):
                raise UserError(f"{name}: prompt or {side} has no tokens: filter such pairs out")
            if (length := len(row["prompt_ids"]) + len(row[side])) > limit:
                raise UserError(
                    f"{name}: prompt and {side} have {length} tokens, the model takes {limit}: "
                    f"lower the length limits of prompts or answers"
                )


def reward_rows(examples: list[Example], padding: bool) -> Dataset:
    """One row an example, in order: whole sequences ``chosen_ids`` and ``rejected_ids``, q, m, w, ``index``.

    With ``padding`` one more row follows (``index`` -1, weight 0), which fills up the last batch of data-parallel
    training.
    """
    columns: dict[str, list[Any]] = {
        "index": list(range(len(examples))),
        "chosen_ids": [list(row["prompt_ids"]) + list(row["chosen_ids"]) for row in examples],
        "rejected_ids": [list(row["prompt_ids"]) + list(row["rejected_ids"]) for row in examples],
    }
    for name, default in FLOAT_COLUMNS.items():
        columns[name] = [default if row.get(name) is None else float(row[name]) for row in examples]
    if padding:
        token = columns["chosen_ids"][0][:1]
        blank = {"index": -1, "chosen_ids": token, "rejected_ids": token, "q": 1.0, "m": 0.0, "w": 0.0}
        for name, values in columns.items():
            values.append(blank[name])
    return Dataset.from_dict(columns)


@dataclass
class RewardCollator:
    """Stacks B pairs as 2B right-padded sequences, all chosen answers first, then all rejected ones.

    ``input_ids``, ``attention_mask`` (2B, T); ``index`` and q, m, w (B,), the latter in float32.
    """

    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "index": torch.tensor([row["index"] for row in rows]),
        }
        for name in FLOAT_COLUMNS:
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch


def member_seed(seed: int, member: int) -> int:
    """The seed of member 1, 2, ...: the run's own for the first, in [0, 2**31) and unrelated for the others."""
    return seed if member == 1 else int(short_digest("member", seed, member), 16) % 2**31


def member_examples(examples: list[Example], config: RewardModel, member: int) -> list[Example]:
    """The pairs that member 1, 2, ... trains on: all of them, or all but those of its own fold."""
    if config.member_data == "seeds":
        return examples
    folds = fold_of_prompts(examples, config.members)
    return [row for row in examples if folds[_prompt(row)] != member]


def fold_of_prompts(examples: list[Example], folds: int) -> dict[str, int]:
    """Prompt id (example id, where a row has none) -> fold in 1..``folds``; a prompt's pairs stay together.

    Folds have the same number of prompts, give or take one, and follow from the ids alone, not from the rows' order.
    """
    prompts = sorted({_prompt(row) for row in examples}, key=lambda name: (short_digest("fold", name), name))
    if len(prompts) < folds:
        raise UserError(
            f"RewardModel.members={folds} folds of {len(prompts)} prompts: take fewer members, or more data"
        )
    return {name: 1 + index % folds for index, name in enumerate(prompts)}


def _prompt(row: Example) -> str:
    return row.get("prompt_id") or row["example_id"]
