"""Which engine is taken, which open engine is used again, and how the process is left."""

import os
import random
import sys

import numpy as np
import pytest
import torch
from tiny import EOS_ID, tiny_llama

from align_loop.engines import base, surroundings
from align_loop.engines.base import SamplingParams, SamplingRequest, choose_engine, open_engine, release_engines
from align_loop.errors import UserError

HARDWARE = {"device": "cpu", "threads": 1}


@pytest.fixture
def no_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # what Python itself does for a module that can't be imported
    monkeypatch.delitem(sys.modules, "align_loop.engines.vllm", raising=False)


@pytest.fixture(autouse=True)
def released():
    yield
    release_engines()


def test_auto_falls_back_and_says_why(no_vllm):
    name, reason = choose_engine("auto")
    assert name == "hf" and "vllm" in reason and "\n" not in reason


def test_vllm_that_does_not_import_names_the_remedy(no_vllm):
    with pytest.raises(UserError, match="ModuleNotFoundError.*make install"):
        choose_engine("vllm")


def test_unknown_engine():
    with pytest.raises(UserError, match="'vlm'.*auto, vllm, hf"):
        choose_engine("vlm")


def test_same_weights_same_engine(tmp_path):
    tiny_llama(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    first = open_engine("hf", tmp_path / "a", dtype="float32", max_model_len=64, hardware=HARDWARE)
    assert open_engine("hf", tmp_path / "link", dtype="float32", max_model_len=64, hardware=HARDWARE) is first
    assert open_engine("hf", tmp_path / "a", dtype="bfloat16", max_model_len=64, hardware=HARDWARE) is not first
    assert len(base._open) == 1  # the one before was closed


def test_new_weights_at_the_old_path_are_noticed(tmp_path):
    request, params = [SamplingRequest([1, 7, 8], 5)], SamplingParams(0, 1, 8)
    answers = []
    for seed in (0, 1):
        tiny_llama(tmp_path, seed=seed)
        engine = open_engine("hf", tmp_path, dtype="float32", max_model_len=64, hardware=HARDWARE)
        answers.append(engine.generate(request, params))
    assert answers[0] != answers[1]


def test_stop_ids_are_the_tokenizers_and_the_generation_configs(tmp_path):
    tiny_llama(tmp_path)
    assert base.stop_token_ids(tmp_path) == [EOS_ID]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    assert base.stop_token_ids(tmp_path) == [EOS_ID, 9, 11]
    (tmp_path / "generation_config.json").unlink()
    assert base.stop_token_ids(tmp_path) == [EOS_ID]


@pytest.mark.parametrize("prompt, fits", [(24, True), (25, False), (0, False)])
def test_prompts_that_leave_no_room_are_refused(prompt, fits):
    requests = [SamplingRequest([1], 0), SamplingRequest([7] * prompt, 0)]
    if fits:
        base.check_lengths(requests, SamplingParams(1, 1, 8), 32)
    else:
        with pytest.raises(UserError, match=f"prompt 1 has {prompt} tokens"):
            base.check_lengths(requests, SamplingParams(1, 1, 8), 32)


def test_surroundings_leave_nothing_behind(monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("REMOVED", "1")
    set_num_threads, count, environment = torch.set_num_threads, torch.get_num_threads(), dict(os.environ)
    values = {"OURS": "2", "KEPT": "3"}
    with surroundings.environment(values), surroundings.threads(count + 1):
        assert torch.get_num_threads() == count + 1 and os.environ["KEPT"] == "3"
        torch.set_num_threads = lambda n: None  # as vLLM does
        os.environ["GUEST"] = "4"
        del os.environ["REMOVED"]
    assert torch.set_num_threads is set_num_threads and torch.get_num_threads() == count
    assert dict(os.environ) == environment
    assert values == {"OURS": "2", "KEPT": "3", "GUEST": "4"}


def test_global_random_state_survives():
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    with surroundings.global_state():
        expected = draws()
    with surroundings.global_state():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert draws() == expected


def test_stderr_is_shown_only_when_the_block_fails(capfd):
    with surroundings.quiet_stderr():
        os.write(2, b"chatter")
    with pytest.raises(ValueError), surroundings.quiet_stderr():
        os.write(2, b"the reason")
        raise ValueError
    os.write(2, b" after")
    assert capfd.readouterr().err == "the reason after"
