"""What lies in a reward model's folder: ``reward_model.json`` names its head and the folders of its members.

A member is a plain Hugging Face sequence-classification folder. Such a folder alone, with one label, is a scalar
reward model too, so public ones work as they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from align_loop.durable import write_json
from align_loop.errors import UserError

FILE = "reward_model.json"


@dataclass(frozen=True)
class RewardFolder:
    """``head``: scalar or gpm; ``dim``: numbers an answer gets; ``members``: one model folder each."""

    head: str
    dim: int
    members: list[Path]


def write_reward_folder(folder: Path, head: str, dim: int, members: list[str]) -> None:
    """Write ``reward_model.json``; ``members``: names of folders in ``folder``."""
    write_json(folder / FILE, {"head": head, "dim": dim, "members": members})


def read_reward_folder(folder: str | Path) -> RewardFolder:
    """The reward model in ``folder``; ``UserError`` where there is none."""
    folder = Path(folder)
    if (folder / FILE).is_file():
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        members = [folder / name for name in found["members"]]
        if missing := [path for path in members if not (path / "config.json").is_file()]:
            raise UserError(f"{folder / FILE}: its member {missing[0].name} is not there: copy the folder whole")
        return RewardFolder(found["head"], found["dim"], members)
    if not is_reward_model(folder):
        raise UserError(f"{folder}: no reward model: neither {FILE} nor a sequence-classification config.json in it")
    labels = _config(folder).get("id2label") or {"0": "", "1": ""}  # not written where there are two
    if len(labels) != 1:
        raise UserError(f"{folder}: {len(labels)} labels and no {FILE}: name the folder above, or a model with one")
    return RewardFolder("scalar", 1, [folder])


def is_reward_model(folder: str | Path) -> bool:
    """Whether ``folder`` holds a reward model (and not, say, a language model)."""
    folder = Path(folder)
    names = _config(folder).get("architectures") or []
    return (folder / FILE).is_file() or any(name.endswith("ForSequenceClassification") for name in names)


def _config(folder: Path) -> dict:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
