"""Answers, jobs and judges of a tiny language, for the tests of annotators."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import torch
from tiny import EOS_ID, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from align_loop.annotators.job import Job
from align_loop.record import short_digest
from align_loop.stage import StageContext

WORDS = {60: "A", 61: "B", 62: "Yes", 63: "No"}  # in place of w60 ... w63


def judge_folder(folder: Path, seed: int) -> Path:
    """A tiny model whose tokenizer knows the verdict words."""
    tiny_llama(folder, seed=seed)
    file = folder / "tokenizer.json"
    text = file.read_text()
    for i, word in WORDS.items():
        text = text.replace(f'"w{i}"', f'"{word}"')
    file.write_text(text)
    return folder


def made(n=3, count=4, seed=0):
    """(prompts, answers): ``n`` answers of 1 to 9 words to each of ``count`` prompts, some of them cut."""
    rng, tokenizer = random.Random(seed), tiny_tokenizer()
    prompts, answers = [], []
    for i in range(count):
        text = " ".join(f"w{rng.randrange(13, 60)}" for _ in range(2 + i % 3))
        messages = [{"role": "user", "content": text}]
        prompts.append({"prompt_id": f"p{i}", "messages": messages, "meta": f'{{"number": {i}}}'})
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for k in range(n):
            ids = [rng.randrange(13, 60) for _ in range(1 + (i * 5 + k * 3) % 9)]
            cut = (i + k) % 3 == 0
            answers.append(
                {
                    "sample_id": short_digest(seed, i, k),
                    "prompt_id": f"p{i}",
                    "k": k,
                    "text": tokenizer.decode(ids),
                    "prompt_token_ids": rendered,
                    "token_ids": ids if cut else [*ids, EOS_ID],
                    "finish_reason": "length" if cut else "stop",
                    "variant": None,
                }
            )
    return prompts, answers


def job(tmp_path, tables, models=None, budget=16384, seed=0, gold=None):
    """A job over (prompts, answers); its context is ``job.context``."""
    context = StageContext("annotate", tmp_path, {"device": "cpu", "score_token_budget": budget}, quiet=True)
    return Job(*tables, models or {}, "float32", seed, context, gold)


def rewards(annotation):
    """Sample id -> reward."""
    return {row["sample_id"]: row["reward"] for row in annotation.scores}


def compared(annotation):
    """(first, second) -> probability, in both directions."""
    found = {}
    for row in annotation.pairwise:
        a, b = row["first_sample_id"], row["second_sample_id"]
        found[a, b], found[b, a] = row["p_first"], 1 - row["p_first"]
    return found


@torch.no_grad()
def all_logprobs(folder, ids):
    """log-softmax behind every position of ``ids``: (length, vocabulary), one text, no padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def knobs(part, **others):
    """(name, the part with that field changed) for every field; the fields and ``others`` must be the same."""
    assert {f.name for f in dataclasses.fields(part)} == set(others), "say what else each field may be"
    return [(name, dataclasses.replace(part, **{name: value})) for name, value in others.items()]


def outcome(annotation):
    """All that an annotator said, for comparing two of them."""
    scores = {row["sample_id"]: {k: v for k, v in row.items() if v is not None} for row in annotation.scores}
    return scores, compared(annotation)
