"""Tiny random models and tokenizers, made in code, for tests of everything that needs a real checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"]
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<' + m['role'] + '> ' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tiny_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of ``vocab`` ids: seven special tokens, then the words w7, w8, ..."""
    words = SPECIAL + [f"w{i}" for i in range(len(SPECIAL), vocab)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llama(
    directory: Path, seed: int = 0, vocab: int = 64, dtype: torch.dtype = torch.float32, scale: float = 0.2
) -> Path:
    """Save a random Llama (hidden 64, 2 layers, head_dim 32, 256 positions) and its tokenizer; returns ``directory``.

    ``scale`` is the standard deviation of the weights: 0.2 gives next-token distributions that are
    peaked enough to tell models apart (0.02 would be close to uniform).
    """
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=scale,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(directory)
    tiny_tokenizer(vocab).save_pretrained(directory)
    return Path(directory)
