"""Generation with vLLM, in this process, on CPU and GPU by one code path.

In-process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``) because a start then takes seconds instead of half a
minute and callers need no ``__main__`` guard. vLLM is a rude guest: it replaces ``torch.set_num_threads``,
seeds the global random generators, edits ``os.environ`` (``LD_PRELOAD``, ``LOCAL_WORLD_SIZE``), binds memory
to one NUMA node and initialises ``torch.distributed``. ``_guest`` and ``close`` see that none of it stays.
"""

from __future__ import annotations

import ctypes
import gc
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import AutoConfig

from align_loop.engines import surroundings
from align_loop.engines.base import Completion, SamplingParams, SamplingRequest, check_lengths, stop_token_ids
from align_loop.errors import UserError

# On CPU this many sequences at a time and KV blocks of this many tokens, fixed so that the batch schedule, and
# with it the last bits of the log-probs, does not depend on the machine. The kernels want blocks in multiples
# of 32; in vLLM's default of 128 no short prompt fills a block, so none would be shared.
_CPU_SEQUENCES = 256
_CPU_BLOCK = 32
_CPU_BATCHED_TOKENS = 8192

_env = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),  # its warnings are about its own affairs
}


@contextmanager
def _guest(threads: int | None) -> Iterator[None]:
    """Everything vLLM does happens in here, and the process is afterwards as it was."""
    with (
        surroundings.environment(_env),
        surroundings.threads(threads),
        surroundings.global_state(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # vLLM's own use of torch
        yield


def _quiet() -> AbstractContextManager[None]:
    """No start-up chatter, unless somebody asked for a log level of vLLM's."""
    return nullcontext() if "VLLM_LOGGING_LEVEL" in os.environ else surroundings.quiet_stderr()


with _quiet(), _guest(None), surroundings.no_collection():
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    vllm.LLM  # noqa: B018  loads the rest now, where it is quiet


def platform() -> str:
    """The device that the installed vLLM generates on: "cpu" or "cuda"; "" where it finds none."""
    return current_platform.device_type or ""


class VllmEngine:
    """vLLM behind the ``Engine`` protocol; made by ``start``."""

    name = "vllm"
    version = vllm.__version__

    def __init__(self, llm: vllm.LLM, stop_ids: list[int], max_model_len: int, threads: int | None):
        self._llm: vllm.LLM | None = llm
        self._stop_ids, self._max_model_len, self._threads = stop_ids, max_model_len, threads

    def generate(self, requests: Sequence[SamplingRequest], params: SamplingParams) -> list[Completion]:
        """One completion a request, in order; equal for equal ``requests``, whatever was generated before."""
        check_lengths(requests, params, self._max_model_len)
        if not requests:
            return []
        with _guest(self._threads), _eager():
            self._llm.reset_prefix_cache()  # cached prefixes change the schedule, so none crosses calls
            outputs = self._llm.generate(
                [{"prompt_token_ids": request.prompt_token_ids} for request in requests],
                [self._vllm_params(request, params) for request in requests],
                use_tqdm=False,
            )
        return [_completion(output.outputs[0]) for output in outputs]

    def _vllm_params(self, request: SamplingRequest, params: SamplingParams) -> vllm.SamplingParams:
        return vllm.SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p if params.temperature > 0 else 1.0,
            max_tokens=params.max_new_tokens,
            seed=request.seed,
            stop_token_ids=self._stop_ids,
            logprobs=0,  # of the sampled token, and of no other
            flat_logprobs=True,
            detokenize=False,
        )

    def close(self) -> None:
        """Shut the engine down and undo ``torch.distributed``; a later engine or trainer starts afresh."""
        if self._llm is None:
            return
        with _guest(self._threads):
            self._llm.llm_engine.engine_core.shutdown()  # undoes gc.freeze() too
            self._llm = None
            if not current_platform.is_cpu():  # once more, now that nothing holds GPU tensors any longer
                cleanup_dist_env_and_memory()


def start(
    model_dir: str,
    *,
    dtype: str,
    max_model_len: int,
    device: str,
    threads: int | None,
    vllm_memory: float,
    vllm_kv_cache_gib: float,
    tensor_parallel: int,
) -> VllmEngine:
    """Start vLLM on the weights in ``model_dir``; see ``open_engine`` for the settings.

    Raises ``UserError`` where vLLM refuses the model or the settings.
    """
    if torch.distributed.is_initialized():
        raise RuntimeError("vLLM would take over the open torch.distributed process group: destroy that first")
    place: dict[str, Any] = {"gpu_memory_utilization": vllm_memory}
    if device == "cpu":
        cache = min(int(vllm_kv_cache_gib * 2**30), _kv_bytes(model_dir, dtype, max_model_len))
        place = {
            "kv_cache_memory_bytes": cache,
            "max_num_seqs": _CPU_SEQUENCES,
            "block_size": _CPU_BLOCK,
            # A prompt split over two steps rewinds its request's generator, which a CPU generator can't:
            # "CPU Generator does not use offset" (vLLM 0.32). So prompts are never split there.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_CPU_BATCHED_TOKENS, max_model_len),
        }
    try:
        with _quiet(), _guest(threads):
            gc.freeze()  # vLLM collects garbage five times on its way: let it pass over all there is
            llm = vllm.LLM(
                model=model_dir,
                dtype=dtype,
                max_model_len=max_model_len,
                tensor_parallel_size=tensor_parallel,
                enforce_eager=device == "cpu",  # compiling takes longer there than it saves
                skip_tokenizer_init=True,  # ids in, ids out
                generation_config="vllm",  # not the checkpoint's own temperature, top_k, ...
                logprobs_mode="raw_logprobs",
                trust_remote_code=False,
                use_tqdm_on_load=False,
                **place,
            )
            _free_memory_binding()
    except ValueError as error:  # pydantic's ValidationError among them
        gc.unfreeze()
        raise UserError(f"vLLM does not take {model_dir}: {' '.join(str(error).split())}; engine=hf may") from error
    return VllmEngine(llm, stop_token_ids(model_dir), max_model_len, threads)


@contextmanager
def _eager() -> Iterator[None]:
    """On CPU keep vLLM's sampler from compiling itself: it needs a C++ compiler and 2 to 20 s at the first token."""
    if current_platform.is_cpu():
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _kv_bytes(model_dir: str, dtype: str, max_model_len: int) -> int:
    """Bytes of KV cache that the most sequences at once can fill; more would only be zeroed and never read."""
    config = AutoConfig.from_pretrained(model_dir).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = getattr(torch, dtype).itemsize
    blocks = _CPU_SEQUENCES * -(-max_model_len // _CPU_BLOCK) + 1  # vLLM keeps one block for itself
    return blocks * _CPU_BLOCK * 2 * config.num_hidden_layers * heads * head_dim * size


def _free_memory_binding() -> None:
    """Undo vLLM's strict binding of this thread's memory to one NUMA node, or training could use no other."""
    if current_platform.is_cpu():
        numa = ctypes.CDLL("libnuma.so.1")  # vLLM's own kernels are linked to it
        numa.numa_set_strict(0)
        numa.numa_set_localalloc()


def _completion(output: Any) -> Completion:
    """vLLM's ``CompletionOutput`` as ours."""
    ids = list(output.token_ids)
    chosen = [output.logprobs[i][token].logprob for i, token in enumerate(ids)]
    return Completion(ids, output.finish_reason, chosen)
