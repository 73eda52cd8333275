"""What a generation engine is, which one is taken, and the one engine a process keeps open.

An engine turns prompts given as token ids into sampled answers with their raw log-probabilities.
Starting one costs seconds, so the last one stays open and the next stage that asks for the same
weights gets it again; ``release_engines`` gives its memory back before something is trained.
"""

from __future__ import annotations

import atexit
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from align_loop.errors import UserError


@dataclass(frozen=True)
class SamplingRequest:
    """One answer to draw: the prompt's token ids, and a seed in [0, 2**31) of its own."""

    prompt_token_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """One drawn answer.

    ``finish_reason`` "stop": the last of ``token_ids`` is a stop token, included in ids and log-probs;
    "length": ``max_new_tokens`` ids and no stop token. ``logprobs``: natural logs of the model's own
    probabilities (temperature 1, no top-p) of ``token_ids``, whatever the sampling temperature was.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float]


@dataclass(frozen=True)
class SamplingParams:
    """How answers are drawn; ``temperature`` 0 takes the most probable token each time."""

    temperature: float
    top_p: float
    max_new_tokens: int


class Engine(Protocol):
    """A model that is ready to answer."""

    name: str  # "vllm" or "hf"
    version: str  # of the library that generates

    def generate(self, requests: Sequence[SamplingRequest], params: SamplingParams) -> list[Completion]:
        """One completion a request, in the order of ``requests``."""
        ...

    def close(self) -> None:
        """Give memory and process state back; the engine can't be used afterwards."""
        ...


class EngineChoice(NamedTuple):
    """The engine taken ("vllm" or "hf") and, where "auto" fell back, why ("" otherwise)."""

    name: str
    reason: str


def choose_engine(kind: str, device: str = "cpu") -> EngineChoice:
    """Decide between vLLM and transformers' generate: "auto" takes vLLM wherever it can run on ``device``.

    Raises ``UserError`` for an unknown ``kind`` and for "vllm" where vLLM can't be used.
    """
    if kind not in ("auto", "vllm", "hf"):
        raise UserError(f"engine: {kind!r} is unknown; take one of auto, vllm, hf")
    if kind == "hf":
        return EngineChoice("hf", "")
    fault = _vllm_fault(device)
    if not fault:
        return EngineChoice("vllm", "")
    if kind == "vllm":
        raise UserError(f"engine=vllm can't be used: {fault}; run `make install`, or take engine=hf")
    return EngineChoice("hf", fault)


def _vllm_fault(device: str) -> str:
    """Why vLLM can't generate on ``device`` here, in one line; "" where it can."""
    try:
        built_for = importlib.import_module("align_loop.engines.vllm").platform()
    except Exception as error:  # noqa: BLE001  a half-installed vLLM fails in many ways: symbols, versions, ...
        return f"vllm does not import ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return "" if built_for == device else f"the installed vllm is for {built_for}, the device is {device}"


_open: dict[tuple[Any, ...], Engine] = {}  # at most one entry


def open_engine(
    kind: str, model_dir: str | Path, *, dtype: str, max_model_len: int, hardware: dict[str, Any]
) -> Engine:
    """An engine for the weights in ``model_dir``: the open one if it has these very weights, else a new one.

    ``max_model_len``: prompt and answer together, in tokens. Read from ``hardware``: ``device``
    ("cpu" or "cuda"), ``threads`` (CPU threads, null for the process's own), ``vllm_memory`` (share of
    the GPU's memory), ``vllm_kv_cache_gib`` (most that the KV cache takes on CPU), ``tensor_parallel``.
    Opening another engine closes the one before. Raises ``UserError`` when the engine can't be used.
    """
    device = hardware.get("device") or "cpu"
    name = choose_engine(kind, device).name
    settings = {
        "dtype": dtype,
        "max_model_len": max_model_len,
        "device": device,
        "threads": hardware.get("threads"),
        "vllm_memory": hardware.get("vllm_memory") or 0.9,
        "vllm_kv_cache_gib": hardware.get("vllm_kv_cache_gib") or 1.0,
        "tensor_parallel": hardware.get("tensor_parallel") or 1,
    }
    key = (name, *_identity(model_dir), *settings.values())
    if key not in _open:
        release_engines()
        module = importlib.import_module(f"align_loop.engines.{name}")
        _open[key] = module.start(str(model_dir), **settings)
    return _open[key]


@atexit.register
def release_engines() -> None:
    """Close the open engine, if any, and give its memory back."""
    while _open:
        _open.popitem()[1].close()


def _identity(model_dir: str | Path) -> tuple[Any, ...]:
    """What tells one set of weights from another: real path, and size and time of each weights file."""
    folder = Path(model_dir)
    if not folder.is_dir():  # a hub name
        return (str(model_dir),)
    files = sorted(folder.glob("*.safetensors"))
    return (str(folder.resolve()), *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files))


def stop_token_ids(model_dir: str | Path) -> list[int]:
    """The ids that end an answer: the tokenizer's end-of-sequence and those of ``generation_config.json``."""
    from transformers import AutoTokenizer, GenerationConfig  # slow import, and not for readers of the types

    local = Path(model_dir).is_dir()
    ids = {AutoTokenizer.from_pretrained(model_dir, local_files_only=local).eos_token_id}
    try:
        configured = GenerationConfig.from_pretrained(model_dir, local_files_only=local).eos_token_id
    except OSError:  # the file is optional
        configured = None
    ids.update(configured if isinstance(configured, list) else [configured])
    return sorted(i for i in ids if i is not None)


def check_lengths(requests: Sequence[SamplingRequest], params: SamplingParams, max_model_len: int) -> None:
    """Raise ``UserError`` for a prompt that leaves no room for ``max_new_tokens`` (engines would cut silently)."""
    for index, request in enumerate(requests):
        needed = len(request.prompt_token_ids) + params.max_new_tokens
        if not request.prompt_token_ids or needed > max_model_len:
            raise UserError(
                f"prompt {index} has {len(request.prompt_token_ids)} tokens; with max_new_tokens="
                f"{params.max_new_tokens} it must fit in {max_model_len}: shorten the prompts or raise the limit"
            )
