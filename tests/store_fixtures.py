"""A module of stage functions, a store and small questions about both, for the store's tests."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest

from align_loop.launch import inline
from align_loop.store import Stage, Store

STAGES = '''
import time
from pathlib import Path
from align_loop.errors import UserError
from align_loop.stage import RowsLost

FACTOR = 2
ERRORS = {"value": ValueError("shapes differ"), "user": UserError("row 3 is empty"), "rows": RowsLost("lost")}

def make(config, inputs, context):
    """Write every input's text and the configured text; count the call in a file that isn't keyed."""
    with open(Path(__file__).with_suffix(".calls"), "a") as handle:
        handle.write(context.name + "\\n")
    data = "".join(read(path) for _, path in sorted(inputs.items()))
    (context.out / "data.txt").write_text(data + config["text"])
    context.rows("answers", into=3, out=2, dropped={"empty": 1})
    context.tokens(7)
    context.fact("engine", "none")

def read(path):
    file = path if path.is_file() else path / "data.txt"
    return file.read_text() if file.exists() else ""

def length(config, inputs, context):
    (context.out / "data.txt").write_text(str(len(read(inputs["data"]))))

def train(config, inputs, context):
    context.log({"loss": 1.0})
    (context.out / "model").mkdir()
    (context.out / "model" / "data.txt").write_text("weights")
    (context.out / "flags.txt").write_text(config["text"])

def fails(config, inputs, context):
    context.log({"loss": 1.0})
    (context.out / "half.txt").write_text("half")
    raise ERRORS[config["error"]]

def slow(config, inputs, context):
    """Stops in the middle until the file ``go`` is there."""
    (context.out / "half.txt").write_text("half")
    base = Path(__file__)
    base.with_suffix(".started").write_text("")
    while not base.with_suffix(".go").exists():
        time.sleep(0.02)
    make(config, inputs, context)
'''
_numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch) -> Path:
    """The file of a fresh module of stage functions, importable here and in workers."""
    file = tmp_path / f"store_stages_{next(_numbers)}.py"
    file.write_text(STAGES)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return file


@pytest.fixture
def store(tmp_path) -> Store:
    return new_store(tmp_path)


def new_store(tmp_path: Path, **options) -> Store:
    return Store(tmp_path / "store", tmp_path / "run", options.pop("launcher", inline.run), **options)


def calls(module: Path) -> list[str]:
    file = module.with_suffix(".calls")
    return file.read_text().split() if file.exists() else []


def stage(module: Path, name: str = "iteration-1/sample", function: str = "make", **fields) -> Stage:
    defaults = {"config": {"text": "x", "training": {"learning_rate": 3e-5}}, "seed": 0}
    return Stage(name=name, run=f"{module.stem}:{function}", **(defaults | fields))


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def kinds(store: Store) -> list[str]:
    return [event.kind for event in store.events]
