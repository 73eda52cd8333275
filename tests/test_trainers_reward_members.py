"""Ensembles and folds, training that goes on from a reward model, the stage, and what each field changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reward_fixtures import CPU, margins, toy_pairs, train, weights
from tiny import tiny_llama

from align_loop.engines.reward_folder import read_reward_folder
from align_loop.errors import UserError
from align_loop.parts import build, node_of, plain
from align_loop.record import EXAMPLES, write_table
from align_loop.stage import StageContext
from align_loop.trainers import reward as training_of
from align_loop.trainers.config import TrainingConfig
from align_loop.trainers.reward_config import RewardModel
from align_loop.trainers.reward_data import fold_of_prompts, member_examples, member_seed
from align_loop.trainers.stage import reward

FOLDS = RewardModel(members=3, member_data="folds")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), seed=0)


@pytest.fixture(scope="module")
def ensemble(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three members on folds of 24 pairs."""
    out = tmp_path_factory.mktemp("ensemble")
    train(out, base, toy_pairs(24), reward_model=FOLDS)
    return out


def test_no_member_sees_its_fold(tmp_path, base, monkeypatch) -> None:
    seen = []
    real = training_of.build_trainer

    def spy(**arguments):
        seen.append(arguments["examples"])
        return real(**arguments)

    monkeypatch.setattr(training_of, "build_trainer", spy)
    examples = toy_pairs(24)
    context = train(tmp_path, base, examples, reward_model=FOLDS)
    prompts = {row["prompt_id"] for row in examples}
    left_out = [prompts - {row["prompt_id"] for row in rows} for rows in seen]
    assert set.union(*left_out) == prompts and sum(map(len, left_out)) == len(prompts) == 12  # each out exactly once
    assert [len(rows) for rows in seen] == context.report["facts"]["member_pairs"] == [16, 16, 16]
    folds = fold_of_prompts(examples, 3)
    assert all({folds[p] for p in out} == {k + 1} for k, out in enumerate(left_out))


def test_folds_are_the_same_in_any_order_and_keep_a_prompt_together() -> None:
    examples = toy_pairs(50)
    folds = fold_of_prompts(examples, 4)
    assert folds == fold_of_prompts(examples[::-1], 4) and len(folds) == 25
    counts = [list(folds.values()).count(k) for k in (1, 2, 3, 4)]
    assert sum(counts) == 25 and max(counts) - min(counts) <= 1
    bare = [{"example_id": row["example_id"]} for row in examples]
    assert len(fold_of_prompts(bare, 4)) == 50  # rows without a prompt id stand alone
    with pytest.raises(UserError, match="members=30 folds of 25 prompts"):
        fold_of_prompts(examples, 30)
    assert member_examples(examples, RewardModel(members=4), 2) is examples


def test_members_on_all_data_differ_by_their_seed_alone(tmp_path, base) -> None:
    context = train(tmp_path / "two", base, toy_pairs(16), reward_model=RewardModel(members=2))
    train(tmp_path / "one", base, toy_pairs(16))
    first, second = (weights(tmp_path / "two" / f"member-{k}") for k in (1, 2))
    assert torch.equal(first, weights(tmp_path / "one" / "model")) and not torch.equal(first, second)
    train(tmp_path / "other", base, toy_pairs(16), seed=member_seed(5, 2))
    assert torch.equal(second, weights(tmp_path / "other" / "model"))
    assert context.report["facts"]["member_pairs"] == [16, 16]
    log = [json.loads(line) for line in (tmp_path / "two" / "train_log.jsonl").read_text().splitlines()]
    assert [(e["member"], e["step"]) for e in log] == [(1, 1), (1, 2), (2, 3), (2, 4)]


def test_member_seeds_are_unrelated() -> None:
    seeds = [member_seed(s, k) for s in (0, 1, 2) for k in (1, 2, 3, 4)]
    assert len(set(seeds)) == len(seeds) and seeds[0] == 0 and all(0 <= s < 2**31 for s in seeds)


def test_the_folder_says_what_it_holds(ensemble) -> None:
    found = read_reward_folder(ensemble)
    assert (found.head, found.dim, [m.name for m in found.members]) == (
        "scalar",
        1,
        ["member-1", "member-2", "member-3"],
    )
    assert margins(ensemble, toy_pairs(4, seed=2)).shape == (3, 4)


def test_a_reward_model_goes_on_from_where_it_was(tmp_path, base) -> None:
    examples = toy_pairs(24)
    train(tmp_path / "first", base, examples)
    before = margins(tmp_path / "first", examples)[0]
    training = TrainingConfig(learning_rate=1e-4, epochs=1, batch_size=24)
    context = train(tmp_path / "second", tmp_path / "first", examples, training=training)
    (entry,) = [json.loads(line) for line in (tmp_path / "second" / "train_log.jsonl").read_text().splitlines()]
    assert entry["loss"] == pytest.approx(torch.nn.functional.softplus(-before).mean().item(), rel=1e-4)
    assert context.report["facts"]["start"] == "previous"
    plain_folder = train(tmp_path / "third", tmp_path / "first" / "model", examples, training=training)
    assert plain_folder.report["facts"]["start"] == "previous"
    assert torch.equal(*(weights(tmp_path / name / "model") for name in ("second", "third")))
    fresh = train(tmp_path / "fresh", base, examples, training=training)
    assert fresh.report["facts"]["start"] == "base"
    assert json.loads((tmp_path / "fresh" / "train_log.jsonl").read_text())["loss"] != pytest.approx(entry["loss"])


def test_members_go_on_from_their_own_member(tmp_path, base, ensemble) -> None:
    slow = TrainingConfig(learning_rate=1e-9, epochs=1, batch_size=8)
    train(tmp_path / "same", ensemble, toy_pairs(9), reward_model=FOLDS, training=slow)
    for k in (1, 2, 3):
        gap = (weights(tmp_path / "same" / f"member-{k}") - weights(ensemble / f"member-{k}")).abs().max()
        assert gap < 1e-6
    train(tmp_path / "single", base, toy_pairs(4))
    train(tmp_path / "more", tmp_path / "single", toy_pairs(4), reward_model=RewardModel(members=2), training=slow)
    gap = (weights(tmp_path / "more" / "member-2") - weights(tmp_path / "single" / "model")).abs().max()
    assert gap < 1e-6


def test_a_start_that_does_not_fit_is_refused(tmp_path, ensemble) -> None:
    with pytest.raises(UserError, match="head=scalar, dim=1 can't go on as head=gpm, dim=2"):
        train(tmp_path, ensemble, toy_pairs(8), reward_model=RewardModel(head="gpm", dim=2))
    with pytest.raises(UserError, match="3 members can't go on as members=2"):
        train(tmp_path, ensemble, toy_pairs(8), reward_model=RewardModel(members=2))


# --- the stage ----------------------------------------------------------------------------------------------------


def run_stage(out: Path, inputs: dict[str, Path], reward_model: RewardModel = RewardModel()) -> StageContext:  # noqa: B008
    out.mkdir()
    context = StageContext("reward", out, hardware={"device": "cpu", "threads": 1}, quiet=True)
    training = plain(TrainingConfig(learning_rate=2e-3, batch_size=8))
    config = {"training": training, "reward_model": node_of(reward_model), "lora": None, "dtype": "float32", "seed": 5}
    reward(config, inputs, context)
    return context


def table(folder: Path, rows: list[dict]) -> Path:
    write_table(folder / "examples.parquet", rows, EXAMPLES)
    return folder


def test_the_stage_puts_tables_together(tmp_path, base) -> None:
    human, made = table(tmp_path / "human", toy_pairs(12)), table(tmp_path / "made", toy_pairs(10, seed=1))
    inputs = {"model": base, "pairs": human, "pairs-synthetic": made}
    context = run_stage(tmp_path / "both", inputs)
    assert context.report["rows"]["pairs"] == {"in": 22, "out": 22, "dropped": {}}
    train(tmp_path / "by-hand", base, toy_pairs(12) + toy_pairs(10, seed=1), hardware=CPU)
    assert torch.equal(weights(tmp_path / "both" / "model"), weights(tmp_path / "by-hand" / "model"))
    assert read_reward_folder(tmp_path / "both").members == [tmp_path / "both" / "model"]
    with pytest.raises(UserError, match="needs an input named pairs; there are model"):
        run_stage(tmp_path / "none", {"model": base})


def test_a_start_from_the_base_is_one(tmp_path, base) -> None:
    inputs = {"model": base, "pairs": table(tmp_path / "pairs", toy_pairs(8))}
    run_stage(tmp_path / "first", inputs, RewardModel(start="previous"))  # the first round has none before
    again = inputs | {"model": tmp_path / "first"}
    with pytest.raises(UserError, match="start=base, but .* is a reward model"):
        run_stage(tmp_path / "second", again)
    assert run_stage(tmp_path / "third", again, RewardModel(start="previous")).report["facts"]["start"] == "previous"


# --- the fields ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"smoothing": 0.1},
        {"centring": 0.05},
        {"head": "gpm", "dim": 2},
        {"head": "gpm", "dim": 4},
        {"members": 2},
        {"members": 2, "member_data": "folds"},
    ],
    ids=str,
)
def test_every_field_changes_what_is_computed(tmp_path, base, changes) -> None:
    """``start`` is tested above."""
    found = []
    for name, fields in (("plain", {}), ("changed", changes)):
        train(tmp_path / name, base, toy_pairs(8), reward_model=RewardModel(**fields))
        found.append(margins(tmp_path / name, toy_pairs(8, seed=3)))
    assert found[0].shape != found[1].shape or not torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dim": 2}, "dim must be 1 for head=scalar"),
        ({"head": "gpm"}, "dim must be an even number"),
        ({"head": "gpm", "dim": 3}, "dim must be an even number"),
        ({"head": "vector"}, "head must be scalar or gpm"),
        ({"smoothing": 0.5}, "smoothing must be in"),
        ({"centring": -1.0}, "centring must be 0 or more"),
        ({"centring": float("nan")}, "centring must be 0 or more"),
        ({"head": "gpm", "dim": 2, "centring": 0.1}, "centring must be 0 for head=gpm"),
        ({"members": 0}, "members must be at least 1"),
        ({"member_data": "folds"}, "member_data must be seeds where members=1"),
        ({"start": "initial"}, "start must be base or previous"),
    ],
)
def test_wrong_fields_are_named(fields, said) -> None:
    with pytest.raises(ValueError, match=f"RewardModel.{said}"):
        RewardModel(**fields)


def test_wrong_fields_are_named_by_their_key() -> None:
    with pytest.raises(UserError, match="reward_model.smoothing must be in"):
        build(RewardModel, {"smoothing": 0.7}, "reward_model")
    with pytest.raises(UserError, match="reward_model.head=vector"):
        build(RewardModel, {"head": "vector"}, "reward_model")
