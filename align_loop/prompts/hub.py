"""Prompts, demonstrations and preferences from data sets of the Hugging Face hub, at pinned revisions.

A data set is named as {"name", "revision", "split"} and maybe "config"; or as {"builder", "data_files",
"split"} for files that one of the ``datasets`` library's own builders reads. The rows are those of ``formats``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align_loop.errors import UserError
from align_loop.prompts import formats, tables
from align_loop.prompts.files import Origin, one_line
from align_loop.stage import StageContext

_SOURCES: dict[str, Any] = {"preferences": None, "prompts": None, "demos": None}
_FORMATS = {"format": "auto", "prompts_format": "auto", "demos_format": "auto"}
_KEYS = ("name", "config", "revision", "split", "builder", "data_files")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def prepare(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """The stage: load the data sets named in ``config`` and write a run's tables (see ``tables.write``).

    ``config``: ``preferences``, ``prompts``, ``demos`` (data sets as above, or null) and what ``local.prepare``
    takes. ``inputs`` is not used. Raises ``UserError`` for a data set that can't be had, and for a row, as there.
    """
    values = tables.settings(config, {**_SOURCES, **_FORMATS})
    if not values["preferences"] and not values["prompts"]:
        raise UserError("prompts: no data set of preferences and none of prompts; name at least one of them")

    def read(name: str, parse: Callable[..., formats.Table], format_key: str) -> formats.Table | None:
        if not values[name]:
            return None
        rows, commit = load(values[name], name)
        context.fact(f"{name} data set", commit)
        return parse(rows, values[format_key], values["bad_rows"])

    given = tables.Given(
        preferences=read("preferences", formats.preferences, "format"),
        prompts=read("prompts", formats.prompts, "prompts_format"),
        demonstrations=read("demos", formats.demonstrations, "demos_format"),
    )
    tables.write(given, values, context)


def load(dataset: dict[str, Any], key: str) -> tuple[formats.Source, str]:
    """(the rows of one data set with their origins, the commit it was loaded at).

    Raises ``UserError`` where the data set is neither reachable nor cached, where the split or configuration is
    unknown, and where a commit was asked for and another is cached (offline, ``datasets`` takes the latest).
    """
    _check(dataset, key)
    import datasets  # slow import, wanted by this source alone

    name = dataset.get("name") or dataset["builder"]
    revision = dataset.get("revision")
    files = {"data_files": dataset["data_files"]} if dataset.get("data_files") else {}
    try:
        builder = datasets.load_dataset_builder(name, dataset.get("config"), revision=revision, **files)
        if revision and _COMMIT.fullmatch(revision) and builder.hash != revision:
            raise UserError(
                f"{key}: {name} is cached at {builder.hash}, not at revision={revision}; go online once to load that "
                "revision into the cache (HF_HOME), or pin the cached one"
            )
        builder.download_and_prepare()
        rows = builder.as_dataset(split=dataset["split"])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        remedy = "check name, config, revision and split; offline, fill the cache that HF_HOME names beforehand"
        raise UserError(one_line(f"{key}: {name} can't be loaded ({error}); {remedy}, or use setting=local")) from None
    source = f"{name}@{revision[:12]} [{dataset['split']}]" if revision else f"{name} [{dataset['split']}]"
    return ((Origin(source, name, "row", n), row) for n, row in enumerate(rows, 1)), str(builder.hash)


def _check(dataset: dict[str, Any], key: str) -> None:
    """That ``dataset`` says what to load: a name at a revision, or a builder, and the split."""
    if not isinstance(dataset, dict):
        raise UserError(f"{key}={dataset!r} must name a data set with {', '.join(_KEYS)}")
    if unknown := sorted(set(dataset) - set(_KEYS)):
        raise UserError(f"{key}.{unknown[0]} is unknown; a data set has {', '.join(_KEYS)}")
    if not dataset.get("split"):
        raise UserError(f"{key}.split is missing; name one, like 'train'")
    if bool(dataset.get("name")) == bool(dataset.get("builder")):
        raise UserError(f"{key}: name a hub data set (name) or a builder with data_files (builder), and not both")
    if dataset.get("name") and not dataset.get("revision"):
        raise UserError(f"{key}.revision is missing for {dataset['name']}; pin a commit, so that a run can be repeated")
