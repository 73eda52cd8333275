"""The sampler on top of transformers' generate: distribution, seeds, batches, stops."""

import json
import random

import pytest
import torch
from tiny import EOS_ID, PAD_ID, tiny_llama
from transformers import GenerationConfig

from align_loop.engines import hf
from align_loop.engines.base import SamplingParams, SamplingRequest
from align_loop.engines.scoring import load_scorer, sum_logprobs, token_logprobs
from align_loop.errors import UserError

SETTINGS = {"dtype": "float32", "max_model_len": 128, "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(directory):
    return hf.start(str(directory), **SETTINGS)


def requests(count=24):
    draw = random.Random(0)
    prompts = [[draw.randrange(7, 64) for _ in range(draw.randint(1, 9))] for _ in range(count)]
    return [SamplingRequest(prompt, 1000 + i) for i, prompt in enumerate(prompts)]


def same(completions, others):
    assert [c.token_ids for c in completions] == [c.token_ids for c in others]
    for one, other in zip(completions, others, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("params", [SamplingParams(0.7, 0.9, 12), SamplingParams(1.0, 1.0, 12)])
def test_answers_do_not_depend_on_batch_or_order(engine, monkeypatch, params):
    asked = requests()
    expected = engine.generate(asked, params)
    order = random.Random(1).sample(range(len(asked)), len(asked))
    same(engine.generate([asked[i] for i in order], params), [expected[i] for i in order])
    for rows in (1, 8):
        monkeypatch.setattr(engine, "batch_rows", rows)
        same(engine.generate(asked, params), expected)


def test_seeds_make_answers_differ(engine):
    asked = [SamplingRequest([1, 7, 8], seed) for seed in range(8)]
    answers = {tuple(c.token_ids) for c in engine.generate(asked, SamplingParams(1, 1, 12))}
    assert len(answers) == 8


@pytest.mark.parametrize("temperature, top_p", [(0.7, 0.9), (1.5, 0.5), (1.0, 1.0)])
def test_frequencies_are_those_of_the_model(engine, directory, temperature, top_p):
    draws = 3000
    prompt = [1, 7, 8]
    with torch.no_grad():
        logits = load_scorer(directory, "float32", "cpu")(torch.tensor([prompt])).logits[0, -1].double()
    by_size = sorted(enumerate((logits / temperature).softmax(-1).tolist()), key=lambda pair: -pair[1])
    nucleus, mass = {}, 0.0
    for token, probability in by_size:  # the fewest most probable tokens with at least top_p of the mass
        if mass < top_p:
            nucleus[token] = probability
            mass += probability
    asked = [SamplingRequest(prompt, seed) for seed in range(draws)]
    tokens = [c.token_ids[0] for c in engine.generate(asked, SamplingParams(temperature, top_p, 1))]
    assert set(tokens) <= set(nucleus)
    expected = {token: draws * p / mass for token, p in nucleus.items() if draws * p / mass >= 5}
    chi_square = sum((tokens.count(token) - e) ** 2 / e for token, e in expected.items())
    assert chi_square < len(expected) + 4 * (2 * len(expected)) ** 0.5  # mean + 4 standard deviations


def test_noise_is_new_at_each_step():
    choice = hf.SeededChoice(range(2000), SamplingParams(1, 1, 2), torch.device("cpu"))
    for _ in range(2):
        choice(torch.zeros(2000, 1, dtype=torch.long), torch.zeros(2000, 10))
    repeated = (choice.tokens[0] == choice.tokens[1]).float().mean().item()
    assert repeated == pytest.approx(0.1, abs=0.03)


def test_temperature_zero_takes_the_most_probable_token(engine, directory):
    completion = engine.generate([SamplingRequest([1, 7, 8], 3)], SamplingParams(0, 0.9, 6))[0]
    model, ids = load_scorer(directory, "float32", "cpu"), [1, 7, 8]
    for token in completion.token_ids:
        with torch.no_grad():
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(token)


@pytest.mark.parametrize("params", [SamplingParams(0.7, 0.9, 12), SamplingParams(0, 1, 12)])
def test_logprobs_are_raw(engine, directory, params):
    completions = engine.generate(requests(), params)
    sequences = [(r.prompt_token_ids, c.token_ids) for r, c in zip(requests(), completions, strict=True)]
    scorer = load_scorer(directory, "float32", "cpu")
    scored = token_logprobs(scorer, sequences, pad_id=PAD_ID, token_budget=300, device="cpu")
    assert sum_logprobs(c.logprobs for c in completions) == pytest.approx(sum_logprobs(scored), abs=1e-3)


def test_stops(engine):
    completions = engine.generate(requests(200), SamplingParams(1, 1, 20))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        assert len(c.logprobs) == len(c.token_ids)
        assert c.token_ids.count(EOS_ID) == (c.finish_reason == "stop")
        assert c.token_ids[-1] == EOS_ID if c.finish_reason == "stop" else len(c.token_ids) == 20


def test_the_checkpoints_own_sampling_settings_are_not_used(engine, directory, tmp_path):
    tiny_llama(tmp_path)
    GenerationConfig(
        do_sample=True, temperature=0.1, top_k=2, repetition_penalty=5.0, min_new_tokens=9, eos_token_id=EOS_ID
    ).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["repetition_penalty"] == 5.0
    params = SamplingParams(1, 1, 12)
    same(hf.start(str(tmp_path), **SETTINGS).generate(requests(), params), engine.generate(requests(), params))


def test_more_positions_than_the_model_has_are_refused(directory):
    with pytest.raises(UserError, match="max_model_len=257.*256 positions"):
        hf.start(str(directory), **SETTINGS | {"max_model_len": 257})


def test_no_requests(engine):
    assert engine.generate([], SamplingParams(1, 1, 4)) == []
