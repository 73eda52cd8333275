"""Real vLLM in this process: its log-probs, its repeatability, and what it leaves behind."""

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from tiny import EOS_ID, PAD_ID, tiny_llama

from align_loop.engines.base import SamplingParams, SamplingRequest, open_engine, release_engines
from align_loop.engines.scoring import load_scorer, sum_logprobs, token_logprobs
from align_loop.errors import UserError

pytest.importorskip("vllm")
HARDWARE = {"device": "cpu", "threads": 1, "vllm_kv_cache_gib": 0.25}
PARAMS = SamplingParams(0.7, 0.9, 20)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    yield [tiny_llama(tmp_path_factory.mktemp(f"model{seed}"), seed=seed) for seed in (0, 1)]
    release_engines()


def opened(directory, **hardware):
    return open_engine("vllm", directory, dtype="float32", max_model_len=96, hardware=HARDWARE | hardware)


def requests(count=48):
    draw = random.Random(0)
    prompts = [[draw.randrange(7, 64) for _ in range(draw.randint(1, 40))] for _ in range(count // 2)]
    return [SamplingRequest(prompt, 1000 + 2 * i + k) for i, prompt in enumerate(prompts) for k in (0, 1)]


def scored(directory, completions):
    """Sums of log-probs by the forward pass of transformers."""
    sequences = [(r.prompt_token_ids, c.token_ids) for r, c in zip(requests(), completions, strict=True)]
    model = load_scorer(directory, "float32", "cpu")
    return sum_logprobs(token_logprobs(model, sequences, pad_id=PAD_ID, token_budget=500, device="cpu"))


@pytest.mark.parametrize("temperature, top_p", [(0.7, 0.9), (1.0, 0.9), (0.0, 1.0)])
def test_logprobs_are_raw_and_those_of_transformers(directories, temperature, top_p):
    completions = opened(directories[0]).generate(requests(), SamplingParams(temperature, top_p, 20))
    expected = scored(directories[0], completions)
    assert sum_logprobs(c.logprobs for c in completions) == pytest.approx(expected, abs=1e-3)


def test_stops(directories):
    completions = opened(directories[0]).generate(requests(200), SamplingParams(1, 1, 20))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        assert len(c.logprobs) == len(c.token_ids)
        assert c.token_ids.count(EOS_ID) == (c.finish_reason == "stop")
        assert c.token_ids[-1] == EOS_ID if c.finish_reason == "stop" else len(c.token_ids) == 20


def test_the_same_call_gives_the_same_bits(directories):
    engine = opened(directories[0])
    first = engine.generate(requests(), PARAMS)
    engine.generate(requests()[::-1] + requests(), SamplingParams(1, 1, 7))  # leaves prefixes in the cache
    assert engine.generate(requests(), PARAMS) == first
    assert [c.token_ids for c in first[::2]] != [c.token_ids for c in first[1::2]]  # the seeds do differ


def test_prefixes_are_shared_within_a_call_and_not_across_calls(directories, monkeypatch):
    engine, cached = opened(directories[0]), []
    generate = engine._llm.generate

    def noting(*args, **kwargs):
        outputs = generate(*args, **kwargs)
        cached.append([output.num_cached_tokens for output in outputs])
        return outputs

    monkeypatch.setattr(engine._llm, "generate", noting)
    asked = [SamplingRequest([1] + [7] * 40, seed) for seed in range(3)]
    for _ in range(2):
        engine.generate(asked, SamplingParams(1, 1, 1))
    assert cached == [[0, 32, 32]] * 2


def test_it_samples_the_nucleus_of_the_model(directories):
    with torch.no_grad():
        logits = load_scorer(directories[0], "float32", "cpu")(torch.tensor([[1, 7, 8]])).logits[0, -1]
    probabilities, order = (logits / 0.7).softmax(-1).sort(descending=True)
    size = int((probabilities.cumsum(-1) < 0.9).sum()) + 1
    expected = dict(
        zip(order[:size].tolist(), (probabilities[:size] / probabilities[:size].sum()).tolist(), strict=True)
    )
    asked = [SamplingRequest([1, 7, 8], seed) for seed in range(1500)]
    tokens = [c.token_ids[0] for c in opened(directories[0]).generate(asked, SamplingParams(0.7, 0.9, 1))]
    assert set(tokens) <= set(expected)
    chi_square = sum((tokens.count(t) - 1500 * p) ** 2 / (1500 * p) for t, p in expected.items())
    assert chi_square < size + 4 * (2 * size) ** 0.5  # mean + 4 standard deviations


def test_another_engine_after_the_first_has_the_other_weights(directories):
    for directory in (directories[0], directories[1]):
        completions = opened(directory).generate(requests(), PARAMS)
        assert sum_logprobs(c.logprobs for c in completions) == pytest.approx(scored(directory, completions), abs=1e-3)
        release_engines()
        assert not torch.distributed.is_initialized()


def surroundings():
    return (
        dict(os.environ),
        os.sched_getaffinity(0),
        torch.get_num_threads(),
        torch.set_num_threads,
        torch.get_rng_state().tolist(),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
    )


def test_the_process_is_left_as_it_was(directories, capfd):
    release_engines()
    torch.set_num_threads(3)
    torch.set_float32_matmul_precision("medium")
    before = surroundings()
    engine = opened(directories[1])
    assert surroundings() == before
    engine.generate(requests(), PARAMS)
    assert surroundings() == before
    release_engines()
    assert surroundings() == before
    with open("/proc/self/numa_maps", encoding="utf-8") as handle:
        assert " bind" not in handle.read()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    assert capfd.readouterr().out == ""  # stdout belongs to the command; vLLM may warn on stderr at its first start


def test_vllm_runs_with_the_threads_it_was_given(directories, monkeypatch):
    engine, seen = opened(directories[0], threads=2), []
    generate = engine._llm.generate
    monkeypatch.setattr(
        engine._llm, "generate", lambda *a, **k: (seen.append(torch.get_num_threads()), generate(*a, **k))[1]
    )
    engine.generate(requests(2), SamplingParams(1, 1, 1))
    assert seen == [2]


def test_a_model_that_vllm_refuses_is_one_line(directories):
    with pytest.raises(UserError, match="engine=hf") as caught:
        open_engine("vllm", directories[0], dtype="float32", max_model_len=4096, hardware=HARDWARE)
    assert "\n" not in str(caught.value)


SCRIPT = """
import json, sys
from align_loop.engines.base import SamplingParams, SamplingRequest, open_engine
directory, hardware, asked, params = json.loads(sys.argv[1])
engine = open_engine("vllm", directory, dtype="float32", max_model_len=96, hardware=hardware)
completions = engine.generate([SamplingRequest(**r) for r in asked], SamplingParams(**params))
print(json.dumps([[c.token_ids, c.logprobs] for c in completions]))
"""


@pytest.mark.full
def test_a_fresh_process_gives_the_same_bits(directories):
    first = opened(directories[0]).generate(requests(), PARAMS)
    argument = json.dumps([str(directories[0]), HARDWARE, [asdict(r) for r in requests()], asdict(PARAMS)])
    done = subprocess.run([sys.executable, "-c", SCRIPT, argument], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[c.token_ids, c.logprobs] for c in first]
    assert "Traceback" not in done.stderr
