"""The judge by a reward model: scores of answers, the length penalty, ensembles, vector heads, a foreign tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from reward_fixtures import toy_pairs, train
from tiny import tiny_llama, tiny_tokenizer

from align_loop.annotators.job import Job
from align_loop.annotators.reward_model import RewardModelScore
from align_loop.annotators.stage import annotate
from align_loop.engines.reward_scoring import reward_scores
from align_loop.errors import UserError
from align_loop.parts import node_of
from align_loop.record import ANSWERS, PROMPTS, read_rows, write_table
from align_loop.stage import StageContext
from align_loop.trainers.reward_config import RewardModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    base = tiny_llama(out / "base", seed=0)
    kinds = {"one": RewardModel(), "two": RewardModel(members=2), "gpm": RewardModel(head="gpm", dim=2)}
    for name, kind in kinds.items():
        train(out / name, base, toy_pairs(8), reward_model=kind)
    return {name: out / name for name in kinds}


def made_answers() -> list[dict]:
    """Four answers to each of five prompts."""
    tokenizer = tiny_tokenizer()
    pairs = toy_pairs(10, seed=3)
    answers = [(row, row[side]) for row in pairs for side in ("chosen_ids", "rejected_ids")]
    return [
        {
            "sample_id": f"s{number}",
            "prompt_id": row["prompt_id"],
            "k": number % 4,
            "text": tokenizer.decode(ids, skip_special_tokens=True),
            "prompt_token_ids": row["prompt_ids"],
            "token_ids": ids,
            "finish_reason": "stop",
        }
        for number, (row, ids) in enumerate(answers)
    ]


def score(folder: Path, rows: list[dict], out: Path, budget: int = 16384, **fields) -> tuple[list[dict], StageContext]:
    context = StageContext("annotate", out, hardware={"device": "cpu", "score_token_budget": budget}, quiet=True)
    job = Job([], rows, {"reward_model": folder}, "float32", 0, context)
    return RewardModelScore(**fields).annotate(job).scores, context


def test_the_reward_is_the_score_less_the_penalty(folders, tmp_path) -> None:
    rows = made_answers()
    plain, context = score(folders["one"], rows, tmp_path)
    sequences = [(row["prompt_token_ids"], row["token_ids"]) for row in rows]
    expected, _ = reward_scores(folders["one"], sequences, dtype="float32", device="cpu")
    assert [r["reward"] for r in plain] == pytest.approx(expected, abs=1e-5)
    assert [r["tokens"] for r in plain] == [len(row["token_ids"]) for row in rows]
    assert {r["reward_sd"] for r in plain} == {None} and context.report["tokens"] == sum(
        len(p + a) for p, a in sequences
    )
    short, _ = score(folders["one"], rows, tmp_path, length_penalty=0.1)
    assert [r["reward"] for r in short] == pytest.approx([r["reward"] - 0.1 * r["tokens"] for r in plain])
    small, _ = score(folders["one"], rows[::-1], tmp_path, budget=40)
    assert [r["reward"] for r in small[::-1]] == pytest.approx(expected, abs=1e-4)


def test_an_ensemble_says_how_sure_it_is(folders, tmp_path) -> None:
    scored, context = score(folders["two"], made_answers(), tmp_path)
    assert all(row["reward_sd"] > 0 for row in scored)
    members = [score(folders["two"] / f"member-{k}", made_answers(), tmp_path)[0] for k in (1, 2)]
    means = [(a["reward"] + b["reward"]) / 2 for a, b in zip(*members, strict=True)]
    assert [row["reward"] for row in scored] == pytest.approx(means, abs=1e-5)
    assert context.report["tokens"] == 2 * sum(len(r["prompt_token_ids"]) + len(r["token_ids"]) for r in made_answers())


def test_a_vector_head_compares_within_the_prompt(folders, tmp_path) -> None:
    scored, _ = score(folders["gpm"], made_answers(), tmp_path)
    for prompt in {row["prompt_id"] for row in scored}:
        rewards = [row["reward"] for row in scored if row["prompt_id"] == prompt]
        assert sum(rewards) == pytest.approx(0, abs=1e-5) and max(rewards) > 1e-4  # what one wins the others lose


def test_the_stage_writes_scores(folders, tmp_path) -> None:
    (tmp_path / "sample").mkdir()
    (tmp_path / "out").mkdir()
    write_table(tmp_path / "sample" / "answers.parquet", made_answers(), ANSWERS)
    write_table(tmp_path / "prompts.parquet", [], PROMPTS)
    inputs = {"answers": tmp_path / "sample", "prompts": tmp_path / "prompts.parquet", "reward_model": folders["two"]}
    context = StageContext("annotate", tmp_path / "out", hardware={"device": "cpu"}, quiet=True)
    annotate({"annotator": node_of(RewardModelScore()), "dtype": "float32", "seed": 0}, inputs, context)
    rows = read_rows(tmp_path / "out" / "scores.parquet")
    assert [r["sample_id"] for r in rows] == [f"s{k}" for k in range(20)]
    assert all(r["reward_sd"] > 0 and r["logp_policy"] is None for r in rows)


def test_the_role_is_asked_for_by_name() -> None:
    assert RewardModelScore().roles() == {"reward_model": "reward_model"}
    assert RewardModelScore(reward_model="/models/rm").roles() == {"reward_model": "/models/rm"}
    with pytest.raises(ValueError, match="annotator.length_penalty=nan"):
        RewardModelScore(length_penalty=float("nan"))


def test_ids_of_another_tokenizer_are_refused(folders, tmp_path) -> None:
    rows = made_answers()
    rows[7]["text"] = "something else"
    with pytest.raises(UserError, match="reads answer s7 as another text"):
        score(folders["one"], rows, tmp_path)
    rows[7]["text"] = None  # not known
    assert len(score(folders["one"], rows, tmp_path)[0]) == 20
    rows[3]["token_ids"], rows[3]["text"] = [], ""
    with pytest.raises(UserError, match="answer s3: an answer without tokens"):
        score(folders["one"], rows, tmp_path)
