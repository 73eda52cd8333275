"""Several annotators at once: the mean of their rewards, and how far they disagree.

Source: reward-model ensembles use the spread of the members as a measure of doubt (for example Coste et al., arXiv
2310.02743); here the members may be annotators of any kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

from align_loop.annotators.job import Annotation, Job
from align_loop.annotators.judging import inner_job, inner_roles, score_row
from align_loop.parts import PART
from align_loop.record import Row
from align_loop.stage import StageContext


@dataclass
class Ensemble:
    """``members``: name -> annotator. ``normalise``: to mean 0 and standard deviation 1 over the table first.

    Without ``normalise`` rewards of different scales are averaged as they are. ``reward_sd`` is the standard deviation
    of the members' rewards (dividing by their number). Only answers that every member scores are scored, and only pairs
    that every member compares are compared (mean probability). Costs are added up; log-probs are those of the first
    member that gives any.
    """

    members: dict[str, Any] = field(metadata=PART)
    normalise: bool = True

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise ValueError(f"annotator.members has {len(self.members)}: an ensemble is of two or more annotators")

    @property
    def needs_gold(self) -> bool:
        """Whether a member asks for the true quality."""
        return any(getattr(member, "needs_gold", False) for member in self.members.values())

    def roles(self) -> dict[str, str]:
        """The models that the members read."""
        return inner_roles(self._named())

    def files(self) -> dict[str, str]:
        """The files that the members read."""
        return inner_roles(self._named(), "files")

    def _named(self) -> dict[str, Any]:
        return {f"members.{name}": member for name, member in self.members.items()}

    def annotate(self, job: Job) -> Annotation:
        """Mean and spread; each member's own counts and facts are reported under its name."""
        made = [annotate_inside(f"members.{name}", member, job) for name, member in self.members.items()]
        tables = [{row["sample_id"]: row for row in annotation.scores} for annotation in made]
        common = [a for a in job.answers if all(a["sample_id"] in table for table in tables)]
        rewards = [[table[a["sample_id"]]["reward"] for a in common] for table in tables]
        if self.normalise:
            rewards = [standardised(values) for values in rewards]
        scores = []
        for i, answer in enumerate(common):
            own = [values[i] for values in rewards]
            rows = [table[answer["sample_id"]] for table in tables]
            scores.append(score_row(answer, fmean(own), reward_sd=pstdev(own), cost=total_cost(rows), **_logps(rows)))
        return Annotation(scores, _mean_pairs([annotation.pairwise for annotation in made]))


def annotate_inside(name: str, member: Any, job: Job) -> Annotation:
    """What an annotator inside another one says. ``name``: its key, under which its counts and facts are reported."""
    inner = dataclasses.replace(job.context, report=StageContext("", job.context.out).report)
    annotation = member.annotate(inner_job(job, name, inner))
    job.context.tokens(inner.report["tokens"])
    for what, counts in inner.report["rows"].items():
        job.context.report["rows"][f"{name}: {what}"] = counts
    for fact, value in inner.report["facts"].items():
        job.context.fact(f"{name}: {fact}", value)
    job.context.fact(f"{name}: answers scored", len(annotation.scores))
    return annotation


def standardised(values: Sequence[float]) -> list[float]:
    """``values`` to mean 0 and standard deviation 1; all 0 where they are equal."""
    if not values:
        return []
    mean, sd = fmean(values), pstdev(values)
    return [(value - mean) / sd if sd > 0 else 0.0 for value in values]


def total_cost(rows: Sequence[Row]) -> float | None:
    """The sum of the costs of ``rows``; None where none has one."""
    costs = [row["cost"] for row in rows if row.get("cost") is not None]
    return sum(costs) if costs else None


def _logps(rows: Sequence[Row]) -> dict[str, float]:
    given = next((row for row in rows if row.get("logp_policy") is not None), {})
    return {name: given[name] for name in ("logp_policy", "logp_reference") if given.get(name) is not None}


def _mean_pairs(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """The comparisons that every table has, in whichever direction: mean ``p_first``."""
    read = [_directed(rows) for rows in tables]
    first = {(r["prompt_id"], *sorted((r["first_sample_id"], r["second_sample_id"]))): r for r in tables[0]}
    found = []
    for row in first.values():
        pair = row["first_sample_id"], row["second_sample_id"]
        if all(pair in table for table in read):
            found.append({**row, "p_first": fmean(fmean(table[pair]) for table in read)})
    return found


def _directed(rows: Sequence[Row]) -> Mapping[tuple[str, str], list[float]]:
    """(first, second) -> all that was said of it, in both directions."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        a, b, p = row["first_sample_id"], row["second_sample_id"], row["p_first"]
        found.setdefault((a, b), []).append(p)
        found.setdefault((b, a), []).append(1 - p)
    return found
