"""What a stage is, the key it is remembered by, and how two keys differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_loop.code_digest import code_digest
from align_loop.digest import config_digest

_UNSET = object()


@dataclass(frozen=True)
class Artifact:
    """A file or folder by content. ``path`` and ``digest`` are None while it isn't made yet (planning).

    ``name``: the stage that makes it, or the path the user gave; for messages only.
    """

    path: Path | None
    digest: str | None
    name: str = ""


@dataclass(frozen=True)
class Stage:
    """One expensive call. Everything but ``name`` is part of its key.

    ``name``: such as ``iteration-1/sample``, once a run; ``run``: ``module:function`` (see ``stage.py``);
    ``config``: JSON values; ``parts``: dotted names of further functions or classes whose code matters.
    """

    name: str
    run: str
    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Artifact] = field(default_factory=dict)
    parts: Sequence[str] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Components:
    """A stage's key, and what it is made of (as ``differences`` takes it)."""

    key: str
    parts: dict[str, Any]


def components(stage: Stage) -> Components:
    """The key of ``stage`` and what it is made of. Inputs not made yet count as None: such a key is for plans only."""
    digest, code = code_digest([stage.run, *stage.parts])
    parts = {
        "run": stage.run,
        "config": json.loads(json.dumps(stage.config)),  # as another process would read it
        "inputs": {name: artifact.digest for name, artifact in stage.inputs.items()},
        "code": code,
        "seed": stage.seed,
    }
    return Components(config_digest(parts | {"code": digest}), parts)


def not_made(stage: Stage) -> list[str]:
    """The stages that have to run before this one, by name."""
    return list(dict.fromkeys(artifact.name for artifact in stage.inputs.values() if artifact.digest is None))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two keys' components, one phrase each, in the order a person would look.

    Both have ``run``, ``config``, ``inputs`` (name -> digest; None where not made yet, which is no difference),
    ``code`` (file -> digest) and ``seed``. Phrases: ``config.training.learning_rate 3e-05 -> 0.0001``,
    ``input policy changed``, ``code changed: align_loop/trainers/policy.py``, ``seed 0 -> 1``.
    """
    found = _values("run", old["run"], new["run"])
    found += _values("config", old["config"], new["config"])
    found += _digests("input {} {}", old["inputs"], new["inputs"])
    found += _digests("code {1}: {0}", old["code"], new["code"])
    return found + _values("seed", old["seed"], new["seed"])


def _values(where: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {key: (old.get(key, _UNSET), new.get(key, _UNSET)) for key in sorted(old | new)}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = {str(index): pair for index, pair in enumerate(zip(old, new, strict=True))}
    else:
        same = type(old) is type(new) and old == new
        return [] if same else [f"{where} {_short(old)} -> {_short(new)}"]
    return [phrase for key, (a, b) in pairs.items() for phrase in _values(f"{where}.{key}", a, b)]


def _digests(phrase: str, old: Mapping[str, str], new: Mapping[str, str | None]) -> list[str]:
    found = []
    for name in sorted({**old, **new}):
        if name not in old:
            found.append(phrase.format(name, "added"))
        elif name not in new:
            found.append(phrase.format(name, "removed"))
        elif new[name] is not None and new[name] != old[name]:
            found.append(phrase.format(name, "changed"))
    return found


def _short(value: Any, width: int = 48) -> str:
    if value is _UNSET:
        return "(unset)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
