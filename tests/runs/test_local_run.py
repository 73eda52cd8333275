"""``setting=local``: a user's own model folder and files, in each of the three preference formats."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from tiny import tiny_llama

from align_loop.templates import TEMPLATES
from runs.conftest import align, metrics

SIZES = [
    "setting=local",
    "setting.eval_prompts=8",
    "setting.max_length=200",
    "sampler.max_new_tokens=8",
    "sampler.engine=hf",
    "loop.iterations=1",
    "hardware.threads=1",
    "tracking.mode=off",
    "setting.training.seed={learning_rate: 1e-3, epochs: 1, batch_size: 8}",
    "setting.training.iteration={learning_rate: 1e-3, epochs: 1, batch_size: 8}",
]


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(7, 60)}" for _ in range(count))


def preferences(layout: str, count: int = 60) -> list[dict]:
    """Rows in one of the three formats; every third conversation has an earlier turn."""
    rng = random.Random(0)
    rows = []
    for i in range(count):
        prompt, good, bad = words(rng, 5), words(rng, 6), words(rng, 4)
        turns = [{"role": "user", "content": words(rng, 3)}, {"role": "assistant", "content": words(rng, 3)}]
        history = (turns if i % 3 == 0 else []) + [{"role": "user", "content": prompt}]
        sides = {"chosen": good, "rejected": bad}
        if layout == "hh":
            text = "".join(f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in history)
            rows.append({side: f"{text}\n\nAssistant: {answer}" for side, answer in sides.items()})
        elif layout == "messages":
            rows.append({s: [*history, {"role": "assistant", "content": a}] for s, a in sides.items()})
        else:
            rows.append({"prompt": prompt, **sides})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def qwen2(directory: Path) -> Path:
    """A random Qwen2 with a byte-level BPE tokenizer (transformers takes that for every folder of this type)."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(f"w{i}" for i in range(60))], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], eos_token=special[2])
    tokenizer.chat_template = TEMPLATES["chatml"]
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("layout", "model", "file"),
    [("hh", "llama", "p.jsonl"), ("messages", "qwen2", "p.jsonl.gz"), ("prompt", "llama", "p.parquet")],
)
def test_each_format_runs_end_to_end(tmp_path, layout, model, file):
    folder = tiny_llama(tmp_path / "model") if model == "llama" else qwen2(tmp_path / "model")
    rows = preferences(layout)
    if file.endswith("parquet"):
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(tmp_path / file)
    else:
        write_jsonl(tmp_path / file, rows)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": words(random.Random(i), 6)} for i in range(60)])
    run_dir = tmp_path / "run"
    data = [f"setting.model={folder}", f"setting.preferences={tmp_path / file}", f"setting.prompts={prompts}"]
    align("+experiment=selfie_iter4", *SIZES, *data, f"run_dir={run_dir}")
    rows = metrics(run_dir)
    assert [row["policy"] for row in rows] == ["initial", "seed", "iteration-1"]
    assert all(row["gold_reward"] is None for row in rows) and rows[-1]["judge_accuracy"] is not None
    # A random model seldom ends its answers, so most pairs are dropped as cut on both sides, and counted.
    assert rows[-1]["pairs"] > 0 and rows[-1]["pairs"] + sum(rows[-1]["filter_dropped"].values()) > 40
    assert (run_dir / "final" / "tokenizer.json").is_file()


def test_demonstrations_and_no_prompts_file(tmp_path):
    """Without prompts a tenth of the labels is used and the other prompts are sampled from; demos bring SFT."""
    folder = tiny_llama(tmp_path / "model")
    file = write_jsonl(tmp_path / "p.jsonl", preferences("prompt", 120))
    demos = write_jsonl(
        tmp_path / "d.jsonl", [{"prompt": words(random.Random(i), 4), "answer": "w9 w8"} for i in range(16)]
    )
    run_dir = tmp_path / "run"
    data = [f"setting.model={folder}", f"setting.preferences={file}", f"setting.demos={demos}"]
    align("+experiment=selfie_iter4", *SIZES, *data, "setting.training.sft.batch_size=8", f"run_dir={run_dir}")
    assert [row["policy"] for row in metrics(run_dir)] == ["sft", "seed", "iteration-1"]


def test_a_broken_line_is_named_before_any_training(tmp_path):
    rows = [json.dumps(row) for row in preferences("prompt")]
    rows[36] = rows[36][:-8]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(rows) + "\n")
    folder = tiny_llama(tmp_path / "model")
    run_dir = tmp_path / "run"
    data = [f"setting.model={folder}", f"setting.preferences={file}"]
    done = align("+experiment=selfie_iter4", *SIZES, *data, f"run_dir={run_dir}", check=False)
    assert done.returncode == 2 and "p.jsonl: line 37" in done.stderr and "Traceback" not in done.stderr
    assert not list((run_dir / "store").glob("*/manifest.json"))
