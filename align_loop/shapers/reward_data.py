"""Data for reward models: examples that teach them to read the prompt and not the form of an answer alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

from align_loop.chance import chance
from align_loop.record import Row, short_digest
from align_loop.shapers.context import ShapeContext, Shaped
from align_loop.shapers.rows import is_pair


@dataclass
class RrmAugment:
    """Adds answers to other prompts as rejected ones, and pairs of them as neutral ones (RRM, Liu et al. 2024).

    For each pair on a prompt x: ``non_contextual`` pairs in which one of its own answers (either) is better than one to
    another prompt; and ``neutral`` pairs of answers to two other prompts, ``q`` = 0.5, since neither answers x. Drawn
    by (seed, example id), each from a prompt of its own, and tagged augmented; fewer where the table has too few
    prompts. The paper adds up to fourteen a pair and keeps those a first reward model is unsure of; that choice is left
    to the shapers behind this one.

    YAML: ``rrm: {_target_: align_loop.shapers.reward_data.RrmAugment, non_contextual: 1, neutral: 1}``
    """

    non_contextual: int = 1
    neutral: int = 1

    def __post_init__(self) -> None:
        if min(self.non_contextual, self.neutral) < 0 or not self.non_contextual + self.neutral:
            raise ValueError(
                f"RrmAugment.non_contextual={self.non_contextual} and neutral={self.neutral} must be 0 or more, "
                "and not both 0"
            )

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        pool: dict[str, list[Row]] = {}
        for row in sorted((r for r in examples if is_pair(r)), key=lambda r: r["example_id"]):
            pool.setdefault(row["prompt_id"], []).append(row)
        prompts = sorted(pool)
        kept: list[Row] = []
        for row in examples:
            kept.append(row)
            if is_pair(row):
                kept += self._more(row, pool, prompts, chance("rrm", context.seed, row["example_id"]))
        return kept, {}

    def _more(self, row: Row, pool: dict[str, list[Row]], prompts: list[str], draw: random.Random) -> list[Row]:
        others = _strangers(row, pool, prompts, self.non_contextual + 2 * self.neutral, draw)
        made = []
        for number, other in enumerate(others[: self.non_contextual]):
            made.append(_pair(row, f"non-contextual {number}", _any_side(row, draw), other) | {"q": 1.0})
        rest = others[self.non_contextual :]
        for number, (one, other) in enumerate(zip(rest[::2], rest[1::2], strict=False)):
            made.append(_pair(row, f"neutral {number}", one, other) | {"q": 0.5})
        return made


def _strangers(
    row: Row, pool: dict[str, list[Row]], prompts: list[str], count: int, draw: random.Random
) -> list[tuple[Row, str]]:
    """``count`` answers (row, side) to different prompts, none of them that of ``row``; fewer where there are fewer."""
    drawn = draw.sample(prompts, min(count + 1, len(prompts)))
    return [_any_side(draw.choice(pool[p]), draw) for p in [p for p in drawn if p != row["prompt_id"]][:count]]


def _any_side(row: Row, draw: random.Random) -> tuple[Row, str]:
    return row, draw.choice(("chosen", "rejected"))


def _pair(row: Row, name: str, chosen: tuple[Row, str], rejected: tuple[Row, str]) -> Row:
    """A new example on the prompt of ``row`` out of two answers, without scores and gold."""
    made: Row = {key: row[key] for key in ("prompt_id", "messages", "prompt_ids")}
    made |= {"example_id": short_digest("rrm", row["example_id"], name), "tag": "augmented"}
    for side, (source, origin) in (("chosen", chosen), ("rejected", rejected)):
        made |= {
            side: source[origin],
            f"{side}_ids": source[f"{origin}_ids"],
            f"{side}_truncated": source.get(f"{origin}_truncated"),
            f"{side}_sample_id": source.get(f"{origin}_sample_id"),
        }
    return made
