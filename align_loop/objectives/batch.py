"""What a loss sees of a batch: examples of any kind over one stack of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from align_loop.objectives.scores import Side

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("pair", "point", "demo", "group")
PADDING = -1  # the kind of a row that fills up a batch: no term reads it


@dataclass
class ExampleBatch:
    """B examples over N answers (token log-probs (N, T), nats).

    ``kind`` (B,) indexes ``KINDS``, ``tag`` (B,) indexes ``tags``; ``index`` (B,) is the row in the training's table.
    ``chosen``, ``rejected`` (B,) are rows of the stack, -1 where there is none; ``owner`` (N,) is the example of each
    answer of a group, -1 for the others, ``member_score`` (N,) its score. ``q``, ``m``, ``w``, ``beta``,
    ``beta_rejected`` and ``label`` (B,) are the record's, NaN where it leaves ``beta``, ``beta_rejected`` or ``label``
    open. ``value`` (B,): a value head's estimate for the prompt, where a term asks for one.
    """

    kind: Tensor
    tag: Tensor
    index: Tensor
    q: Tensor
    m: Tensor
    w: Tensor
    beta: Tensor
    beta_rejected: Tensor
    label: Tensor
    chosen: Tensor
    rejected: Tensor
    owner: Tensor
    member_score: Tensor
    answers: Side
    tags: Sequence[str] = ("",)
    value: Tensor | None = None

    def rows(self, kinds: Sequence[str], tag: str | None) -> Tensor:
        """The positions of the examples of these kinds and, unless it is None, with this tag."""
        import torch

        codes = torch.tensor([KINDS.index(kind) for kind in kinds], device=self.kind.device)
        found = torch.isin(self.kind, codes)
        if tag is not None:
            found &= self.tag == (self.tags.index(tag) if tag in self.tags else -2)  # -1: some other tag
        return found.nonzero()[:, 0]

    def select(self, rows: Tensor) -> ExampleBatch:
        """The examples at ``rows`` (n,) over the same stack of answers."""
        import torch

        names = ("kind", "tag", "index", "q", "m", "w", "beta", "beta_rejected", "label", "chosen", "rejected")
        place = torch.full((len(self.kind) + 1,), -1, device=rows.device)  # the last one: for answers of no example
        place[rows] = torch.arange(len(rows), device=rows.device)
        columns = {name: getattr(self, name)[rows] for name in names}
        value = None if self.value is None else self.value[rows]
        return replace(self, **columns, owner=place[self.owner], value=value)

    def side(self, rows: Tensor) -> Side:
        """The answers at ``rows`` (n,) of the stack: ``side(batch.chosen)``."""
        stack = self.answers
        return Side(
            stack.policy[rows],
            None if stack.reference is None else stack.reference[rows],
            stack.mask[rows],
            None if stack.weights is None else stack.weights[rows],
        )


def filled(column: Tensor, default: Tensor | float) -> Tensor:
    """``column`` with ``default`` (a number or (n,)) where it is NaN."""
    import torch

    return torch.where(column.isnan(), default, column)
