"""Random batches for the tests of the objective algebra, and the plain numbers that papers' formulas are written in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from align_loop.objectives.batch import KINDS, ExampleBatch
from align_loop.objectives.objective import Objective
from align_loop.objectives.scores import Side

N, LENGTH = 6, 5  # examples, tokens of the longest answer


@dataclass
class Case:
    """One loss: the algebra's objective with the record's columns, the paper's formula, a formula that is wrong."""

    name: str
    objective: Objective
    right: Callable[[SimpleNamespace], Tensor]
    wrong: Callable[[SimpleNamespace], Tensor]
    columns: dict[str, list[float]] = field(default_factory=dict)
    kind: str = "pair"
    trackers: dict[str, Any] = field(default_factory=dict)
    weighted: bool = False
    gradient_only: bool = False
    value_only: bool = False

    def __repr__(self) -> str:
        return self.name


def batch_of(kind: str = "pair", seed: int = 0, weighted: bool = False, **columns: Any) -> ExampleBatch:
    """N examples of one kind in float64, with answers of 2 to 5 tokens; the policy's log-probs want a gradient."""
    source = torch.Generator().manual_seed(seed)
    answers = 3 * N if kind == "group" else 2 * N if kind == "pair" else N

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=source, dtype=torch.float64)

    policy, reference = uniform(-3, -0.05, answers, LENGTH), uniform(-3, -0.05, answers, LENGTH)
    lengths = torch.randint(2, LENGTH + 1, (answers, 1), generator=source)
    mask = (torch.arange(LENGTH) < lengths).long()
    weights = uniform(0.2, 2.0, answers, LENGTH) if weighted else None
    scores = uniform(0, 3, answers) if kind == "group" else torch.zeros(answers, dtype=torch.float64)
    none, all_rows = torch.full((N,), -1), torch.arange(N)
    defaults = {"q": 1.0, "m": 0.0, "w": 1.0, "beta": math.nan, "beta_rejected": math.nan, "label": math.nan}
    values = {name: torch.full((N,), value, dtype=torch.float64) for name, value in defaults.items()}
    values |= {name: torch.tensor(given, dtype=torch.float64) for name, given in columns.items() if name != "value"}
    return ExampleBatch(
        kind=torch.full((N,), KINDS.index(kind)),
        tag=none,
        index=all_rows,
        **values,
        chosen=none if kind == "group" else all_rows,
        rejected=all_rows + N if kind == "pair" else none,
        owner=all_rows.repeat_interleave(3) if kind == "group" else torch.full((answers,), -1),
        member_score=scores,
        answers=Side(policy.requires_grad_(), reference, mask, weights),
        tags=[],
        value=torch.tensor(columns["value"], dtype=torch.float64).requires_grad_() if "value" in columns else None,
    )


def numbers(batch: ExampleBatch) -> SimpleNamespace:
    """The same batch as a formula sees it: ``pw, pl`` log-probs of the policy, ``rw, rl`` of the reference (N,) ...

    with the token weights applied, ``nw, nl`` the numbers of tokens; ``p, r, n`` of all answers; ``token_p``,
    ``token_r`` lists of their tokens; the columns by name.
    """
    stack = batch.answers
    weights = torch.ones_like(stack.policy) if stack.weights is None else stack.weights
    token_p = [row[: int(keep.sum())] for row, keep in zip(stack.policy, stack.mask, strict=True)]
    token_r = [row[: int(keep.sum())] for row, keep in zip(stack.reference, stack.mask, strict=True)]
    token_w = [row[: int(keep.sum())] for row, keep in zip(weights, stack.mask, strict=True)]
    p = torch.stack([(a * w).sum() for a, w in zip(token_p, token_w, strict=True)])
    r = torch.stack([(a * w).sum() for a, w in zip(token_r, token_w, strict=True)])
    n = torch.stack([w.sum() for w in token_w])
    half = slice(0, N), slice(N, 2 * N)
    sides = {
        f"{name}{side}": value[part]
        for name, value in (("p", p), ("r", r), ("n", n))
        for side, part in zip("wl", half, strict=True)
    }
    names = ("q", "m", "w", "beta", "beta_rejected", "label", "value", "member_score")
    columns = {name: getattr(batch, name) for name in names}
    return SimpleNamespace(p=p, r=r, n=n, token_p=token_p, token_r=token_r, **sides, **columns)


def check(case: Case, formula: Callable[[SimpleNamespace], Tensor], seed: int) -> bool:
    """Whether the algebra's losses equal the formula's, in value and in the gradient of the policy's log-probs."""
    batch = batch_of(case.kind, seed, case.weighted, **case.columns)
    found = sum(case.objective.losses(batch, case.trackers).values())
    expected = formula(numbers(batch))
    assert found.shape == (N,) and found.dtype == torch.float64 and found.isfinite().all()
    same = case.gradient_only or torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    if case.value_only:
        return same
    slopes = [torch.autograd.grad(loss.sum(), batch.answers.policy)[0] for loss in (found, expected)]
    assert slopes[0].abs().max() > 0
    return same and torch.allclose(*slopes, rtol=1e-9, atol=1e-9)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))
