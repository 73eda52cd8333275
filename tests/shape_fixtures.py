"""Pairs, groups and contexts for the tests of builders and shapers."""

from __future__ import annotations

import random

from align_loop.groups import Group
from align_loop.shapers.context import ShapeContext

CONTEXT = ShapeContext(renderer=None, seed=0)  # for shapers that read the rows alone


def pair(i, gap=None, **fields):
    """A pair of prompt ``p<i>`` with scores (gap, 0), or without scores."""
    words = [7 + i % 50, 8 + i % 50]
    return {
        "example_id": f"e{i:03}",
        "tag": "self",
        "prompt_id": f"p{i}",
        "messages": [{"role": "user", "content": f"w{words[0]}"}],
        "prompt_ids": [1, 4, words[0], 5],
        "chosen": f"w{words[1]} good",
        "rejected": f"w{words[1]} bad",
        "chosen_ids": [words[1], 10],
        "rejected_ids": [words[1], 11],
        "chosen_sample_id": f"s{i}-0",
        "rejected_sample_id": f"s{i}-1",
        "chosen_truncated": False,
        "rejected_truncated": False,
        "score_chosen": gap,
        "score_rejected": None if gap is None else 0.0,
        "gold_chosen": 0.75,
        "gold_rejected": 0.25,
    } | fields


def group(rewards, i=0, compared=None, variants=None, logps=None, tokens=10):
    """The group of prompt ``p<i>`` with these rewards; its answers are ``s<i>-<k>``."""
    prompt = {"prompt_id": f"p{i}", "messages": [{"role": "user", "content": f"w{7 + i}"}]}
    answers, scores = [], []
    for k, reward in enumerate(rewards):
        sample = {"sample_id": f"s{i}-{k}", "prompt_id": f"p{i}"}
        answers.append(
            sample
            | {"k": k, "text": f"text {i} {k}", "prompt_token_ids": [1, 7 + i], "token_ids": [10 + i, 20 + k]}
            | {"finish_reason": "length" if k % 2 else "stop", "variant": (variants or {}).get(k)}
        )
        logp = None if logps is None else logps[k]
        scores.append(sample | {"reward": reward, "logp_reference": logp, "tokens": tokens})
    return Group(prompt, answers, scores, compared)


def context_of(*groups, seed=0, **fields):
    return ShapeContext(None, seed, {g.prompt["prompt_id"]: g for g in groups}, **fields)


def shaped(shaper, rows, context=CONTEXT):
    """What stays, and example id -> reason of what goes; nothing may be lost and ``rows`` must not be changed."""
    before = [dict(row) for row in rows]
    kept, dropped = shaper.shape(rows, context)
    assert rows == before, f"{shaper} changed its input in place"
    assert all(dropped.values())
    gone = {row["example_id"]: reason for reason, group in dropped.items() for row in group}
    ids = [row["example_id"] for row in kept] + list(gone)
    assert len(set(ids)) == len(ids) and {row["example_id"] for row in rows} <= set(ids)
    return kept, gone


def ids_of(rows):
    return [row["example_id"] for row in rows]


def shuffled(rows, seed=1):
    return random.Random(seed).sample(rows, len(rows))
