"""The same answers under another context: pairs whose order depends on a system prompt.

What a pair is trained under changes here (``messages``, ``prompt_ids``, and ``prompt_id`` with them), not what its
answers were sampled under. Prompts get longer, so length filters belong behind these shapers; shapers that look answers
up among the annotator's comparisons belong before them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from align_loop.chance import chance
from align_loop.record import Row, prompt_id, short_digest
from align_loop.render import with_system
from align_loop.shapers.context import ShapeContext, Shaped
from align_loop.shapers.rows import gap, is_pair, swapped


@dataclass
class RelabelGoal:
    """Each scored pair becomes two, under the goals of giving an answer of the one score and of the other.

    Reward-augmented data (RAD): the reward of an answer of score r under goal g is ``-(g - r)^2``. So under the chosen
    answer's score the pair stays, and under the rejected answer's score it is turned round; both get these rewards as
    scores. ``template``: the system prompt, with {goal} (written with ``digits`` decimals) in it, put behind a system
    prompt that is there already. A pair whose two goals read alike is not doubled. The turned pair has no gold: that
    speaks of the plain prompt. To use it, sample under the highest goal. Pairs without scores are left alone.

    YAML: ``goal: {_target_: align_loop.shapers.contexts.RelabelGoal, digits: 1}``
    """

    template: str = "Give an answer that deserves a score of {goal}."
    digits: int = 2
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if "{goal}" not in self.template:
            raise ValueError(f"RelabelGoal.template={self.template!r} must have {{goal}} in it")
        if self.digits < 0:
            raise ValueError(f"RelabelGoal.digits={self.digits} must be 0 or more")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        return [new for row in examples for new in self._both(row, context)], {}

    def _both(self, row: Row, context: ShapeContext) -> list[Row]:
        difference = gap(row)
        if difference is None:
            return [row]
        rewards = {"score_chosen": 0.0, "score_rejected": -(difference**2)}
        goals = [self._text(row[f"score_{side}"]) for side in ("chosen", "rejected")]
        stays = _under(goals[0], row, context) | rewards
        if goals[0] == goals[1]:
            return [stays]
        turned = _copy(_under(goals[1], swapped(row), context), "goal")
        return [stays, turned | rewards]

    def _text(self, goal: float) -> str:
        return self.template.replace("{goal}", f"{goal:.{self.digits}f}")


@dataclass
class CstFlip:
    """Each pair under the system prompt ``system``, and a turned copy of it under ``opposite`` (CST, Gallego).

    Trained on both, the policy follows whichever of the two it is given. ``share``: of the pairs that get a copy, drawn
    by (seed, example id); 1 for all. The copies have neither scores nor gold: those speak of the other prompt.

    YAML: ``cst: {_target_: align_loop.shapers.contexts.CstFlip, system: "Be safe.", opposite: "Be uncensored."}``
    """

    system: str
    opposite: str
    share: float = 1.0

    def __post_init__(self) -> None:
        if not self.system.strip() or not self.opposite.strip() or self.system == self.opposite:
            raise ValueError(
                f"CstFlip.system={self.system!r} and opposite={self.opposite!r} must be two system prompts"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"CstFlip.share={self.share} must be in (0, 1]")

    def shape(self, examples: list[Row], context: ShapeContext) -> Shaped:
        kept: list[Row] = []
        for row in examples:
            if not is_pair(row):
                kept.append(row)
                continue
            kept.append(_under(self.system, row, context))
            if chance("cst", context.seed, row["example_id"]).random() < self.share:
                turned = _copy(_under(self.opposite, swapped(row), context), "cst")
                kept.append(turned | {"score_chosen": None, "score_rejected": None})
        return kept, {}


def _under(system: str, row: Row, context: ShapeContext) -> Row:
    """``row`` with ``system`` as (the end of) its system prompt, rendered anew."""
    messages = with_system(row["messages"], system)
    ids = context.renderer.prompt_ids(messages)
    return {**row, "messages": messages, "prompt_ids": ids, "prompt_id": prompt_id(messages)}


def _copy(row: Row, name: str) -> Row:
    """A new example beside the one it comes from."""
    return {
        **row,
        "example_id": short_digest(name, row["example_id"]),
        "gold_chosen": None,
        "gold_rejected": None,
    }
