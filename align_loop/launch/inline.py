"""Run a stage in this process: the simplest launcher, and what a worker process does inside.

A launcher is any callable ``job -> report``; the store knows nothing else about it.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_loop.errors import UserError
from align_loop.stage import StageContext

LogSink = Callable[[dict[str, Any]], None]
Report = dict[str, Any]  # rows, tokens and facts, as ``StageContext.report``


@dataclass
class Job:
    """One stage to run, with everything as plain data, so that another process can run it too."""

    name: str
    run: str  # "module:function"
    config: dict[str, Any]
    inputs: dict[str, str]  # name -> path
    out: str  # the folder the stage fills; exists and is empty
    scratch: str  # a folder for the launcher's own files; not kept
    key: str = ""  # the stage's key in the store
    seed: int | None = None
    hardware: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False
    code: dict[str, str] = field(default_factory=dict)  # file -> digest, of the code this stage's key names
    tracking: dict[str, Any] | None = None  # see ``launch.worker``; inline runs take ``log_sink`` instead


Launcher = Callable[[Job], Report]

_code_seen: dict[str, str] = {}


def run(job: Job, log_sink: LogSink | None = None) -> Report:
    """Call the stage's function and return what it reported.

    ``log_sink`` receives each dictionary that the stage logs. Raises whatever the stage raises, and
    ``UserError`` if a source file changed after this process first ran its code: what Python has imported is
    the old code, and its output would go under the new code's key.
    """
    for file, digest in job.code.items():
        if _code_seen.setdefault(file, digest) != digest:
            raise UserError(f"{file} was edited while this process runs; start the same command again")
    context = StageContext(
        name=job.name,
        out=Path(job.out),
        hardware=copy.deepcopy(job.hardware),
        seed=job.seed,
        log_sink=log_sink,
        quiet=job.quiet,
    )
    inputs = {name: Path(path) for name, path in job.inputs.items()}
    load(job.run)(copy.deepcopy(job.config), inputs, context)
    # As plain JSON here and now: what a stage reports (numpy scalars, paths) must not fail it hours later.
    return json.loads(json.dumps(context.report, default=_plain))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def load(dotted: str) -> Callable[..., Any]:
    """The function that ``"module:function"`` names; ``UserError`` if the module has none of that name."""
    module_name, _, name = dotted.partition(":")
    module = importlib.import_module(module_name)
    if not hasattr(module, name):
        raise UserError(f"{dotted}: module {module_name} has no function {name!r}; check the spelling")
    return getattr(module, name)
