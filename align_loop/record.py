"""The record: one table format for everything that passes between stages.

Every table is a Parquet file with one of the schemas below. Rows are joined by ``prompt_id`` and
``sample_id``, never by position. Fields that shape the loss have neutral defaults (q = 1, m = 0,
w = 1, beta = null, meaning "the objective's own"), so that a plain preference dataset is already
a valid table of examples.

Measured times never go into tables: the same inputs must give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Row = dict[str, Any]

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IDS = pa.list_(pa.int32())

# ``meta`` is a JSON object as text: what a prompt source knows about its prompt (the demands of the
# embedded setting, the file and line of a user's row). Parts other than that source don't read it.
PROMPTS = pa.schema([("prompt_id", pa.string()), ("messages", _MESSAGES), ("meta", pa.string())])

DEMONSTRATIONS = pa.schema(
    [("prompt_id", pa.string()), ("messages", _MESSAGES), ("answer", pa.string()), ("meta", pa.string())]
)

# Human (or simulated human) comparisons. ``gold_chosen``/``gold_rejected``: the true quality in [0, 1]
# where the setting knows it, else null; for measuring only.
PREFERENCES = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_id", pa.string()),
        ("messages", _MESSAGES),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("gold_chosen", pa.float64()),
        ("gold_rejected", pa.float64()),
        ("meta", pa.string()),
    ]
)

# Sampled answers. ``logprobs``: raw log-probabilities (nats, temperature 1) of ``token_ids`` as the sampling
# engine reports them. ``finish_reason``: "stop" (the last id is an end-of-sequence token) or "length". ``variant``: the
# name of the generation context that the answer was sampled under; null for the plain prompt.
ANSWERS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("prompt_id", pa.string()),
        ("k", pa.int32()),
        ("text", pa.string()),
        ("prompt_token_ids", _IDS),
        ("token_ids", _IDS),
        ("finish_reason", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
        ("request_seed", pa.int64()),
        ("variant", pa.string()),
    ]
)

# Raw annotator output, one row an answer; shapers and builders work on top of it. ``reward_sd``: how far several
# annotators or members disagree (null for one); ``cost``: what was paid for this answer's score, in the currency of
# the endpoint's prices.
SCORES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("prompt_id", pa.string()),
        ("reward", pa.float64()),
        ("reward_sd", pa.float64()),
        ("logp_policy", pa.float64()),
        ("logp_reference", pa.float64()),
        ("tokens", pa.int32()),
        ("cost", pa.float64()),
    ]
)

# Comparisons of two answers to one prompt: ``p_first`` is the probability that the first is the better one.
PAIRWISE = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("first_sample_id", pa.string()),
        ("second_sample_id", pa.string()),
        ("p_first", pa.float64()),
    ]
)

# The true quality of answers, in [0, 1], where a setting knows it.
GOLD = pa.schema([("sample_id", pa.string()), ("prompt_id", pa.string()), ("gold", pa.float64())])

# Training examples, by ``kind``: pair; point (one answer, in the chosen columns, and its ``label``, +1 or -1); demo
# (one answer to imitate); group (all answers of a prompt, in the group columns). ``q``: probability that the chosen
# answer is the better one; ``m``: margin in reward units; ``w``: weight; ``beta``: null for the objective's;
# ``beta_rejected``: null for ``beta``; ``chosen_weights``/``rejected_weights``: one an answer token, null for 1.
# ``chosen_ids``/``rejected_ids`` end with an EOS id only where one was generated (or a person wrote the answer).
# ``truncated`` says which side was cut at the limit.
EXAMPLES = pa.schema(
    [
        ("example_id", pa.string()),
        ("kind", pa.string()),
        ("tag", pa.string()),
        ("prompt_id", pa.string()),
        ("messages", _MESSAGES),
        ("chosen_sample_id", pa.string()),
        ("rejected_sample_id", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
        ("chosen_truncated", pa.bool_()),
        ("rejected_truncated", pa.bool_()),
        ("score_chosen", pa.float64()),
        ("score_rejected", pa.float64()),
        ("gold_chosen", pa.float64()),
        ("gold_rejected", pa.float64()),
        ("q", pa.float64()),
        ("m", pa.float64()),
        ("w", pa.float64()),
        ("beta", pa.float64()),
        ("label", pa.float64()),
        ("beta_rejected", pa.float64()),
        ("chosen_weights", pa.list_(pa.float32())),
        ("rejected_weights", pa.list_(pa.float32())),
        ("group_sample_ids", pa.list_(pa.string())),
        ("group_ids", pa.list_(_IDS)),
        ("group_scores", pa.list_(pa.float64())),
    ]
)

# What the noise detector decided, one row each time a pair passed through training.
FLAGS = pa.schema(
    [
        ("example_id", pa.string()),
        ("step", pa.int32()),
        ("detector_margin", pa.float64()),
        ("flagged", pa.bool_()),
        ("alpha_active", pa.bool_()),
    ]
)

_DEFAULTS: dict[str, Any] = {"meta": "{}", "kind": "pair", "tag": "", "q": 1.0, "m": 0.0, "w": 1.0}


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> int:
    """Write ``rows`` to ``path`` as Parquet and flush them to disk; returns the number of rows.

    Missing fields take their neutral default or null; a field that the schema lacks is an error
    (``KeyError`` naming it), so that nothing is dropped silently.
    """
    rows = list(rows)
    names = set(schema.names)
    for row in rows:
        if unknown := set(row) - names:
            raise KeyError(f"{path.name}: no column {sorted(unknown)} in this table's schema")
    columns = {name: [row.get(name, _DEFAULTS.get(name)) for row in rows] for name in schema.names}
    table = pa.table({name: pa.array(columns[name], type=schema.field(name).type) for name in schema.names}, schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as handle:
        pq.write_table(table, handle, compression="zstd")
        handle.flush()
        os.fsync(handle.fileno())
    return len(rows)


def read_rows(path: Path) -> list[Row]:
    """All rows of a Parquet table as dictionaries, in file order."""
    return pq.read_table(path).to_pylist()


def gold_by_sample(stage: Path) -> dict[str, float]:
    """Sample id -> gold, from the folder of a stage that wrote ``gold.parquet``."""
    return {row["sample_id"]: row["gold"] for row in read_rows(stage / "gold.parquet")}


def open_table(path: Path):
    """The table as a ``datasets.Dataset`` (memory-mapped), for users and trainers."""
    from datasets import Dataset  # slow import, wanted by few

    return Dataset.from_parquet(str(path))


def short_digest(*parts: Any) -> str:
    """16 hex digits that identify ``parts`` (any JSON values) by content."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def prompt_id(messages: Sequence[Message]) -> str:
    """The identity of a prompt: a digest of its messages, equal wherever the same prompt occurs."""
    return short_digest([[m["role"], m["content"]] for m in messages])


def request_seed(seed: int, iteration: int, prompt: str, k: int) -> int:
    """The seed of one sampling request, in [0, 2**31): a function of (seed, iteration, prompt id, k) alone."""
    return int(short_digest("request", seed, iteration, prompt, k), 16) % (2**31)
