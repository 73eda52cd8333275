"""What something is, by content: digests of configuration, data files and model folders.

A stage's key is made of these digests, so they answer one question: would the stage see a difference?
Names, paths, times and shard sizes make none; a changed weight, row or setting does. (Source code:
``code_digest.py``.) All digests are SHA-256 in hex.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from align_loop.errors import UserError

LARGE_FILE = 1 << 20  # bytes; from here on a file's digest is worth remembering
_CHUNK = 1 << 22

# Not part of what a folder is: written after its digest, prose, measured times, or (training_args.bin) paths.
_EXCLUDED_NAMES = {"manifest.json", "README.md", "train_log.jsonl", "training_args.bin"}
_EXCLUDED_SUFFIXES = (".index.json",)  # which shard holds which tensor
_PICKLED_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt")

# In a model's JSON files: who saved it, from where and with which version. None of it changes the model.
_CANONICAL_JSON = {"config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json"}
_VOLATILE_KEYS = {
    "transformers_version",
    "peft_version",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "is_local",
    "local_files_only",
}
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")
_HEAD_NAMES = ("lm_head.weight", "embed_out.weight")

TensorDigest = tuple[str, tuple[int, ...], str]  # dtype, shape, SHA-256 of the bytes


def config_digest(value: Any) -> str:
    """The digest of a JSON value: independent of the order of keys; floats by their shortest exact form.

    Raises ``TypeError`` for what isn't JSON and ``ValueError`` for NaN or infinity.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class DigestCache:
    """Digests of large files by (device, inode, size, mtime, ctime), so that each is read once.

    ``path`` is the JSON file behind it (None: memory only); ``read_only`` leaves that file as it is.
    Digests of files younger than ``young_seconds`` aren't remembered: a file written to twice within one tick of
    the clock can keep its size and times (git's "racily clean" files).
    Two processes may use one file: it is replaced as a whole, under a lock, after merging.
    """

    def __init__(self, path: Path | None = None, *, read_only: bool = False, young_seconds: float = 2.0):
        self.path, self.read_only, self.young_seconds = path, read_only, young_seconds
        self.entries = _read_json(path) if path is not None else {}

    def remembered(self, file: Path, kind: str, compute: Callable[[Path], Any]) -> Any:
        """``compute(file)``, a JSON value, unless an unchanged ``file`` was computed before under this ``kind``."""
        before = os.stat(file)
        if before.st_size < LARGE_FILE:
            return compute(file)
        key, stamp = f"{kind}:{before.st_dev}:{before.st_ino}", _stamp(before)
        entry = self.entries.get(key)
        if entry is not None and entry[0] == stamp:
            return entry[1]
        value = compute(file)
        if _stamp(os.stat(file)) == stamp and time.time() - before.st_ctime > self.young_seconds:
            self._save(key, [stamp, value])
        return value

    def _save(self, key: str, entry: list[Any]) -> None:
        self.entries[key] = entry
        if self.path is None or self.read_only:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            self.entries = _read_json(self.path) | self.entries
            beside = self.path.with_name(f"{self.path.name}.tmp")
            beside.write_text(json.dumps(self.entries), encoding="utf-8")
            os.replace(beside, self.path)


def _stamp(stat: os.stat_result) -> list[int]:
    # ctime catches an overwrite that sets the old mtime again (rsync -t, cp -p, touch -r).
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # a damaged cache is only a slow one
        return {}


def file_digest(path: Path, cache: DigestCache) -> str:
    """The SHA-256 of a file's bytes, read in chunks."""
    return cache.remembered(path, "bytes", _bytes_digest)


def _bytes_digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def folder_digest(path: Path, cache: DigestCache) -> str:
    """The digest of a folder: its files by sorted relative path, links followed, hidden files left out.

    - ``*.safetensors`` count as sets of tensors (name, dtype, shape, bytes): shards of one model are one set,
      and a tied output head that was saved as well as its embedding is left out.
    - A model's JSON files count without versions and paths (``_VOLATILE_KEYS``).
    - Manifests, READMEs, training logs and shard indexes don't count.

    Raises ``UserError`` for pickled weights without safetensors, and for shards that contradict each other.
    """
    files = dict(folder_files(path))
    _refuse_pickled_weights(path, list(files))
    items: dict[str, str] = {}
    weights: dict[str, dict[str, TensorDigest]] = {}
    for name, file in files.items():
        if name.endswith(".safetensors"):
            _merge_shard(weights.setdefault(_SHARD.sub("", name), {}), file, cache)
        elif file.name in _CANONICAL_JSON:
            items[name] = config_digest(_without_volatile(_model_json(file)))
        else:
            items[name] = file_digest(file, cache)
    for name, tensors in weights.items():
        items[name] = config_digest(_without_tied_head(tensors, files.get(_beside(name, "config.json"))))
    return config_digest(items)


def folder_files(path: Path) -> list[tuple[str, Path]]:
    """(relative POSIX path, file) of all files that are part of a folder's content, sorted."""
    return sorted((file.relative_to(path).as_posix(), file) for file in _walk(path, frozenset()))


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        raise UserError(f"{folder}: this link leads back to a folder that contains it; remove it")
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, above | {real})
        elif not entry.exists():
            raise UserError(f"{entry}: this link leads nowhere; mend or remove it")
        elif entry.name not in _EXCLUDED_NAMES and not entry.name.endswith(_EXCLUDED_SUFFIXES):
            yield entry


def _refuse_pickled_weights(folder: Path, names: Sequence[str]) -> None:
    pickled = [name for name in names if name.endswith(_PICKLED_WEIGHTS)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f'{folder / pickled[0]}: weights must be safetensors; convert once with: python -c "from transformers '
            f"import AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )


def _model_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); mend the file or download it again") from error


def _without_volatile(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_volatile(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _without_volatile(item) for key, item in value.items() if key not in _VOLATILE_KEYS}
    if "torch_dtype" in kept:  # its name before transformers 4.56
        kept.setdefault("dtype", kept.pop("torch_dtype"))
    return kept


def _beside(name: str, other: str) -> str:
    return name.rpartition("/")[0] + "/" + other if "/" in name else other


def _merge_shard(tensors: dict[str, TensorDigest], file: Path, cache: DigestCache) -> None:
    for name, (dtype, shape, digest) in cache.remembered(file, "tensors", _tensor_digests).items():
        entry = (dtype, tuple(shape), digest)
        if tensors.setdefault(name, entry) != entry:
            raise UserError(
                f"{file}: tensor {name} differs from the one of this name in another file beside it; "
                "the folder mixes two models, remove the files of one"
            )


def _without_tied_head(tensors: dict[str, TensorDigest], config: Path | None) -> dict[str, TensorDigest]:
    """``tensors`` without an output head that repeats the input embedding, if ``config`` says they are tied.

    ZeRO-2 writes the head of a tied model, ``save_pretrained`` doesn't; both load as the same model.
    """
    settings = _model_json(config) if config is not None else {}
    text_settings = settings.get("text_config") or {}
    if not settings.get("tie_word_embeddings", text_settings.get("tie_word_embeddings", False)):
        return tensors
    heads = {name for name in tensors if name.endswith(_HEAD_NAMES)}
    others = {entry for name, entry in tensors.items() if name not in heads}
    return {name: entry for name, entry in tensors.items() if name not in heads or entry not in others}


def _tensor_digests(file: Path) -> dict[str, list[Any]]:
    """Name -> [dtype, shape, SHA-256 of the bytes] of each tensor of a safetensors file.

    Reads the format itself (8 bytes of header length, a JSON header, the data): it needs no torch, keeps
    dtypes that numpy lacks (bfloat16, float8), and holds one chunk in memory instead of one tensor.
    """
    with open(file, "rb") as handle:
        try:
            length = int.from_bytes(handle.read(8), "little")
            if length > os.fstat(handle.fileno()).st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            return {
                name: [entry["dtype"], entry["shape"], _range_digest(handle, 8 + length, *entry["data_offsets"])]
                for name, entry in sorted(header.items())
            }
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); save or download it again") from error


def _range_digest(handle: BinaryIO, base: int, start: int, end: int) -> str:
    digest = hashlib.sha256()
    handle.seek(base + start)
    left = end - start
    while left:
        chunk = handle.read(min(_CHUNK, left))
        if not chunk:
            raise ValueError("the data end early")
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()
