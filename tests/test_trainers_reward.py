"""Training of reward models: parity with the stock trainer, exact global batches, heads, LoRA, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from reward_fixtures import CPU, ENOUGH, TRAINING, accuracy, change, margins, toy_pairs, train, weights
from tiny import EOS_ID, PAD_ID, tiny_llama, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import RewardConfig as StockConfig
from trl import RewardTrainer

from align_loop.errors import UserError
from align_loop.trainers import reward as training_of
from align_loop.trainers.common import trainer_arguments
from align_loop.trainers.config import LoraConfig, TrainingConfig
from align_loop.trainers.models import load_tokenizer
from align_loop.trainers.reward import build_trainer, load_start, pad_token, prove_merge
from align_loop.trainers.reward_config import RewardModel

GPM = RewardModel(head="gpm", dim=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), seed=0)


def start_weights(base: Path, out: Path, dim: int = 1) -> torch.Tensor:
    """The weights that a training with seed 5 starts from."""
    load_start(base, dim, 5, CPU).save_pretrained(out)
    return weights(out)


def stock_trainer(out: Path, base: Path, examples: list[dict], margin: bool, **settings) -> RewardTrainer:
    """TRL's own trainer on the same ids, from the same start."""
    rows = [{side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")} for row in examples]
    if margin:
        rows = [{**row, "margin": example["m"]} for row, example in zip(rows, examples, strict=True)]
    arguments = trainer_arguments(TRAINING, {**CPU, "micro_batch_size": 8}, out, 5, len(rows))
    return RewardTrainer(
        model=load_start(base, 1, 5, CPU),
        args=StockConfig(**{**arguments, "remove_unused_columns": True, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(base),
    )


def trainer_for(out: Path, base: Path, examples: list[dict], reward_model: RewardModel, micro: int = 8, **changes):
    arguments = {"training": TRAINING, "lora": None, "seed": 5, "hardware": {**CPU, "micro_batch_size": micro}}
    return build_trainer(
        model_dir=base, examples=examples, out=out, reward_model=reward_model, **{**arguments, **changes}
    )


def gradients(trainer: RewardTrainer, batch: dict) -> tuple[float, torch.Tensor]:
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for _, p in sorted(trainer.model.named_parameters())])


def first_batch(trainer) -> dict:
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    return batches[0]


@pytest.mark.parametrize("centring", [0.0, 0.3])
@pytest.mark.parametrize("margin", [False, True])
def test_loss_and_gradients_equal_the_stock_trainer(tmp_path, base, centring, margin) -> None:
    examples = toy_pairs(8)
    for number, row in enumerate(examples):
        row["m"] = 0.3 * number - 0.5 if margin else 0.0
    stock = stock_trainer(tmp_path, base, examples, margin, center_rewards_coefficient=centring or None)
    ours = trainer_for(tmp_path, base, examples, RewardModel(centring=centring))
    expected_loss, expected = gradients(stock, next(iter(stock.get_train_dataloader())))
    loss, found = gradients(ours, first_batch(ours))
    assert loss == pytest.approx(expected_loss, rel=1e-6) and loss > 0.1
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    wrong = trainer_for(tmp_path, base, examples, RewardModel(centring=centring, smoothing=0.1))
    assert gradients(wrong, first_batch(wrong))[0] != pytest.approx(expected_loss, rel=1e-3)


def test_a_whole_plain_training_equals_the_stock_trainer(tmp_path, base) -> None:
    examples = toy_pairs(24)
    stock = stock_trainer(tmp_path / "trl", base, examples, False)
    stock.train()
    stock.model.save_pretrained(tmp_path / "stock")
    train(tmp_path / "ours", base, examples, hardware={**CPU, "micro_batch_size": 8})
    start = start_weights(base, tmp_path / "start")
    assert change(start, tmp_path / "ours" / "model", tmp_path / "stock") < 1e-3
    log = [json.loads(line) for line in (tmp_path / "ours" / "train_log.jsonl").read_text().splitlines()]
    theirs = [entry for entry in stock.state.log_history if "loss" in entry]
    for ours, stocks in {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}.items():
        assert [e[ours] for e in log] == pytest.approx([e[stocks] for e in theirs], rel=1e-3, abs=1e-5), ours


@pytest.mark.parametrize("reward_model", [RewardModel(centring=0.1), GPM], ids=["scalar", "gpm"])
def test_the_micro_batch_changes_nothing(tmp_path, base, reward_model) -> None:
    """12 pairs in batches of 8: the last batch is short, where dividing by micro-batches goes wrong."""
    examples, training = toy_pairs(12), TrainingConfig(learning_rate=2e-3, batch_size=8)
    for number, row in enumerate(examples):
        row |= {"q": 1.0 - number % 3 / 10, "w": 0.5 + number % 2, "m": number % 4 / 4}
    folders = {"8", "4", "1"} if reward_model is GPM else {"8", "2"}
    for micro in folders:
        hardware = {**CPU, "micro_batch_size": int(micro)}
        train(tmp_path / micro, base, examples, training=training, hardware=hardware, reward_model=reward_model)
    start = start_weights(base, tmp_path / "start", reward_model.dim)
    logs = {m: [json.loads(x) for x in (tmp_path / m / "train_log.jsonl").read_text().splitlines()] for m in folders}
    for micro in folders - {"8"}:
        assert change(start, tmp_path / micro / "model", tmp_path / "8" / "model") <= 1e-4
        for one, other in zip(logs["8"], logs[micro], strict=True):  # Adam and clipping would hide a wrong scale
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_soft_labels_margins_and_weights_reach_the_loss(tmp_path, base) -> None:
    """Against a computation that shares no code with the trainer: one sequence at a time, no padding."""
    examples = toy_pairs(4)
    for row, values in zip(examples, [(0.8, 0.0, 1.0), (1.0, 0.5, 2.0), (0.3, -1.0, 0.5)], strict=False):
        row.update(zip(("q", "m", "w"), values, strict=True))
    load_start(base, 1, 5, CPU).save_pretrained(tmp_path / "start")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start").eval()

    def score(row: dict, side: str) -> float:
        with torch.no_grad():
            return model(torch.tensor([row["prompt_ids"] + row[side]])).logits.item()

    expected = 0.0
    for row in examples:
        p = torch.sigmoid(torch.tensor(score(row, "chosen_ids") - score(row, "rejected_ids") - row["m"]))
        q = 0.8 * row["q"] + 0.2 * (1 - row["q"])
        expected -= row["w"] * (q * p.log() + (1 - q) * (1 - p).log()).item() / 4
    training = TrainingConfig(1e-3, batch_size=4)
    ours = trainer_for(tmp_path, base, examples, RewardModel(smoothing=0.2), micro=4, training=training)
    assert ours.compute_loss(ours.model, first_batch(ours)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reward_model", [RewardModel(), GPM], ids=["scalar", "gpm"])
def test_a_preference_that_can_be_learnt_is_learnt(tmp_path, base, reward_model) -> None:
    held_out = toy_pairs(100, seed=2)
    train(tmp_path, base, toy_pairs(200, seed=1), training=ENOUGH, reward_model=reward_model)
    assert accuracy(tmp_path, held_out) > 0.9


def test_the_labels_are_what_is_learnt(tmp_path, base) -> None:
    train(tmp_path, base, [{**row, "q": 0.0} for row in toy_pairs(200, seed=1)], training=ENOUGH)
    assert accuracy(tmp_path, toy_pairs(100, seed=2)) < 0.1


def test_a_cycle_is_learnt_by_a_vector_head_alone(tmp_path, base) -> None:
    """To one prompt, w7 is better than w8, that better than w9, and that better than w7: no scalar orders them."""
    cycle = ((7, 8), (8, 9), (9, 7))
    examples = [
        {**row, "prompt_ids": [1, 4, 20, 5], "chosen_ids": [cycle[n % 3][0], 2], "rejected_ids": [cycle[n % 3][1], 2]}
        for n, row in enumerate(toy_pairs(96))
    ]
    training = TrainingConfig(learning_rate=2e-3, epochs=4, batch_size=12)
    found = {}
    for name, reward_model in (("scalar", RewardModel()), ("gpm", GPM)):
        train(tmp_path / name, base, examples, training=training, reward_model=reward_model)
        found[name] = accuracy(tmp_path / name, examples)
    assert found["gpm"] == 1 and found["scalar"] < 0.7, found


LORA = LoraConfig(r=8, alpha=16)
LORA_TRAINING = TrainingConfig(learning_rate=1e-2, epochs=3, batch_size=16)


def test_lora_trains_adapter_and_head_and_writes_a_merged_folder(tmp_path, base) -> None:
    context = train(tmp_path, base, toy_pairs(240, seed=1), training=LORA_TRAINING, lora=LORA)
    assert accuracy(tmp_path, toy_pairs(100, seed=2)) > 0.9
    (probe,) = context.report["facts"]["merge_probe"]
    assert 0 <= probe <= 1e-3
    model, start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model"), load_start(base, 1, 5, CPU)
    old = dict(start.named_parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert "score.weight" in moved and any("q_proj" in name for name in moved)
    assert "model.embed_tokens.weight" not in moved and set(old) == {name for name, _ in model.named_parameters()}


def test_the_adapted_model_scores_like_its_merged_folder(tmp_path, base, monkeypatch) -> None:
    """The probe would notice a merge that loses the head."""
    real = training_of._save_folder

    def without_head(model, tokenizer, directory):
        with torch.no_grad():
            model.score.weight.zero_()
        real(model, tokenizer, directory)

    monkeypatch.setattr(training_of, "_save_folder", without_head)
    with pytest.raises(RuntimeError, match="merge is not exact"):
        train(tmp_path, base, toy_pairs(16), lora=LORA)
    with pytest.raises(RuntimeError, match="nan"):
        prove_merge([1.0], [float("nan")], torch.float32)
    assert prove_merge([40.0], [39.99], torch.float32) == pytest.approx(0.01)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(tmp_path, base, lora) -> None:
    for name, on in (("plain", False), ("checkpointed", True)):
        hardware = {**CPU, "micro_batch_size": 4, "gradient_checkpointing": on}
        train(tmp_path / name, base, toy_pairs(16), lora=lora, hardware=hardware)
    start = start_weights(base, tmp_path / "start")
    assert change(start, tmp_path / "checkpointed" / "model", tmp_path / "plain" / "model") <= 1e-4


def test_the_adapters_dropout_acts_and_the_models_own_does_not(tmp_path, base) -> None:
    for name, dropout in (("none", 0.0), ("some", 0.5)):
        train(tmp_path / name, base, toy_pairs(16), lora=LoraConfig(r=8, alpha=16, dropout=dropout))
    assert not torch.equal(*(weights(tmp_path / name / "model") for name in ("none", "some")))
    for name, dropout in (("still", 0.0), ("shaky", 0.5)):
        train(tmp_path / name, tiny_gpt2(tmp_path / f"{name}-base", dropout), toy_pairs(16))
    assert torch.equal(*(weights(tmp_path / name / "model") for name in ("still", "shaky")))


def tiny_gpt2(directory: Path, dropout: float = 0.0) -> Path:
    """Absolute positions, biases, tied embeddings: another architecture than Llama's."""
    probabilities = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=64, n_layer=2, n_head=2, eos_token_id=2, **probabilities)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_another_architecture_learns_and_scores_alike_in_any_batch(tmp_path) -> None:
    base = tiny_gpt2(tmp_path / "base")
    train(tmp_path / "rm", base, toy_pairs(200, seed=1), training=ENOUGH)
    held_out = toy_pairs(60, seed=2)
    assert accuracy(tmp_path / "rm", held_out) > 0.9
    alone = torch.cat([margins(tmp_path / "rm", [row]) for row in held_out[:5]], dim=1)
    assert torch.allclose(alone, margins(tmp_path / "rm", held_out)[:, :5], atol=1e-4)


def test_the_output_is_a_plain_folder_and_a_note_about_it(tmp_path, base) -> None:
    context = train(tmp_path, base, toy_pairs(16), reward_model=GPM)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "reward_model.json", "train_log.jsonl"]
    assert json.loads((tmp_path / "reward_model.json").read_text()) == {"head": "gpm", "dim": 4, "members": ["model"]}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.num_labels == 4 and model.score.weight.shape == (4, 64)
    assert model.config.pad_token_id == tokenizer.pad_token_id == PAD_ID and tokenizer.chat_template
    assert context.report["rows"]["pairs"] == {"in": 16, "out": 16, "dropped": {}}
    assert context.report["tokens"] == sum(
        2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in toy_pairs(16)
    )
    names = set(json.loads((tmp_path / "train_log.jsonl").read_text().splitlines()[0]))
    assert {"rewards/margins", "rewards/accuracies"} <= names and "rewards/chosen" not in names


def test_two_trainings_write_the_same_bytes_and_another_seed_another_head(tmp_path, base) -> None:
    for name in ("a", "b"):
        torch.manual_seed(ord(name))  # whatever chance was used before
        train(tmp_path / name, base, toy_pairs(16))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert Path("train_log.jsonl") in files and Path("model/model.safetensors") in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    heads = [load_start(base, 1, seed, CPU).score.weight for seed in (5, 5, 6)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert 0.01 < heads[0].std().item() < 0.05  # 0.2 / sqrt(64) = 0.025


def test_bfloat16_stays_bfloat16_and_small_updates_arrive(tmp_path, base) -> None:
    """At this learning rate every single update is below half the distance between bfloat16 numbers."""
    training = TrainingConfig(learning_rate=2e-5, epochs=4, batch_size=8, schedule="constant", warmup_ratio=0.0)
    hardware = {**CPU, "dtype": "bfloat16"}
    train(tmp_path, base, toy_pairs(32), training=training, hardware=hardware)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    start = load_start(base, 1, 5, hardware)
    assert (model.score.weight != start.score.weight).float().mean() > 0.1
    got, wide = margins(tmp_path, toy_pairs(32), "bfloat16"), margins(tmp_path, toy_pairs(32))
    assert (got - wide).abs().max() < 0.2 and (got != got.bfloat16()).any()  # the head itself isn't rounded


def without_pad(base: Path, folder: Path) -> Path:
    """The same model with a tokenizer that pads with its end-of-sequence token."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = load_tokenizer(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    config = json.loads((base / "config.json").read_text()) | {"pad_token_id": EOS_ID}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_end_of_sequence_token_is_never_padding(tmp_path, base) -> None:
    """Else transformers would read the score in front of the end of every answer."""
    odd = without_pad(base, tmp_path / "odd")
    assert pad_token(load_tokenizer(base)) == "<pad>" and pad_token(load_tokenizer(odd)) == "<bos>"
    examples = toy_pairs(24)
    for name, folder in (("plain", base), ("odd-out", odd)):
        train(tmp_path / name, folder, examples)
    found = [margins(tmp_path / name, examples) for name in ("plain", "odd-out")]
    assert torch.allclose(*found, atol=1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "odd-out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "odd-out" / "model")
    assert model.config.pad_token_id == tokenizer.pad_token_id == 1
    whole = torch.tensor([examples[0]["prompt_ids"] + examples[0]["chosen_ids"]])
    padded = torch.nn.functional.pad(whole, (0, 3), value=tokenizer.pad_token_id)
    mask = torch.nn.functional.pad(torch.ones_like(whole), (0, 3))
    with torch.no_grad():
        read, cut = model(padded, attention_mask=mask).logits, model(whole[:, :-1]).logits
        assert torch.allclose(read, model(whole).logits, atol=1e-4) and not torch.allclose(read, cut, atol=1e-3)


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(base) -> None:
    tokenizer = load_tokenizer(base)
    vars(tokenizer)["_special_tokens_map"] |= dict.fromkeys(("bos_token", "unk_token"))
    tokenizer.pad_token = tokenizer.eos_token
    assert pad_token(tokenizer) not in (None, "<eos>")  # another special token is at hand

    class Bare:
        eos_token_id = pad_token_id = bos_token_id = unk_token_id = 2
        added_tokens_decoder, name_or_path = {}, "bare"

    with pytest.raises(UserError, match="bare: no special token"):
        pad_token(Bare())


def changed(row: dict, **values) -> list[dict]:
    return [*toy_pairs(3), {**row, "example_id": "odd", **values}]


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([], "no pairs for the reward model"),
        (changed(toy_pairs(1)[0], kind="point", rejected_ids=None), "odd: kind=point; a reward model is trained on"),
        (changed(toy_pairs(1)[0], rejected_ids=[]), "odd: prompt or rejected_ids has no tokens"),
        (changed(toy_pairs(1)[0], rejected_ids=None), "odd: prompt or rejected_ids has no tokens"),
        (changed(toy_pairs(1)[0], prompt_ids=[]), "odd: prompt or chosen_ids has no tokens"),
        (changed(toy_pairs(1)[0], chosen_ids=[9] * 300), "odd: prompt and chosen_ids have 3.. tokens, the model takes"),
    ],
)
def test_examples_that_can_not_be_trained_on_are_refused(tmp_path, base, examples, said) -> None:
    with pytest.raises(UserError, match=said):
        train(tmp_path, base, examples)
    assert not (tmp_path / "model").exists()


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path, base) -> None:
    from safetensors.torch import load_file, save_file

    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="weights lack model.norm.weight"):
        train(tmp_path / "out", tmp_path, toy_pairs(8))
    with pytest.raises(UserError, match="no model that can carry a score head"):
        load_start(tmp_path / "out", 1, 5, CPU)
