"""The objective: named terms, added up for each example, times the example's weight.

The loss of an example is ``w * sum of term.weight * term loss`` over the terms that read its kind and tag; a training
minimises the mean over its examples. Every preference loss this package knows is a choice of terms and fields: see
``conf/objective`` and ``terms.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align_loop.errors import UserError
from align_loop.objectives.batch import ExampleBatch
from align_loop.objectives.terms import PairTerm, Term
from align_loop.parts import PART

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Objective:
    """``beta`` is the inverse temperature of the reward where neither an example nor a term has its own.

    ``terms`` default to one ``PairTerm``: DPO.
    """

    beta: float = 0.1
    terms: dict[str, Any] = field(default_factory=lambda: {"pair": PairTerm()}, metadata=PART)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"objective.beta must be a positive number, got {self.beta!r}")
        if not self.terms:
            raise ValueError("objective.terms must have at least one term, got none")

    @property
    def needs_reference(self) -> bool:
        """Whether any term holds scores against a reference; without one none is loaded and none is run."""
        return any(term.needs_reference for term in self.terms.values())

    @property
    def needs_value(self) -> bool:
        """Whether any term reads a value head."""
        return any(term.needs_value for term in self.terms.values())

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise ``UserError`` for the first row of ``record.EXAMPLES`` that no term reads, or that a term can't use."""
        for row in rows:
            readers = [(name, term) for name, term in self.terms.items() if term.reads(row)]
            if not readers:
                kind, tag, label = row.get("kind") or "pair", row.get("tag") or "", row.get("label")
                known = "; ".join(f"{name}: {'/'.join(t.kinds)}{_tagged(t)}" for name, t in self.terms.items())
                raise UserError(
                    f"example {row['example_id']}: no term of the objective reads kind={kind!r} with tag={tag!r}"
                    f"{'' if label is None else f' and label {label:g}'} ({known}): add a term or filter such rows out"
                )
            for name, term in readers:
                if problem := term.problem(row):
                    raise UserError(f"example {row['example_id']}: objective.terms.{name}: {problem}")

    def trackers(self) -> dict[str, Any]:
        """Fresh state for one training: term name -> tracker, of the terms that have any."""
        made = {name: term.tracker() for name, term in self.terms.items()}
        return {name: tracker for name, tracker in made.items() if tracker is not None}

    def losses(self, batch: ExampleBatch, trackers: Mapping[str, Any]) -> dict[str, Tensor]:
        """Each term's share of the examples' losses: name -> (B,), weights applied, 0 for examples it doesn't read."""
        found = {}
        for name, term in self.terms.items():
            rows = batch.rows(term.kinds, term.tag)
            total = batch.w.new_zeros(len(batch.w), dtype=batch.answers.policy.dtype)
            if len(rows):
                losses = term.weight * term.losses(batch.select(rows), self.beta, trackers.get(name))
                total = total.index_add(0, rows, losses.to(total.dtype))
            found[name] = batch.w * total
        return found

    def reader(self, kind: str) -> Term | None:
        """The first term that reads a kind and has a score: the log's rewards are its."""
        scoring = [term for term in self.terms.values() if kind in term.kinds and hasattr(term, "score")]
        return scoring[0] if scoring else None


def _tagged(term: Term) -> str:
    return "" if term.tag is None else f" with tag {term.tag!r}"
