"""Checkpoints in and out of training: plain Hugging Face folders that vLLM and ``transformers`` open as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()  # "Loading weights" and the like; stages have their own progress line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(hardware: dict[str, Any]) -> torch.dtype:
    """The dtype in which weights are loaded, trained and saved: ``hardware['dtype']``, float32 where unset."""
    name = hardware.get("dtype") or "float32"
    if name not in DTYPES:
        raise ValueError(f"hardware.dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def load_model(directory: Path, hardware: dict[str, Any]) -> PreTrainedModel:
    """The causal language model saved in ``directory``, in the hardware's dtype, on the CPU, ready to train.

    The trainer moves it to its device.
    """
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype_of(hardware), local_files_only=True)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer (with its chat template) saved beside the model."""
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id used for padding: the tokenizer's own, or its end-of-sequence id where it has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def position_limit(model: PreTrainedModel) -> int:
    """How many tokens the model takes; a very large number where it doesn't say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def save_model_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write weights, config, generation config, tokenizer and chat template to ``directory``.

    The generation config keeps every end-of-sequence id that the model came with; pad and end-of-sequence ids are
    filled in where there were none.
    """
    generation_config = model.generation_config
    if generation_config.pad_token_id is None:
        generation_config.pad_token_id = pad_id(tokenizer)
    if generation_config.eos_token_id is None:
        generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = pad_id(tokenizer)
    if model.config.eos_token_id is None:
        model.config.eos_token_id = tokenizer.eos_token_id
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
