"""Log-probs of given answers against a plain one-by-one computation."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PAD_ID, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM

from align_loop.engines import scoring
from align_loop.engines.scoring import load_scorer, sum_logprobs, token_logprobs
from align_loop.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_scorer(tiny_llama(tmp_path_factory.mktemp("model")), "float32", "cpu")


def examples(count=17, seed=0):
    """(prompt, answer) pairs of 1 to 12 and 0 to 20 tokens."""
    draw = random.Random(seed)
    pairs = [([draw.randrange(7, 64) for _ in range(draw.randint(1, 12))], []) for _ in range(count)]
    return [(prompt, [draw.randrange(7, 64) for _ in range(draw.randint(0, 20))]) for prompt, _ in pairs]


@torch.no_grad()
def one_by_one(model, sequences):
    """The reference: no padding, no batch, all logits."""
    results = []
    for prompt, answer in sequences:
        logprobs = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        results.append([logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer)])
    return results


def assert_close(got, expected, tolerance=1e-4):
    assert [len(values) for values in got] == [len(values) for values in expected]
    for values, reference in zip(got, expected, strict=True):
        assert values == pytest.approx(reference, abs=tolerance)


@pytest.mark.parametrize("token_budget", [1, 50, 100_000])
def test_equals_one_by_one(model, token_budget):
    sequences = examples()
    got = token_logprobs(model, sequences, pad_id=PAD_ID, token_budget=token_budget, device="cpu")
    assert_close(got, one_by_one(model, sequences))


def test_order_and_padding_do_not_matter(model):
    sequences = examples()
    order = list(range(len(sequences)))
    random.Random(1).shuffle(order)
    plain = token_logprobs(model, sequences, pad_id=PAD_ID, token_budget=200, device="cpu")
    shuffled = token_logprobs(model, [sequences[i] for i in order], pad_id=33, token_budget=90, device="cpu")
    assert_close(shuffled, [plain[i] for i in order])


def test_a_model_that_caps_its_logits_is_scored_with_the_cap():
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    model = Gemma2ForCausalLM(config).eval()
    got = token_logprobs(model, examples(5), pad_id=PAD_ID, token_budget=99, device="cpu")
    assert_close(got, one_by_one(model, examples(5)))


def test_log_softmax_is_fp32_and_piecewise(monkeypatch):
    logits, targets = torch.randn(50, 64).bfloat16() * 10, torch.randint(64, (50,))
    monkeypatch.setattr(scoring, "_CHUNK_ELEMENTS", 7 * 64)
    got = scoring._gather_log_softmax(logits, targets)
    expected = logits.double().log_softmax(-1)[torch.arange(50), targets]
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), expected, atol=1e-5)


def test_only_answer_positions_reach_the_output_layer(model):
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *args: seen.append(args[2].shape[-2]))
    sequences = examples()
    token_logprobs(model, sequences, pad_id=PAD_ID, token_budget=100, device="cpu")
    hook.remove()
    assert sum(seen) == sum(len(answer) for _, answer in sequences)


def test_progress_counts_every_sequence_and_the_model_is_left_as_it_was(model):
    done = []
    model.train()
    sequences = examples()
    token_logprobs(model, sequences, pad_id=PAD_ID, token_budget=60, device="cpu", on_done=done.append)
    assert sum(done) == len(sequences) and len(done) > 2
    assert model.training and not model.get_output_embeddings()._forward_pre_hooks
    model.eval()


def test_empty_answers_and_empty_prompts(model):
    assert token_logprobs(model, [([7], [])], pad_id=PAD_ID, token_budget=9, device="cpu") == [[]]
    assert token_logprobs(model, [], pad_id=PAD_ID, token_budget=9, device="cpu") == []
    with pytest.raises(ValueError, match="empty prompt"):
        token_logprobs(model, [([], [7])], pad_id=PAD_ID, token_budget=9, device="cpu")


def test_sum_logprobs():
    assert sum_logprobs([[-1.0, -0.5], []]) == [-1.5, 0.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=30), st.integers(1, 60))
def test_batches_keep_the_budget_and_start_with_the_longest(lengths, budget):
    sequences = [([7] * prompt, [8] * answer) for prompt, answer in lengths]
    batches = list(scoring._batches(sequences, budget))
    sizes = [[sum(lengths[i]) for i in batch] for batch in batches]
    assert sorted(i for batch in batches for i in batch) == [i for i, (_, answer) in enumerate(lengths) if answer]
    assert all(len(batch) == 1 or len(batch) * max(batch) <= budget for batch in sizes)
    assert [n for batch in sizes for n in batch] == sorted((n for batch in sizes for n in batch), reverse=True)


def test_pickled_weights_are_refused(tmp_path):
    tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no model to load"):
        load_scorer(tmp_path, "float32", "cpu")
