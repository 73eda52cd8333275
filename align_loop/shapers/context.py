"""What a shaper is given beside the examples, and the one way in which it gives them back.

A shaper is a dataclass with ``shape(examples, context) -> (kept, dropped)``: rows of ``record.EXAMPLES``, and the rows
that it dropped by reason. It may change fields and add rows of its own (with new example ids), but every row that it
was given comes back in one of the two. One that reads models names them as annotators do: ``roles()`` gives name ->
role (initial, policy, previous, reward_model, or a model folder). One that works on scores says ``needs_scores``, a
class variable, and is left out where people's labels are shaped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from align_loop.groups import Group
from align_loop.record import Row
from align_loop.render import Renderer
from align_loop.stage import StageContext

Shaped = tuple[list[Row], dict[str, list[Row]]]


@dataclass
class ShapeContext:
    """``groups``: prompt id -> scored answers (none for labelled preferences); ``models``: by ``roles()``'s names."""

    renderer: Renderer
    seed: int
    groups: dict[str, Group] = field(default_factory=dict)
    models: dict[str, Path] = field(default_factory=dict)
    dtype: str = "float32"
    stage: StageContext | None = None


def partition(examples: list[Row], reason_of: Callable[[Row], str | None]) -> Shaped:
    """Split ``examples`` by ``reason_of(row)``: None stays, text is the reason for dropping it."""
    kept: list[Row] = []
    dropped: dict[str, list[Row]] = {}
    for row in examples:
        reason = reason_of(row)
        if reason is None:
            kept.append(row)
        else:
            dropped.setdefault(reason, []).append(row)
    return kept, dropped
