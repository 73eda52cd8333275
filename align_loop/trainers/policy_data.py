"""From the record's examples to padded batches: our token ids, untouched, with what the losses read beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from align_loop.errors import UserError
from align_loop.objectives.batch import KINDS, PADDING

Row = dict[str, Any]
Answer = tuple[list[int], list[int], list[float] | None]  # prompt ids, answer ids, token weights

DEFAULTS = {"q": 1.0, "m": 0.0, "w": 1.0, "beta": math.nan, "beta_rejected": math.nan, "label": math.nan}
SIDES = ("chosen", "rejected")


def answers_of(row: Row) -> Iterator[tuple[str, list[int]]]:
    """The answers of a row of ``record.EXAMPLES``: (column, ids); a pair has two, a point or demonstration one."""
    kind = kind_of(row)
    if kind == "group":
        yield from (("group_ids", ids) for ids in row["group_ids"] or [])
    else:
        yield from ((f"{side}_ids", row[f"{side}_ids"]) for side in (SIDES if kind == "pair" else SIDES[:1]))


def tokens_of(row: Row) -> int:
    """How many tokens an example puts through a model: every answer with its prompt."""
    return sum(len(row["prompt_ids"]) + len(ids) for _, ids in answers_of(row))


def kind_of(row: Row) -> str:
    """The example's kind; ``pair`` where it has none."""
    return row.get("kind") or "pair"


def policy_rows(examples: list[Row], limit: int, padding: bool, mismatch: bool) -> Dataset:
    """The columns that training needs, one row an example, in order; ``index`` is the position in ``examples``.

    With ``padding`` one more row follows (``index`` -1, weight 0, of no kind), which fills up the last batch of
    data-parallel training. With ``mismatch`` each row also has another row's answers, with which its prompt is paired
    for KTO's baseline: of the nearest before it, in a circle, with another prompt. Raises ``UserError`` for an empty
    prompt or answer and for a sequence longer than ``limit`` tokens: nothing is cut and nothing is dropped here.
    """
    for row in examples:
        _check_lengths(row, limit)
    rows = [_columns(index, row) for index, row in enumerate(examples)]
    if padding:
        token = examples[0]["prompt_ids"][-1:]
        blank = {"example_id": "", "kind": "demo", "prompt_ids": token, "chosen_ids": token, "w": 0.0}
        rows.append({**_columns(-1, blank), "kind": PADDING})
    if mismatch:
        _add_mismatches(rows, limit)
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})


def _columns(index: int, row: Row) -> Row:
    found = {"index": index, "kind": KINDS.index(kind_of(row)), "tag": row.get("tag") or ""}
    answers = [ids for _, ids in answers_of(row)]
    found |= {"prompt_ids": list(row["prompt_ids"]), "answers": answers, "weights": _weights(row, answers)}
    scores = row.get("group_scores") if kind_of(row) == "group" else None
    found["scores"] = [float(score) for score in scores or [0.0] * len(answers)]
    for name, default in DEFAULTS.items():
        value = row.get(name)
        found[name] = default if value is None else float(value)
    return found


def _weights(row: Row, answers: list[list[int]]) -> list[list[float]]:
    """The token weights of each answer, [] where every token counts 1."""
    if kind_of(row) == "group":
        return [[] for _ in answers]
    found = []
    for side, ids in zip(SIDES, answers, strict=False):
        weights = row.get(f"{side}_weights")
        if weights is not None and len(weights) != len(ids):
            raise UserError(
                f"example {row['example_id']}: {side}_weights has {len(weights)} value(s) for {len(ids)} tokens: "
                f"give one a token, or null"
            )
        found.append([float(weight) for weight in weights or []])
    return found


def _add_mismatches(rows: list[Row], limit: int) -> None:
    """Each row's mismatched answers: another prompt's, cut where prompt and answer would be too long together."""
    for position, row in enumerate(rows):
        others = (rows[position - back] for back in range(1, len(rows)))
        usable = (r for r in others if r["index"] >= 0 and r["prompt_ids"] != row["prompt_ids"])
        count = 1 if row["kind"] == KINDS.index("group") else len(row["answers"])
        answers = next(usable, row)["answers"][:count]
        row["mismatched"] = [ids[: limit - len(row["prompt_ids"])] for ids in answers]


def _check_lengths(row: Row, limit: int) -> None:
    for side, ids in answers_of(row):
        if not row["prompt_ids"] or not ids:
            raise UserError(f"example {row['example_id']}: prompt or {side} has no tokens: filter such pairs out")
        if (length := len(row["prompt_ids"]) + len(ids)) > limit:
            raise UserError(
                f"example {row['example_id']}: prompt and {side} have {length} tokens, the model takes {limit}: "
                f"lower the length limits of prompts or answers"
            )


@dataclass
class PolicyCollator:
    """Stacks the answers of B examples as N right-padded sequences: all chosen ones, all rejected ones, then groups'.

    ``input_ids``, ``attention_mask``, ``completion_mask`` (N, T), ``token_weights`` (N, T) where any example has some;
    ``owner``, ``member_score`` (N,); ``chosen``, ``rejected`` (B,) rows of the stack; ``index``, ``kind``, ``tag`` and
    the columns of ``DEFAULTS`` (B,), in float32; with mismatches ``mismatched_*`` for the stack of those. The meaning
    is that of ``objectives.batch.ExampleBatch``; ``tags`` are the tags that a term names.
    """

    pad_id: int
    tags: list[str] = field(default_factory=list)

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        grouped = KINDS.index("group")
        batch = self._stack(rows, "answers")
        if any(weights for row in rows for weights in row["weights"]):
            batch["token_weights"] = self._token_weights(rows, batch)
        owners = [i for i, row in enumerate(rows) if row["kind"] == grouped for _ in row["answers"]]
        scores = [score for row in rows if row["kind"] == grouped for score in row["scores"]]
        others = len(batch["input_ids"]) - len(owners)
        batch["owner"] = torch.tensor([-1] * others + owners)
        batch["member_score"] = torch.tensor([0.0] * others + scores, dtype=torch.float32)
        batch["index"] = torch.tensor([row["index"] for row in rows])
        batch["kind"] = torch.tensor([row["kind"] for row in rows])
        batch["tag"] = torch.tensor([self.tags.index(r["tag"]) if r["tag"] in self.tags else -1 for r in rows])
        for name in DEFAULTS:
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        if "mismatched" in rows[0]:
            batch |= {f"mismatched_{name}": value for name, value in self._stack(rows, "mismatched").items()}
        return batch

    def _stack(self, rows: list[Row], column: str) -> dict[str, torch.Tensor]:
        sequences, chosen, rejected = [], [-1] * len(rows), [-1] * len(rows)
        for place, taken in ((0, chosen), (1, rejected)):
            for i, row in enumerate(rows):
                if row["kind"] != KINDS.index("group") and len(row[column]) > place:
                    taken[i] = len(sequences)
                    sequences.append((row["prompt_ids"], row[column][place]))
        for row in rows:
            if row["kind"] == KINDS.index("group"):
                sequences += [(row["prompt_ids"], ids) for ids in row[column]]
        ids = [torch.tensor(prompt + answer) for prompt, answer in sequences]
        lengths = torch.tensor([len(sequence) for sequence in ids]).unsqueeze(1)
        prompts = torch.tensor([len(prompt) for prompt, _ in sequences]).unsqueeze(1)
        positions = torch.arange(int(lengths.max())).unsqueeze(0)
        attention = positions < lengths
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": attention.long(),
            "completion_mask": (attention & (positions >= prompts)).long(),
            "chosen": torch.tensor(chosen),
            "rejected": torch.tensor(rejected),
        }

    def _token_weights(self, rows: list[Row], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = torch.ones(batch["input_ids"].shape, dtype=torch.float32)
        for place, side in enumerate(SIDES):
            for row, sequence in zip(rows, batch[side].tolist(), strict=True):
                if sequence >= 0 and (given := row["weights"][place]):
                    start = len(row["prompt_ids"])
                    weights[sequence, start : start + len(given)] = torch.tensor(given)
        return weights
