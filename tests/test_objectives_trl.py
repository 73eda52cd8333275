"""Every loss that stock TRL has too: one step's loss and gradients of our trainer equal those of TRL's own trainer.

Where the two differ on purpose: TRL's ``ipo`` is length-normalised in DPOTrainer and in CPOTrainer, so ours is with a
mean score; its ``sft`` averages over all tokens of the batch and ours over the tokens of each answer, so answers have
equal lengths where it takes part; its ORPO trains the prompt as well, so its odds term alone is compared; its KTO gives
an unpaired table the mean over answers, ours the sum over the two answers of a pair. ``sigmoid`` ignores
``label_smoothing`` in TRL's DPOTrainer: ``robust`` and CPO honour it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from pair_fixtures import CPU, TRAINING, some_pairs, trainer_for
from tiny import tiny_llama
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from align_loop.objectives.objective import Objective
from align_loop.objectives.terms import PairTerm, PointTerm, SftTerm
from align_loop.trainers.common import trainer_arguments
from align_loop.trainers.models import load_model, load_tokenizer

B = 0.2
COLUMNS = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("policy"), seed=0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("reference"), seed=1)


def equal_lengths(count: int) -> list[dict[str, Any]]:
    """Pairs whose chosen answers all have 6 tokens."""
    rows = some_pairs(count)
    return [{**row, "chosen_ids": ([8 + i] * 5 + row["chosen_ids"])[:5] + [2]} for i, row in enumerate(rows)]


def text(tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{name: " " + tokenizer.decode(row[ids]) for name, ids in COLUMNS.items()} for row in rows]


def settings(out: Path, count: int, **fields: Any) -> dict[str, Any]:
    arguments = trainer_arguments(TRAINING, {**CPU, "micro_batch_size": count}, out, 5, count)
    return {**arguments, "remove_unused_columns": True, "beta": B, **fields}


def gradients(trainer: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for _, p in sorted(trainer.model.named_parameters())])


def ours(out: Path, policy: Path, reference: Path, rows: list, objective: Objective) -> tuple[float, torch.Tensor]:
    trainer = trainer_for(out / "ours", policy, reference, rows, objective=objective)
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    return gradients(trainer, batches[0])


def same(one: tuple[float, torch.Tensor], other: tuple[float, torch.Tensor]) -> bool:
    close = torch.allclose(one[1], other[1], rtol=1e-3, atol=2e-6 * other[1].abs().max().item())
    return one[0] == pytest.approx(other[0], rel=1e-5) and close


def pair(**fields: Any) -> Objective:
    return Objective(B, {"pair": PairTerm(**fields)})


def points(loss: str, **fields: Any) -> Objective:
    return Objective(B, {"point": PointTerm(loss=loss, **{"baseline": "none", "kinds": ["pair"], **fields})})


MPO = {
    "p": PairTerm(weight=0.8),
    "q": PointTerm(weight=0.2, loss="bco", baseline="none", kinds=["pair"]),
    "g": SftTerm(kinds=["pair"]),
}
DOWN = {
    "a": PointTerm(weight=-1.0, loss="kto", baseline="none", negative_weight=0.0),
    "b": PairTerm(links={"sigmoid": 1.0}),
}
DPO = {
    "sigmoid": ({"loss_type": ["sigmoid"]}, pair()),
    "sigmoid, its smoothing ignored": ({"loss_type": ["sigmoid"], "label_smoothing": 0.2}, pair()),
    "hinge": ({"loss_type": ["hinge"]}, pair(links={"hinge": 1.0})),
    "ipo": ({"loss_type": ["ipo"]}, pair(links={"ipo": 1.0}, score="mean_log_ratio")),
    "robust": ({"loss_type": ["robust"], "label_smoothing": 0.2}, pair(flip_rate=0.2)),
    "cdpo": (
        {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.2, "loss_weights": [1.6, -0.6]},
        pair(smoothing=0.2),
    ),
    "sigmoid_norm": ({"loss_type": ["sigmoid_norm"]}, pair(score="mean_log_ratio")),
    "nca_pair": ({"loss_type": ["nca_pair"]}, points("nca")),
    "bco_pair": ({"loss_type": ["bco_pair"]}, points("bco")),
    "sppo_hard": ({"loss_type": ["sppo_hard"]}, points("sppo")),
    "apo_zero": ({"loss_type": ["apo_zero"]}, points("kto")),
    "sft": ({"loss_type": ["sft"]}, Objective(B, {"sft": SftTerm()})),
    "mpo": ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, Objective(B, MPO)),
}


def stock_dpo(out: Path, policy: Path, reference: Path, rows: list, **fields: Any) -> tuple[float, torch.Tensor]:
    tokenizer = load_tokenizer(policy)
    trainer = DPOTrainer(
        model=load_model(policy, CPU),
        ref_model=load_model(reference, CPU),
        args=DPOConfig(**settings(out, len(rows), **fields)),
        train_dataset=Dataset.from_list(text(tokenizer, rows)),
        processing_class=tokenizer,
    )
    return gradients(trainer, next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("name", DPO)
def test_dpo_trainers_losses(tmp_path, policy, reference, name) -> None:
    fields, objective = DPO[name]
    rows = equal_lengths(8)
    stock = stock_dpo(tmp_path, policy, reference, rows, **fields)
    assert same(ours(tmp_path, policy, reference, rows, objective), stock)
    assert not same(ours(tmp_path, policy, reference, rows, Objective(1.5 * B, {"x": PairTerm(margin=0.3)})), stock)


def test_apo_down_but_for_a_constant(tmp_path, policy, reference) -> None:
    """Ours counts the chosen answers' part as s - 1, which has the same gradient."""
    stock = stock_dpo(tmp_path, policy, reference, some_pairs(8), loss_type=["apo_down"])
    loss, slope = ours(tmp_path, policy, reference, some_pairs(8), Objective(B, DOWN))
    assert same((loss + 1, slope), stock)


@pytest.mark.parametrize(("loss", "baseline"), [("kto", "mismatch"), ("apo_zero_unpaired", "none")])
def test_kto_trainers_losses(tmp_path, policy, reference, loss, baseline) -> None:
    """Points with other lambdas for good and bad; z0 from the same mismatched answers, far enough from 0 to matter."""
    pairs, tokenizer = some_pairs(8), load_tokenizer(policy)
    rows = [
        {"example_id": f"e{i}", "kind": "point", "prompt_ids": row["prompt_ids"], "chosen_ids": row["chosen_ids"]}
        | {"label": 1.0 if i % 3 else -1.0}
        for i, row in enumerate(pairs)
    ]
    table = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": points_["label"] > 0}
        for row, points_ in zip(text(tokenizer, pairs), rows, strict=True)
    ]
    fields = {"loss_type": loss, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    stock = KTOTrainer(
        model=load_model(policy, CPU),
        ref_model=load_model(reference, CPU),
        args=KTOConfig(**settings(tmp_path, 8, **fields)),
        train_dataset=Dataset.from_list(table),
        processing_class=tokenizer,
    )
    expected = gradients(stock, next(iter(stock.get_train_dataloader())))
    term = {"baseline": baseline, "kinds": ["point"], "positive_weight": 1.2, "negative_weight": 0.7}
    assert same(ours(tmp_path, policy, reference, rows, points("kto", **term)), expected)
    other = {**term, "baseline": "none" if baseline == "mismatch" else "mismatch"}
    (z0,) = [value for metrics in stock._metrics.values() for value in metrics["kl"]]
    assert (z0 > 0.5) == (baseline == "mismatch")
    assert not same(ours(tmp_path, policy, reference, rows, points("kto", **other)), expected)


CPO = {
    "simpo": ({"loss_type": "simpo", "simpo_gamma": 0.4, "cpo_alpha": 0.0}, {"score": "mean_log_prob", "margin": 0.4}),
    "sigmoid": ({"loss_type": "sigmoid", "cpo_alpha": 1.0}, {"score": "log_prob"}),
    "smoothed": (
        {"loss_type": "sigmoid", "cpo_alpha": 0.0, "label_smoothing": 0.1},
        {"score": "log_prob", "smoothing": 0.1},
    ),
    "hinge": ({"loss_type": "hinge", "cpo_alpha": 0.0}, {"score": "log_prob", "links": {"hinge": 1.0}}),
    "ipo": ({"loss_type": "ipo", "cpo_alpha": 0.0}, {"score": "mean_log_prob", "links": {"ipo": 1.0}}),
}


def stock_reference_free(out: Path, policy: Path, rows: list, trainer: type, config: type, **fields: Any) -> Any:
    tokenizer = load_tokenizer(policy)
    arguments = {**settings(out, len(rows), **fields), "max_length": 128, "remove_unused_columns": False}
    built = trainer(
        model=load_model(policy, CPU),
        args=config(**arguments),
        train_dataset=Dataset.from_list(text(tokenizer, rows)),
        processing_class=tokenizer,
    )
    batch = next(iter(built.get_train_dataloader()))
    ids = sorted([[t for t in row.tolist() if t != 0] for row in batch["chosen_input_ids"]])
    assert ids == sorted(row["prompt_ids"] + row["chosen_ids"] for row in rows)  # the same ids, or nothing is compared
    return built, batch


@pytest.mark.parametrize("name", CPO)
def test_cpo_trainers_losses(tmp_path, policy, name) -> None:
    fields, term = CPO[name]
    rows = equal_lengths(8)
    objective = pair(**term)
    if fields["cpo_alpha"]:
        objective.terms["sft"] = SftTerm()
    trainer, batch = stock_reference_free(tmp_path, policy, rows, CPOTrainer, CPOConfig, **fields)
    stock = gradients(trainer, batch)
    assert same(ours(tmp_path, policy, policy, rows, objective), stock)
    assert not same(ours(tmp_path, policy, policy, rows, pair(**{**term, "margin": 1.0})), stock)


def test_orpos_odds_term(tmp_path, policy) -> None:
    rows = some_pairs(8)
    trainer, batch = stock_reference_free(tmp_path, policy, rows, ORPOTrainer, ORPOConfig)
    forward = trainer.concatenated_forward(trainer.model, batch)
    loss = -trainer.odds_ratio_loss(forward[0], forward[1])[0].mean()
    loss.backward()
    stock = loss.item(), torch.cat([p.grad.flatten() for _, p in sorted(trainer.model.named_parameters())])
    assert same(ours(tmp_path, policy, policy, rows, pair(weight=B, score="log_odds", beta=1.0)), stock)
    assert not same(ours(tmp_path, policy, policy, rows, pair(weight=B, score="mean_log_prob", beta=1.0)), stock)
    assert math.isfinite(stock[0])
