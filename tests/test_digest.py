"""Digests of configuration, files and folders: equal for the same content, different for any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from align_loop import digest
from align_loop.digest import DigestCache, config_digest, file_digest, folder_digest
from align_loop.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (8, 4), "model.a.weight": (4, 4), "model.b.weight": (4, 4)}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def save_model(folder: Path, weights: dict[str, np.ndarray], config: dict | None = None) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True} | (config or {})))
    return folder


def of(folder: Path) -> str:
    return folder_digest(folder, DigestCache())


@given(JSON)
def test_config_digest_survives_a_json_round_trip_and_reordering(value):
    def reordered(item):
        if isinstance(item, dict):
            return {key: reordered(item[key]) for key in reversed(item)}
        return [reordered(inner) for inner in item] if isinstance(item, list) else item

    assert config_digest(json.loads(json.dumps(reordered(value)))) == config_digest(value)


def test_config_digest_tells_close_values_apart():
    values = [3e-5, 3.0000000000000004e-5, 1, 1.0, "1", True, None, [1], {"a": 1}, {"a": [1]}]
    assert len({config_digest(value) for value in values}) == len(values)
    with pytest.raises(ValueError, match="JSON"):
        config_digest(float("nan"))
    with pytest.raises(TypeError):
        config_digest(Path("x"))


def test_folder_digest_changes_with_every_kind_of_content(tmp_path):
    base = save_model(tmp_path / "base", tensors())
    weights = tensors()
    changed = dict(weights, **{"model.a.weight": weights["model.a.weight"] + 1})
    renamed = {name.replace(".a.", ".c."): array for name, array in weights.items()}
    reshaped = dict(weights, **{"model.a.weight": weights["model.a.weight"].reshape(2, 8)})
    retyped = dict(weights, **{"model.a.weight": weights["model.a.weight"].view(np.int32)})
    swapped = dict(
        weights, **{"model.a.weight": weights["model.b.weight"], "model.b.weight": weights["model.a.weight"]}
    )
    variants = [changed, renamed, reshaped, retyped, swapped]
    seen = {of(base)} | {of(save_model(tmp_path / str(i), variant)) for i, variant in enumerate(variants)}
    seen.add(of(save_model(tmp_path / "config", weights, {"rope_theta": 1.0})))
    (base / "tokenizer.json").write_text("{}")
    seen.add(of(base))
    (base / "tokenizer.json").rename(base / "merges.txt")
    seen.add(of(base))
    assert len(seen) == len(variants) + 4


def test_folder_digest_ignores_what_is_not_content(tmp_path):
    base = save_model(tmp_path / "base", tensors())
    before = of(base)
    config = {"_name_or_path": "/elsewhere", "transformers_version": "4.40", "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config, indent=4))
    for name in ("manifest.json", "README.md", "train_log.jsonl", "training_args.bin", ".gitattributes"):
        (base / name).write_text("anything")
    save_file(tensors(), base / "model.safetensors", metadata={"format": "pt"})
    moved = tmp_path / "deeper" / "moved"
    moved.parent.mkdir()
    shutil.move(base, moved)
    assert of(moved) == before


def test_dtype_keeps_its_meaning_under_its_old_name(tmp_path):
    old = save_model(tmp_path / "old", tensors(), {"torch_dtype": "bfloat16"})
    new = save_model(tmp_path / "new", tensors(), {"dtype": "bfloat16"})
    other = save_model(tmp_path / "other", tensors(), {"dtype": "float32"})
    assert of(old) == of(new) != of(other)


def test_resharding_keeps_the_digest_and_a_moved_tensor_name_does_not_hide(tmp_path):
    whole = save_model(tmp_path / "whole", tensors())
    sharded = save_model(tmp_path / "sharded", tensors())
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors())
    for i, part in enumerate((names[:1], names[1:]), start=1):
        save_file({name: tensors()[name] for name in part}, sharded / f"model-0000{i}-of-00002.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    assert of(sharded) == of(whole)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert of(sharded) != of(whole)


def test_contradicting_shards_are_refused(tmp_path):
    folder = save_model(tmp_path / "model", tensors())
    stale = {"model.a.weight": np.zeros((4, 4), np.float32)}
    save_file(stale, folder / "model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match=r"model\.a\.weight.*two models"):
        of(folder)


def test_saved_tied_head_counts_only_when_it_is_not_tied(tmp_path):
    weights = tensors()
    with_head = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    other_head = weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}
    plain = of(save_model(tmp_path / "plain", weights))
    assert of(save_model(tmp_path / "head", with_head)) == plain
    assert of(save_model(tmp_path / "other", other_head)) != plain
    untied = {"tie_word_embeddings": False}
    assert of(save_model(tmp_path / "u1", with_head, untied)) != of(save_model(tmp_path / "u2", weights, untied))


def test_a_real_tied_llama_resharded_and_with_its_head_saved(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert of(tmp_path / "one") == of(tmp_path / "many")

    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    weights = load_torch(tmp_path / "one" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()  # as ZeRO-2 saves it
    before = of(tmp_path / "one")
    save_torch(weights, tmp_path / "one" / "model.safetensors")
    assert of(tmp_path / "one") == before
    weights["model.norm.weight"][0] += 1
    save_torch(weights, tmp_path / "one" / "model.safetensors")
    assert of(tmp_path / "one") != before


def test_damaged_safetensors_and_pickled_weights_are_named(tmp_path):
    folder = save_model(tmp_path / "model", tensors())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
        of(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: weights must be safetensors; convert"):
        of(folder)


def test_links_are_followed_and_circles_refused(tmp_path):
    blobs = save_model(tmp_path / "blobs", tensors())
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert of(snapshot) == of(blobs)
    (snapshot / "again").symlink_to(snapshot)
    with pytest.raises(UserError, match="leads back"):
        of(snapshot)
    (snapshot / "again").unlink()
    (snapshot / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="leads nowhere"):
        of(snapshot)


def data_file(folder: Path) -> Path:
    file = folder / "data.parquet"
    file.write_bytes(os.urandom(digest.LARGE_FILE))
    return file


def test_large_files_are_read_once_and_again_after_any_change(tmp_path):
    file = data_file(tmp_path)
    cache = DigestCache(tmp_path / "digests.json", young_seconds=-1)
    reads = []

    def read(path: Path) -> str:
        reads.append(path)
        return digest._bytes_digest(path)

    first = cache.remembered(file, "bytes", read)
    assert DigestCache(tmp_path / "digests.json", young_seconds=-1).remembered(file, "bytes", read) == first
    assert len(reads) == 1
    stat = os.stat(file)
    with open(file, "r+b") as handle:
        handle.write(bytes(64))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # in place, same size, same mtime
    assert DigestCache(tmp_path / "digests.json", young_seconds=-1).remembered(file, "bytes", read) != first
    assert len(reads) == 2


def test_young_files_are_not_remembered(tmp_path):
    file = data_file(tmp_path)
    file_digest(file, DigestCache(tmp_path / "digests.json"))
    assert not (tmp_path / "digests.json").exists()


def test_read_only_cache_writes_nothing_and_a_damaged_one_is_empty(tmp_path):
    file = data_file(tmp_path)
    file_digest(file, DigestCache(tmp_path / "digests.json", read_only=True, young_seconds=-1))
    assert os.listdir(tmp_path) == ["data.parquet"]
    (tmp_path / "digests.json").write_text("{")
    assert DigestCache(tmp_path / "digests.json").entries == {}


def test_two_processes_lose_no_entries(tmp_path):
    script = (
        "import sys; from pathlib import Path; from align_loop.digest import DigestCache\n"
        "cache = DigestCache(Path(sys.argv[1]))\n"
        "for i in range(40): cache._save(f'{sys.argv[2]}{i}', [[0], i])\n"
    )
    path = tmp_path / "digests.json"
    workers = [subprocess.Popen([sys.executable, "-c", script, str(path), name]) for name in "ab"]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert len(DigestCache(path).entries) == 80


def test_tensor_digests_read_the_format_as_the_library_does(tmp_path):
    save_model(tmp_path / "model", tensors())
    file = tmp_path / "model" / "model.safetensors"
    found = digest._tensor_digests(file)
    expected = load_file(file)
    assert set(found) == set(expected)
    for name, (dtype, shape, value) in found.items():
        assert dtype == "F32" and tuple(shape) == expected[name].shape
        assert value == digest.hashlib.sha256(expected[name].tobytes()).hexdigest()
