"""The log of a policy's training: means over all examples since the last log, over all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from align_loop.objectives.batch import ExampleBatch
from align_loop.objectives.objective import Objective

COLUMNS = ("index", "chosen", "rejected", "logp_chosen", "logp_rejected", "drift")


class StepMetrics:
    """Collects what each micro-batch shows and turns it into means.

    Good answers are the chosen ones of pairs, demonstrations and points with a label above 0; rewards are ``beta S`` of
    the first term with a score that reads the example's kind. ``check_start`` as in ``PolicyTrainer``.
    """

    def __init__(
        self,
        gather: Callable[[Tensor], Tensor],
        terms: Sequence[str],
        check_start: Callable[[float], None] | None,
    ) -> None:
        self.gather, self.terms, self.check_start = gather, list(terms), check_start
        self.seen: list[Tensor] = []

    def take(self, objective: Objective, view: ExampleBatch, losses: dict[str, Tensor]) -> None:
        """Remember a micro-batch: one row an example, NaN where it has no such number."""
        shown = {name: torch.full_like(view.w, math.nan) for name in COLUMNS}
        shown["index"] = view.index.float()
        for kind in ("pair", "point", "demo"):
            rows = view.rows([kind], None)
            if len(rows):
                self._one_kind(objective, view.select(rows), rows, kind, shown)
        columns = [*shown.values(), *(losses[name] for name in self.terms)]
        self.seen.append(torch.stack([column.detach().float() for column in columns], dim=1))

    def _one_kind(
        self, objective: Objective, view: ExampleBatch, rows: Tensor, kind: str, shown: dict[str, Tensor]
    ) -> None:
        reader = objective.reader(kind)
        drifts = []
        sides = [("chosen", view.chosen)] + ([("rejected", view.rejected)] if kind == "pair" else [])
        for name, answers in sides:
            side = view.side(answers)
            logps = side.score("log_prob")
            rewards = reader.reward(view, side, objective.beta) if reader else torch.full_like(logps, math.nan)
            bad = view.label < 0 if kind == "point" else torch.zeros_like(view.label, dtype=torch.bool)
            for good, place in ((~bad, name), (bad, "rejected")):
                shown[place][rows[good]] = rewards[good].to(shown[place].dtype)
                shown[f"logp_{place}"][rows[good]] = logps[good].to(shown[place].dtype)
            if side.reference is not None:
                drifts.append(side.score("log_ratio"))
        if drifts:
            shown["drift"][rows] = (drifts[0] - drifts[1] if len(drifts) > 1 else drifts[0]).abs()

    def into(self, logs: dict[str, float], first: bool, reference: bool) -> int:
        """Write the means into ``logs`` and forget; returns the number of pairs. ``first``: after the first step."""
        seen = self.gather(torch.cat(self.seen)).double().cpu()
        self.seen.clear()
        seen = seen[seen[:, 0] >= 0]
        column = dict(zip((*COLUMNS, *self.terms), seen.T, strict=True))
        margins = column["chosen"] - column["rejected"]
        means = {
            "rewards/chosen": column["chosen"],
            "rewards/rejected": column["rejected"],
            "rewards/margins": margins,
            "rewards/accuracies": torch.where(margins.isnan(), math.nan, (margins > 0).double()),
            "logps/chosen": column["logp_chosen"],
            "logps/rejected": column["logp_rejected"],
        }
        if len(self.terms) > 1:
            means |= {f"terms/{name}": column[name] for name in self.terms}
        for name, values in means.items():
            known = values[~values.isnan()]
            if len(known):
                logs[name] = known.mean().item()
        drift = column["drift"][~column["drift"].isnan()]
        if first and reference and len(drift) and self.check_start is not None:
            self.check_start(drift.mean().item())
        both = column["logp_chosen"].isnan() | column["logp_rejected"].isnan()
        return int((~both).sum())
