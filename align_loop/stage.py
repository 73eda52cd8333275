"""What a stage function is given and what it reports: paths, counts, progress and logs.

A stage function is a plain top-level function ``stage(config, inputs, context)``:

- ``config``: a JSON-able dictionary, all of which is part of the stage's key;
- ``inputs``: name -> path of what earlier stages (or the user) made;
- ``context``: this file's ``StageContext``: where to write (``context.out``), the hardware (not part of
  the key: it must not change results beyond the stated tolerance), and the reporting calls below.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class RowsLost(RuntimeError):
    """A stage's rows in are not its rows out plus its rows dropped."""


@dataclass
class StageContext:
    """The surroundings of one running stage."""

    name: str
    out: Path
    hardware: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None  # part of the stage's key; None for a stage without chance
    log_sink: Callable[[dict[str, Any]], None] | None = None  # live metrics, for example to W&B
    quiet: bool = False
    report: dict[str, Any] = field(default_factory=lambda: {"rows": {}, "tokens": 0, "facts": {}})

    def rows(self, what: str, *, into: int, out: int, dropped: dict[str, int] | None = None) -> None:
        """Account for the rows of one table: ``into`` must equal ``out`` plus all ``dropped`` (reason -> count).

        Raises ``RowsLost`` when it doesn't, before the stage's output is accepted.
        """
        dropped = {reason: count for reason, count in (dropped or {}).items() if count}
        if into != out + sum(dropped.values()):
            raise RowsLost(f"{self.name}: {what}: {into} rows in, {out} out, dropped {dropped}: the sum does not fit")
        self.report["rows"][what] = {"in": into, "out": out, "dropped": dropped}

    def tokens(self, count: int) -> None:
        """Count tokens that this stage generated, scored or trained on."""
        self.report["tokens"] += int(count)

    def fact(self, name: str, value: Any) -> None:
        """Record a JSON-able fact about this stage in its manifest (engine taken, flag rate, ...)."""
        self.report["facts"][name] = value

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line of training metrics to ``train_log.jsonl`` and pass it to the live tracker."""
        with open(self.out / "train_log.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps(metrics, sort_keys=True) + "\n")
        if self.log_sink is not None:
            self.log_sink(metrics)

    def progress(self, total: int, unit: str) -> Progress:
        """A progress line for ``total`` units of work, with rate and time left."""
        return Progress(self.name, total, unit, quiet=self.quiet)


class Progress:
    """One line on stderr, rewritten in place on a terminal and printed now and then elsewhere.

    Use as a context manager; call ``update(done)`` with the number of units just finished.
    """

    def __init__(self, name: str, total: int, unit: str, quiet: bool = False):
        self.name, self.total, self.unit, self.quiet = name, total, unit, quiet
        self.done = 0
        self.started = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.last_print = self.started

    def __enter__(self) -> Progress:
        return self

    def update(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if not self.quiet and now - self.last_print > (0.2 if self.terminal else 15):
            self.last_print = now
            self._print(now, end="\r" if self.terminal else "\n")

    def __exit__(self, kind, *_: Any) -> None:
        if self.terminal and not self.quiet:
            print("\x1b[2K", end="\r", file=sys.stderr, flush=True)

    def _print(self, now: float, end: str) -> None:
        rate = self.done / max(now - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0
        text = f"  {self.name}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.0f}/s, {left:.0f} s left"
        print(("\x1b[2K" if self.terminal else "") + text, end=end, file=sys.stderr, flush=True)
