"""The embedded setting's starting point: a word-level tokenizer with a chat template, and a random small Llama."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_loop.prompts.world import vocabulary

SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|unknown|>", "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class ModelSize:
    """The shape of the embedded Llama. The default has about a million parameters."""

    hidden: int = 128
    layers: int = 4
    heads: int = 2
    intermediate: int = 352
    max_positions: int = 256


def build_tokenizer() -> Any:
    """A ``PreTrainedTokenizerFast`` with one id for each word of the embedded language."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate([*SPECIAL, *vocabulary()])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_base_model(folder: Path, size: ModelSize, seed: int) -> None:
    """Write a randomly initialised Llama and its tokenizer to ``folder`` as a plain HF folder."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    tokenizer = build_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.max_positions,
        tie_word_embeddings=True,
        initializer_range=0.08,  # four times the usual: a small model finds what to copy in half the steps
        pad_token_id=tokenizer.pad_token_id,
        **ids,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, **ids)
    transformers_logging.disable_progress_bar()  # a bar for one small file
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
