"""Chance that depends on names and not on the order of rows: one random generator for each thing that is decided."""

from __future__ import annotations

import random
from typing import Any

from align_loop.record import short_digest


def chance(*names: Any) -> random.Random:
    """A generator seeded by the content of ``names`` (JSON values): the run's seed, what is decided, an id."""
    return random.Random(int(short_digest("chance", *names), 16))
