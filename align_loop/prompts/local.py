"""Prompts, demonstrations and preferences from a user's own files (JSONL, JSONL.gz, Parquet)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from align_loop.errors import UserError
from align_loop.prompts import formats, tables
from align_loop.prompts.files import read_file
from align_loop.stage import StageContext

# ``format`` is that of the preferences; the other files are recognised on their own.
_FORMATS = {"format": "auto", "prompts_format": "auto", "demos_format": "auto"}


def prepare(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """The stage: read the files named by ``inputs`` and write a run's tables (see ``tables.write``).

    ``inputs``: any of ``preferences``, ``prompts``, ``demos`` -> path; preferences or prompts are needed.
    ``config``: see ``tables.DEFAULTS``, and ``format``, ``prompts_format``, ``demos_format`` (``formats.FORMATS``).
    Every row of every file is checked before anything is written; raises ``UserError`` with file and line.
    """
    values = tables.settings(config, _FORMATS)
    if not inputs.get("preferences") and not inputs.get("prompts"):
        raise UserError("no file of preferences and none of prompts; give at least one of preferences=, prompts=")

    def read(name: str, parse: Callable[..., formats.Table], format_key: str) -> formats.Table | None:
        path = inputs.get(name)
        return parse(read_file(path), values[format_key], values["bad_rows"]) if path else None

    given = tables.Given(
        preferences=read("preferences", formats.preferences, "format"),
        prompts=read("prompts", formats.prompts, "prompts_format"),
        demonstrations=read("demos", formats.demonstrations, "demos_format"),
    )
    tables.write(given, values, context)
