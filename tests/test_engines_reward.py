"""Scores of answers: the same alone and in any batch, ensembles, vector heads, folders that hold no reward model."""

from __future__ import annotations

import json
import random
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from reward_fixtures import sides, toy_pairs, train
from tiny import tiny_llama
from transformers import AutoModelForSequenceClassification

from align_loop.engines.reward_folder import is_reward_model, read_reward_folder
from align_loop.engines.reward_scoring import (
    TOLERANCE,
    last_scores,
    load_reward_model,
    member_vectors,
    preference_matrix,
    reward_scores,
    scalar_scores,
)
from align_loop.errors import UserError
from align_loop.trainers.reward_config import RewardModel

OPTIONS = {"dtype": "float32", "device": "cpu"}
SEQUENCES = sides(toy_pairs(9, seed=4))
GROUPS = [f"p{i // 4}" for i in range(18)]  # four, four, four, four, two


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), seed=0)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    kinds = {"one": RewardModel(), "three": RewardModel(members=3), "gpm": RewardModel(head="gpm", dim=4, members=2)}
    for name, kind in kinds.items():
        train(out / name, base, toy_pairs(8), reward_model=kind)
    return {name: out / name for name in kinds}


@torch.no_grad()
def one_by_one(folder: Path) -> torch.Tensor:
    """The reference: transformers' own reading, no padding, no batch."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return torch.cat([model(torch.tensor([prompt + answer])).logits for prompt, answer in SEQUENCES])


@pytest.mark.parametrize("token_budget", [1, 60, 100_000])
@pytest.mark.parametrize("name", ["one", "gpm"])
def test_scores_equal_those_of_each_sequence_alone(folders, name, token_budget) -> None:
    found = member_vectors(folders[name], SEQUENCES, token_budget=token_budget, **OPTIONS)
    members = read_reward_folder(folders[name]).members
    assert found.shape[:2] == (len(members), 18)
    for values, member in zip(found, members, strict=True):
        assert torch.allclose(values, one_by_one(member), atol=TOLERANCE["float32"])


def test_order_and_company_do_not_matter(folders) -> None:
    plain, _ = reward_scores(folders["one"], SEQUENCES, token_budget=90, **OPTIONS)
    order = random.Random(1).sample(range(18), 18)
    mixed, _ = reward_scores(folders["one"], [SEQUENCES[i] for i in order], token_budget=50, **OPTIONS)
    assert mixed == pytest.approx([plain[i] for i in order], abs=TOLERANCE["float32"])
    few, _ = reward_scores(folders["one"], SEQUENCES[:3], **OPTIONS)
    assert few == pytest.approx(plain[:3], abs=TOLERANCE["float32"]) and max(plain) - min(plain) > 0.1


def test_the_score_is_read_at_the_last_token_whatever_fills_up(folders) -> None:
    """Padding ids of any kind, and an answer that itself ends with the padding id."""
    model = load_reward_model(folders["one"] / "model", "float32", "cpu")
    rows = [[1, 20, 30, 2], [1, 20, 30, 40, 50, 60, 0]]
    with torch.no_grad():
        alone = [last_scores(model, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in rows]
        for pad in (0, 2, 33):
            ids = torch.tensor([rows[0] + [pad] * 3, rows[1]])
            mask = torch.tensor([[1] * 4 + [0] * 3, [1] * 7])
            assert torch.allclose(last_scores(model, ids, mask), torch.cat(alone), atol=1e-5)
        cut = last_scores(model, torch.tensor([rows[1][:-1]]), torch.ones(1, 6, dtype=torch.long))
        assert not torch.allclose(alone[1], cut, atol=1e-3)
    assert not model.score._forward_hooks


def test_an_ensemble_gives_mean_and_deviation(folders) -> None:
    members = [one_by_one(path)[:, 0].tolist() for path in read_reward_folder(folders["three"]).members]
    means, deviations = reward_scores(folders["three"], SEQUENCES, **OPTIONS)
    assert means == pytest.approx([statistics.fmean(c) for c in zip(*members, strict=True)], abs=1e-4)
    assert deviations == pytest.approx([statistics.stdev(c) for c in zip(*members, strict=True)], abs=1e-4)
    assert min(deviations) > 1e-3
    assert reward_scores(folders["one"], SEQUENCES, **OPTIONS)[1] == [None] * 18


def test_a_members_own_level_is_no_disagreement(folders, monkeypatch) -> None:
    from align_loop.engines import reward_scoring

    vectors = member_vectors(folders["three"], SEQUENCES, **OPTIONS)
    shifted = vectors + torch.tensor([0.0, 5.0, -3.0])[:, None, None]
    found = []
    for values in (vectors, shifted):
        monkeypatch.setattr(reward_scoring, "member_vectors", lambda *_, _v=values, **__: _v)
        found.append(reward_scores(folders["three"], SEQUENCES, groups=GROUPS, **OPTIONS)[1])
    assert found[0] == pytest.approx(found[1], abs=1e-5) and max(found[0]) > 1e-3
    relative = vectors[:, 16:, 0] - vectors[:, 16:, 0].mean(dim=1, keepdim=True)
    assert found[0][16:] == pytest.approx(relative.std(dim=0).tolist(), abs=1e-5)
    lone = reward_scores(folders["three"], SEQUENCES, groups=[*GROUPS[:17], "alone"], **OPTIONS)[1]
    assert lone[16:] == [None, None] and None not in lone[:16]


def test_the_preference_matrix_is_skew_symmetric_and_scores_are_its_row_means(folders) -> None:
    vectors = member_vectors(folders["gpm"], SEQUENCES, **OPTIONS)[0]
    group = vectors[:4]
    matrix = preference_matrix(group, "gpm")
    for i in range(4):
        for j in range(4):
            a, b = group[i].tolist(), group[j].tolist()
            by_hand = a[1] * b[0] - a[0] * b[1] + a[3] * b[2] - a[2] * b[3]
            assert matrix[i, j].item() == pytest.approx(by_hand, abs=1e-5)
    assert torch.allclose(matrix, -matrix.T, atol=1e-6) and matrix.abs().max() > 1e-3
    scores = scalar_scores(vectors, "gpm", GROUPS)
    assert torch.allclose(scores[:4], matrix.sum(1) / 3, atol=1e-6)
    assert scores[16].item() == pytest.approx(-scores[17].item(), abs=1e-6)
    assert scalar_scores(vectors[:1], "gpm", ["alone"]).tolist() == [0]
    scalar = preference_matrix(torch.tensor([[1.0], [3.0]]), "scalar")
    assert scalar.tolist() == [[0, -2], [2, 0]]


def test_a_vector_head_needs_groups(folders) -> None:
    with pytest.raises(ValueError, match="groups"):
        reward_scores(folders["gpm"], SEQUENCES, **OPTIONS)
    means, deviations = reward_scores(folders["gpm"], SEQUENCES, groups=GROUPS, **OPTIONS)
    assert len(means) == len(deviations) == 18 and None not in deviations


def test_progress_counts_every_sequence_of_every_member(folders) -> None:
    done = []
    reward_scores(folders["three"], SEQUENCES, token_budget=60, on_done=done.append, **OPTIONS)
    assert sum(done) == 3 * 18 and len(done) > 6
    assert reward_scores(folders["one"], [], **OPTIONS) == ([], [])


def test_sequences_without_a_score_are_named(folders) -> None:
    with pytest.raises(UserError, match="sequence 1: prompt and answer have 301 tokens, the reward model takes 256"):
        reward_scores(folders["one"], [([7], [8]), ([7], [8] * 300)], **OPTIONS)
    with pytest.raises(UserError, match="answer x: an answer without tokens"):
        reward_scores(folders["one"], [([7], [])], names=["answer x"], **OPTIONS)


def test_a_plain_classification_folder_with_one_label_is_a_reward_model(folders) -> None:
    plain = folders["one"] / "model"
    assert is_reward_model(plain) and read_reward_folder(plain).members == [plain]
    assert reward_scores(plain, SEQUENCES, **OPTIONS) == reward_scores(folders["one"], SEQUENCES, **OPTIONS)


def test_what_is_no_reward_model_is_refused(tmp_path, base, folders) -> None:
    assert not is_reward_model(base)
    with pytest.raises(UserError, match="no reward model"):
        read_reward_folder(base)
    with pytest.raises(UserError, match="lack score.weight"):
        load_reward_model(base, "float32", "cpu")
    with pytest.raises(UserError, match="4 labels and no reward_model.json"):
        read_reward_folder(folders["gpm"] / "member-1")
    shutil.copytree(folders["three"], tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "member-2")
    with pytest.raises(UserError, match="its member member-2 is not there"):
        read_reward_folder(tmp_path / "broken")
    shutil.copytree(folders["gpm"], tmp_path / "other")
    note = tmp_path / "other" / "reward_model.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"dim": 2}))
    with pytest.raises(UserError, match="a head of 4 numbers where 2 were announced"):
        member_vectors(tmp_path / "other", SEQUENCES, **OPTIONS)


def test_bfloat16_scores_stay_within_their_tolerance(folders) -> None:
    options = {"dtype": "bfloat16", "device": "cpu"}
    found = [member_vectors(folders["one"], SEQUENCES, token_budget=b, **options) for b in (1, 60, 100_000)]
    assert all((f - found[0]).abs().max() < TOLERANCE["bfloat16"] for f in found)
