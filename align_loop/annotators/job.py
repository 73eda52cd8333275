"""What an annotator is given, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from align_loop.record import Row
from align_loop.stage import StageContext


@dataclass
class Job:
    """One table of answers to annotate.

    ``prompts``, ``answers``: rows of ``record.PROMPTS`` and ``record.ANSWERS``; ``models``: the folders of the roles
    that the annotator's ``roles()`` asked for, and the files that its ``files()`` named; ``gold``: sample id -> true
    quality in [0, 1] where the annotator asked for it (``needs_gold = True``), else None; ``seed``: for whatever is
    drawn by chance.
    """

    prompts: list[Row]
    answers: list[Row]
    models: dict[str, Path]
    dtype: str
    seed: int
    context: StageContext
    gold: dict[str, float] | None = None

    def messages(self) -> dict[str, list[dict[str, str]]]:
        """Prompt id -> messages."""
        return {row["prompt_id"]: row["messages"] for row in self.prompts}


@dataclass
class Annotation:
    """Rows of ``record.SCORES``, at most one an answer, and of ``record.PAIRWISE`` where answers were compared."""

    scores: list[Row]
    pairwise: list[Row] = field(default_factory=list)
