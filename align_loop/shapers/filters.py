"""Filters that compare an example with others or its answers with each other: length, repeats, budget and more."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import ClassVar, Literal

from align_loop.chance import chance
from align_loop.record import Row
from align_loop.shapers.context import ShapeContext, Shaped, partition
from align_loop.shapers.rows import answers_of, gap, is_pair, lowest, quantile


@dataclass
class LengthRules:
    """Drops pairs by the lengths of their answers, in tokens; null switches a rule off.

    ``min_tokens``, ``max_tokens``: of either answer. ``max_ratio``: of the longer to the shorter one.
    ``max_chosen_ratio``: of the chosen to the rejected one, so that length alone can't be what is learnt (1: the
    chosen answer is never longer). An answer without tokens counts as one token long.

    YAML: ``length: {_target_: align_loop.shapers.filters.LengthRules, max_ratio: 3.0, max_chosen_ratio: 1.5}``
    """

    min_tokens: int | None = None
    max_tokens: int | None = None
    max_ratio: float | None = None
    max_chosen_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("min_tokens", 1), ("max_tokens", 1), ("max_ratio", 1), ("max_chosen_ratio", 0)):
            value = getattr(self, name)
            if value is not None and not (value > 0 and value >= least):
                raise ValueError(f"LengthRules.{name}={value} must be {f'at least {least}' if least else 'positive'}")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        return partition(examples, lambda row: self._reason(row) if is_pair(row) else None)

    def _reason(self, row: Row) -> str | None:
        chosen, rejected = (max(1, len(row[side])) for side in ("chosen_ids", "rejected_ids"))
        short, long = min(chosen, rejected), max(chosen, rejected)
        if self.min_tokens is not None and short < self.min_tokens:
            return "answer too short"
        if self.max_tokens is not None and long > self.max_tokens:
            return "answer too long"
        if self.max_ratio is not None and long > self.max_ratio * short:
            return "answers of too different length"
        if self.max_chosen_ratio is not None and chosen > self.max_chosen_ratio * rejected:
            return "chosen answer too much longer"
        return None


@dataclass
class Deduplicate:
    """Keeps one of several examples with the same ``same``: the one with the smallest example id.

    ``same`` answers: prompt and answers, by token ids, of the same kind, on the same sides, and of the same label.
    ``same`` prompt: the prompt alone, so that one example a prompt remains.

    YAML: ``deduplicate: {_target_: align_loop.shapers.filters.Deduplicate, same: answers}``
    """

    same: Literal["answers", "prompt"] = "answers"

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        first: dict[tuple, str] = {}
        for row in sorted(examples, key=lambda r: r["example_id"]):
            first.setdefault(self._key(row), row["example_id"])

        def reason(row: Row) -> str | None:
            return None if first[self._key(row)] == row["example_id"] else f"repeats another example's {self.same}"

        return partition(examples, reason)

    def _key(self, row: Row) -> tuple:
        prompt = tuple(row["prompt_ids"])
        if self.same == "prompt":
            return (prompt,)
        return prompt, row.get("kind") or "pair", row.get("label"), tuple(map(tuple, answers_of(row)))


@dataclass
class Rip:
    """Drops prompts whose answers say that the prompt is a bad one (RIP: Survival of the Fittest Prompts).

    Of each prompt the pair with the largest gap speaks (its best and worst answer, with a builder that makes that
    pair). A prompt stays where the reward of the rejected answer and its length (tokens) are at least, and the gap at
    most, the given quantiles of all prompts; null switches a rule off. The paper's main run: 0.5 for all three.

    YAML: ``rip: {_target_: align_loop.shapers.filters.Rip, reward: 0.5, length: 0.5, gap: 0.5}``
    """

    reward: float | None = 0.5
    length: float | None = 0.5
    gap: float | None = 0.5
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("reward", "length", "gap"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"Rip.{name}={value} must be a quantile in [0, 1], or null")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        speaks: dict[str, Row] = {}
        for row in sorted((r for r in examples if gap(r) is not None), key=lambda r: (-gap(r), r["example_id"])):
            speaks.setdefault(row["prompt_id"], row)
        limits = {
            name: quantile([_rip_value(row, name) for row in speaks.values()], share)
            for name in _RIP_REASONS
            if (share := getattr(self, name)) is not None and speaks
        }

        def reason(row: Row) -> str | None:
            if gap(row) is None:
                return None
            for name, limit in limits.items():
                value = _rip_value(speaks[row["prompt_id"]], name)
                if value > limit if name == "gap" else value < limit:
                    return _RIP_REASONS[name]
            return None

        return partition(examples, reason)


_RIP_REASONS = {
    "reward": "prompt: rejected answer scores too low",
    "length": "prompt: rejected answer too short",
    "gap": "prompt: score gap too wide",
}


def _rip_value(row: Row, name: str) -> float:
    return {"reward": row["score_rejected"], "length": len(row["rejected_ids"]), "gap": gap(row)}[name]


@dataclass
class BudgetSelect:
    """Keeps ``budget`` pairs: what the expensive annotator is asked about (D2PO, Not All Pairs); drops the rest.

    ``by``: the smallest gaps of the cheap scores (the unsure ones), the largest, or a random choice by (seed, example
    id). Gaps are taken without their sign. By gap, pairs without scores are left alone and outside the budget; by
    chance every pair takes part. Ties by example id.

    YAML: ``budget: {_target_: align_loop.shapers.filters.BudgetSelect, budget: 500, by: small}``
    """

    budget: int
    by: Literal["small", "large", "random"] = "small"

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError(f"BudgetSelect.budget={self.budget} must be 0 or more pairs")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        values = [self._value(row, context.seed) for row in examples]
        taken = lowest(examples, values, self.budget)
        asked = {row["example_id"] for row, value in zip(examples, values, strict=True) if value is not None}
        return partition(examples, lambda r: "outside the budget" if r["example_id"] in asked - taken else None)

    def _value(self, row: Row, seed: int) -> float | None:
        if self.by == "random":
            return chance("budget", seed, row["example_id"]).random() if is_pair(row) else None
        difference = gap(row)
        if difference is None:
            return None
        return abs(difference) if self.by == "small" else -abs(difference)


@dataclass
class DropImplausible:
    """Drops examples whose chosen answer (``side`` both: either answer) the reference would hardly have given.

    An answer's value is its log-prob per token under the reference (nats; ``logp_reference`` and ``tokens`` of its
    scores). It is implausible more than ``deviations`` robust standard deviations (1.4826 times the median absolute
    deviation) below the median of all answers of the iteration: there the implicit reward has no bound, and a policy
    that feeds on its own answers learns to give them. Answers without such scores are left alone, and so are all where
    that deviation is 0.

    YAML: ``implausible: {_target_: align_loop.shapers.filters.DropImplausible, deviations: 4.0, side: chosen}``
    """

    deviations: float = 4.0
    side: Literal["chosen", "both"] = "chosen"
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.deviations > 0:
            raise ValueError(f"DropImplausible.deviations={self.deviations} must be positive")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        values = {
            row["sample_id"]: row["logp_reference"] / row["tokens"]
            for group in context.groups.values()
            for row in group.scores
            if row.get("logp_reference") is not None and row.get("tokens")
        }
        middle = median(values.values()) if values else 0.0
        deviation = 1.4826 * median(abs(v - middle) for v in values.values()) if values else 0.0
        limit = middle - self.deviations * deviation
        sides = ("chosen",) if self.side == "chosen" else ("chosen", "rejected")

        def reason(row: Row) -> str | None:
            known = [values[i] for side in sides if (i := row.get(f"{side}_sample_id")) in values]
            return "implausible to the reference" if deviation and any(v < limit for v in known) else None

        return partition(examples, reason)
