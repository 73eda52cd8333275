"""One training pair from two sampled answers to the same prompt: what every builder of pairs shares.

A builder is a dataclass with ``build(groups, seed) -> (examples, dropped)``: rows of ``record.EXAMPLES`` in prompt
order, and the number of prompts that made no example, by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from align_loop.groups import Group
from align_loop.record import Row, short_digest

NO_ANSWER, ONE_ANSWER, TIE = "no answer", "only one answer", "tied scores"

Built = tuple[list[Row], Counter[str]]


def pair(group: Group, chosen: int, rejected: int) -> Row:
    """The example in which answer ``chosen`` of ``group`` (an index) is preferred to answer ``rejected``."""
    first, second = group.answers[chosen], group.answers[rejected]
    row = about(group, first, short_digest("pair", first["sample_id"], second["sample_id"]))
    return row | side(group, "chosen", chosen) | side(group, "rejected", rejected)


def about(group: Group, answer: Row, example_id: str) -> Row:
    """What an example of any kind says about its prompt; ``answer``: one of those that it is made of."""
    return {
        "example_id": example_id,
        "tag": "self",
        "prompt_id": group.prompt["prompt_id"],
        "messages": group.prompt["messages"],
        "prompt_ids": answer["prompt_token_ids"],
    }


def side(group: Group, name: str, index: int) -> Row:
    """The columns of one answer on the side ``name`` (chosen or rejected)."""
    answer = group.answers[index]
    return {
        f"{name}_sample_id": answer["sample_id"],
        name: answer["text"],
        f"{name}_ids": answer["token_ids"],
        f"{name}_truncated": answer["finish_reason"] == "length",
        f"score_{name}": group.rewards[index],
    }


def undecided(group: Group) -> str | None:
    """Why no two answers of ``group`` can be told apart, or None where they can."""
    if len(group.answers) < 2:
        return ONE_ANSWER if group.answers else NO_ANSWER
    return TIE if min(group.rewards) == max(group.rewards) else None


def best_against(groups: list[Group], choose: Callable[[Group, list[int]], int]) -> Built:
    """One pair a prompt: its best answer against one that ``choose(group, worse)`` takes out of ``worse``.

    ``worse``: indices of the answers that score less than the best, from best to worst (equal scores by ``k``).
    """
    pairs, dropped = [], Counter()
    for group in groups:
        if reason := undecided(group):
            dropped[reason] += 1
            continue
        best, *others = group.ranked()
        worse = [i for i in others if group.rewards[i] < group.rewards[best]]
        pairs.append(pair(group, best, choose(group, worse)))
    return pairs, dropped
