"""One trainer for every kind of example: mixed tables, losses that look at a whole step, no reference, a value head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pair_fixtures import CPU, change, how, some_examples, some_pairs, train, trainer_for, weights
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM
from trl.trainer import dpo_trainer

from align_loop import record
from align_loop.errors import UserError
from align_loop.objectives.noise import NoiseHandling
from align_loop.objectives.objective import Objective
from align_loop.objectives.terms import GroupTerm, KlTerm, PairTerm, PointTerm, SftTerm
from align_loop.objectives.trackers import AdaptiveBeta
from align_loop.trainers import policy as policy_module
from align_loop.trainers.config import LoraConfig, TrainingConfig
from align_loop.trainers.models import load_tokenizer
from align_loop.trainers.policy import Folders, build_trainer, load_start
from align_loop.trainers.policy_data import policy_rows
from align_loop.trainers.policy_trainer import PolicyTrainer

B = 0.2
TRAINING = TrainingConfig(learning_rate=2e-3, epochs=2, batch_size=8)


def mixed() -> Objective:
    """A term for every kind; all three rules that look at a whole step."""
    return Objective(
        B,
        {
            "pair": PairTerm(adaptive=AdaptiveBeta(alpha=0.1, keep=0.5)),
            "kto": PointTerm(loss="kto", kinds=["point"]),
            "bco": PointTerm(weight=0.5, loss="bco"),
            "sft": SftTerm(kinds=["demo"]),
            "kl": KlTerm(weight=0.1, kinds=["demo"]),
            "group": GroupTerm(),
        },
    )


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("policy"), seed=0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("reference"), seed=1)


def first_loss(trainer: PolicyTrainer, micro_batches: int = 1) -> torch.Tensor:
    found = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), micro_batches, torch.device("cpu"))
    return sum(trainer.compute_loss(trainer.model, batch) for batch in found[0])


def logprobs(path: Path, row: dict, answer: list[int]) -> torch.Tensor:
    """Of an answer's tokens, by a forward pass of its own without padding."""
    ids, start = torch.tensor([row["prompt_ids"] + answer]), len(row["prompt_ids"])
    with torch.no_grad():
        table = AutoModelForCausalLM.from_pretrained(path)(ids).logits[0, :-1].double().log_softmax(-1)
    return table.gather(1, ids[0, 1:, None])[start - 1 :, 0]


def test_a_mixed_table_has_the_loss_computed_by_hand(tmp_path, policy, reference) -> None:
    """No trackers here; every example alone, its token weights and weight included."""
    rows = some_examples(8)
    rows[0] |= {"chosen_weights": [0.5] * len(rows[0]["chosen_ids"]), "w": 2.0, "m": 0.3}
    rows[1]["chosen_weights"] = [0.0] + [1.0] * (len(rows[1]["chosen_ids"]) - 1)
    terms = {"pair": PairTerm(), "point": PointTerm(loss="bco", kinds=["point"], baseline="none")}
    objective = Objective(B, {**terms, "sft": SftTerm(kinds=["demo"]), "group": GroupTerm(loss="regress")})

    def reward(row: dict, answer: list[int], weights_: list[float] | None = None) -> torch.Tensor:
        ratio = logprobs(policy, row, answer) - logprobs(reference, row, answer)
        return B * (ratio * (1 if weights_ is None else torch.tensor(weights_))).sum()

    total = 0.0
    for row in rows:
        if row["kind"] == "pair":
            u = reward(row, row["chosen_ids"], row.get("chosen_weights")) - reward(row, row["rejected_ids"]) - row["m"]
            total -= row["w"] * torch.sigmoid(u).log()
        elif row["kind"] == "point":
            total -= torch.sigmoid(row["label"] * reward(row, row["chosen_ids"], row.get("chosen_weights"))).log()
        elif row["kind"] == "demo":
            total -= logprobs(policy, row, row["chosen_ids"]).mean()
        else:
            r = [reward(row, ids) - s for ids, s in zip(row["group_ids"], row["group_scores"], strict=True)]
            total += ((r[0] - r[1]) ** 2 + (r[0] - r[2]) ** 2 + (r[1] - r[2]) ** 2) / 3
    found = first_loss(trainer_for(tmp_path, policy, reference, rows, objective=objective))
    assert found.item() == pytest.approx(total.item() / 8, rel=1e-5)


def test_the_micro_batch_changes_nothing_with_whole_step_rules_too(tmp_path, policy, reference) -> None:
    """20 examples in batches of 8: short last batches; KTO's, BCO's and beta-DPO's statistics of the whole step."""
    rows = some_examples(20)
    for micro in (8, 4, 1):
        train(tmp_path / str(micro), policy, rows, micro, reference, objective=mixed(), training=TRAINING)
    logs = [_log(tmp_path / str(micro)) for micro in (8, 4, 1)]
    assert logs[0][1]["bco/baseline"] != 0 and logs[0][1]["pair/kept"] == 0.5 and logs[0][1]["pair/beta_factor"] != 1
    for micro, log in zip((4, 1), logs[1:], strict=True):
        assert change(policy, tmp_path / str(micro) / "model", tmp_path / "8" / "model") <= 1e-4
        for one, other in zip(log, logs[0], strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def _log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]


def test_the_log_has_every_terms_share_of_the_loss(tmp_path, policy, reference) -> None:
    train(tmp_path, policy, some_examples(16), 8, reference, objective=mixed())
    for entry in _log(tmp_path):
        shares = [value for name, value in entry.items() if name.startswith("terms/")]
        assert len(shares) == 6 and sum(shares) == pytest.approx(entry["loss"], abs=1e-4)


def test_the_fused_head_used_on_gpus_trains_the_same(tmp_path, policy, reference, monkeypatch) -> None:
    rows = some_examples(16)
    train(tmp_path / "logits", policy, rows, 4, reference, objective=mixed())
    monkeypatch.setattr(PolicyTrainer, "_keeps_logits", property(lambda self: False))
    train(tmp_path / "fused", policy, rows, 4, reference, objective=mixed())
    assert change(policy, tmp_path / "fused" / "model", tmp_path / "logits" / "model") <= 1e-4


def test_ktos_baseline_comes_from_answers_to_other_prompts(tmp_path, policy, reference) -> None:
    rows = [row for row in some_examples(16) if row["kind"] == "point"]
    rows[2]["prompt_ids"] = rows[1]["prompt_ids"]  # the same prompt: the one before it counts
    trainer = trainer_for(tmp_path, reference, policy, rows, objective=Objective(B, {"kto": PointTerm()}))
    first_loss(trainer)
    sources = [3, 0, 0, 2]
    z0 = [
        (logprobs(reference, row, rows[i]["chosen_ids"]) - logprobs(policy, row, rows[i]["chosen_ids"])).sum().item()
        for row, i in zip(rows, sources, strict=True)
    ]
    assert trainer.trackers["kto"].value == pytest.approx(sum(z0) / 4, rel=1e-4) and sum(z0) > 0.1


def test_ktos_baseline_of_pairs_is_over_both_answers(tmp_path, policy, reference) -> None:
    rows = some_pairs(4)
    trainer = trainer_for(tmp_path, policy, reference, rows, objective=Objective(B, {"kto": PointTerm()}), micro=1)
    trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 4, torch.device("cpu"))
    z0 = [
        (logprobs(policy, row, rows[i - 1][side]) - logprobs(reference, row, rows[i - 1][side])).sum().item()
        for i, row in enumerate(rows)
        for side in ("chosen_ids", "rejected_ids")
    ]
    assert trainer.trackers["kto"].value == pytest.approx(sum(z0) / 8, rel=1e-4) and sum(z0) > 0


def test_noise_flags_see_pairs_alone(tmp_path, policy, reference) -> None:
    """One batch of 8 pairs with and without 8 points beside them: the same margins and flags."""
    pairs, noise = some_pairs(8), NoiseHandling(share=0.25, warmup=0.0)
    points = [{**row, "kind": "point", "label": 1.0, "example_id": f"p{i}"} for i, row in enumerate(some_pairs(8, 1))]
    objective = Objective(B, {"pair": PairTerm(), "point": PointTerm(loss="bco", kinds=["point"])})
    found = []
    for name, rows in (("alone", pairs), ("beside", [row for two in zip(pairs, points, strict=True) for row in two])):
        training = TrainingConfig(learning_rate=2e-3, batch_size=len(rows))
        out = tmp_path / name
        train(out, policy, rows, len(rows), reference, objective=objective, noise=noise, training=training)
        found.append({row["example_id"]: row for row in record.read_rows(out / "flags.parquet")})
    assert set(found[0]) == set(found[1]) == {row["example_id"] for row in pairs}
    assert sum(row["flagged"] for row in found[0].values()) == 2
    for name, row in found[0].items():
        assert found[1][name]["flagged"] == row["flagged"]
        assert found[1][name]["detector_margin"] == pytest.approx(row["detector_margin"], abs=1e-4)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, alpha=8)], ids=["full", "lora"])
def test_an_objective_without_reference_loads_and_runs_none(tmp_path, policy, lora, monkeypatch) -> None:
    loaded, load = [], policy_module.load_model
    monkeypatch.setattr(policy_module, "load_model", lambda path, hardware: loaded.append(path) or load(path, hardware))
    monkeypatch.setattr(PolicyTrainer, "_score_reference", None)
    monkeypatch.setattr(dpo_trainer, "create_model_from_path", None)  # TRL's own way to a reference
    objective = Objective(B, {"simpo": PairTerm(score="mean_log_prob", beta=2.0, margin=0.5), "sft": SftTerm()})
    missing = tmp_path / "nowhere"
    settings = how(objective=objective, lora=lora)
    start = load_start(Folders(policy, policy if lora else missing), settings)
    trainer = build_trainer(start, load_tokenizer(policy), some_pairs(16), tmp_path, settings)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert not any(".ref." in name for name in before)
    trainer.train()
    assert trainer.ref_model is None and loaded == [policy]
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_a_reference_is_run_where_one_term_needs_it(tmp_path, policy, monkeypatch) -> None:
    """The control of the test above."""
    monkeypatch.setattr(PolicyTrainer, "_score_reference", None)
    with pytest.raises(TypeError):
        train(tmp_path, policy, some_pairs(8), objective=Objective(B, {"s": SftTerm(), "kl": KlTerm()}))


def test_noise_handling_brings_its_reference_to_an_objective_without_one(tmp_path, policy) -> None:
    objective = Objective(B, {"simpo": PairTerm(score="mean_log_prob", beta=2.0)})
    train(tmp_path, policy, some_pairs(16), objective=objective, noise=NoiseHandling(share=0.25, warmup=0.0))
    assert sum(row["flagged"] for row in record.read_rows(tmp_path / "flags.parquet")) == 4


def test_an_adapter_learns_from_points(tmp_path, policy) -> None:
    rows = [row for row in some_examples(64) if row["kind"] == "point"]
    training = TrainingConfig(learning_rate=2e-2, epochs=6, batch_size=8)
    objective = Objective(B, {"bco": PointTerm(loss="bco")})
    context = train(tmp_path, policy, rows, lora=LoraConfig(r=4, alpha=8), training=training, objective=objective)
    assert context.report["facts"]["step0_margin"] <= 1e-3
    log = _log(tmp_path)
    assert log[-1]["rewards/chosen"] > log[-1]["rewards/rejected"] + 0.5 and "rewards/margins" not in log[-1]
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]


def dro(rows: int) -> tuple[list[dict], Objective]:
    """Points whose score is 2 everywhere: the value head alone can explain it."""
    points = [{**row, "kind": "point", "label": 2.0} for row in some_pairs(rows)]
    return points, Objective(0.05, {"dro": PointTerm(loss="dro", kinds=["point"])})


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, alpha=8)], ids=["full", "lora"])
def test_dros_value_head_learns_and_leaves_the_saved_model_plain(tmp_path, policy, lora) -> None:
    rows, objective = dro(32)
    training = TrainingConfig(learning_rate=5e-3, epochs=8, batch_size=8)
    train(tmp_path, policy, rows, lora=lora, training=training, objective=objective)
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert names == set(load_file(policy / "model.safetensors"))
    log = _log(tmp_path)
    assert log[0]["loss"] == pytest.approx(2.0, abs=1e-5) and log[-1]["loss"] < 0.1  # 0.4 and 0.9 without a head
    assert not torch.equal(weights(tmp_path / "model"), weights(policy))


def test_the_value_is_a_function_of_the_prompts_last_state(tmp_path, policy, reference) -> None:
    rows, objective = dro(8)
    trainer = trainer_for(tmp_path, policy, reference, rows, objective=objective)
    head = trainer.value_head.head
    torch.nn.init.normal_(head.weight)
    loss = first_loss(trainer)
    model, total = AutoModelForCausalLM.from_pretrained(policy), 0.0
    for row in rows:
        with torch.no_grad():
            state = model.model(torch.tensor([row["prompt_ids"]])).last_hidden_state[0, -1]
        ratio = (logprobs(policy, row, row["chosen_ids"]) - logprobs(reference, row, row["chosen_ids"])).sum()
        total += (2.0 - head(state).item() - 0.05 * ratio.item()) ** 2 / 16
    assert loss.item() == pytest.approx(total, rel=1e-4)
    loss.backward()
    assert head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, alpha=8)], ids=["full", "lora"])
def test_a_resumed_training_continues_trackers_and_head_to_the_bit(tmp_path, policy, lora) -> None:
    rows = some_examples(20)
    objective = mixed()
    objective.terms["dro"] = PointTerm(loss="dro_v", kinds=["point"])
    settings = how(objective=objective, lora=lora, training=TRAINING, hardware={**CPU, "micro_batch_size": 4})
    runs = []
    for resume in (None, str(tmp_path / "trainer" / "checkpoint-4")):
        start = load_start(Folders(policy, policy), settings)
        saves = {"save_strategy": "steps", "save_steps": 2}
        run = build_trainer(start, load_tokenizer(policy), rows, tmp_path, settings, **saves)
        run.train(resume_from_checkpoint=resume)
        runs.append(run)
    for (name, one), (_, other) in zip(*(run.model.named_parameters() for run in runs), strict=True):
        assert torch.equal(one, other), name
    states = [{name: t.state_dict() for name, t in run.trackers.items()} for run in runs]
    assert states[0] == states[1] and states[0]["bco"]["count"] == 2 * (2 * 5 + 5)
    assert runs[0].value_head.head.weight.abs().max() > 0


def test_what_cannot_be_trained_on_stops_before_anything_is_loaded(tmp_path, policy, monkeypatch) -> None:
    monkeypatch.setattr(policy_module, "load_model", None)
    with pytest.raises(UserError, match="e001: no term of the objective reads kind='point'"):
        train(tmp_path, policy, some_examples(4))


def test_the_record_carries_every_kind_to_the_trainer(tmp_path) -> None:
    rows = some_examples(8)
    rows[1]["chosen_weights"] = [0.5] * len(rows[1]["chosen_ids"])
    record.write_table(tmp_path / "examples.parquet", rows, record.EXAMPLES)
    read = record.read_rows(tmp_path / "examples.parquet")
    assert read[3]["group_scores"] == [1.0, 0.2, 0.5] and read[2]["rejected_ids"] is read[2]["label"] is None
    given, found = (policy_rows(table, 256, padding=True, mismatch=True) for table in (rows, read))
    assert str(given.to_list()) == str(found.to_list()) and len(found) == 9


def test_token_weights_go_one_to_a_token(tmp_path, policy) -> None:
    rows = [{**some_pairs(1)[0], "rejected_weights": [1.0]}]
    with pytest.raises(UserError, match="e000: rejected_weights has 1 value"):
        train(tmp_path, policy, rows)
