"""One training pair from two sampled answers to the same prompt: what every builder of pairs shares.

A builder is a dataclass with ``build(groups, seed) -> (examples, dropped)``: rows of ``record.EXAMPLES`` in prompt
order, and the number of prompts that made no example, by reason.
"""

from __future__ import annotations

from align_loop.groups import Group
from align_loop.record import Row, short_digest

NO_ANSWER, ONE_ANSWER, TIE = "no answer", "only one answer", "tied scores"


def pair(group: Group, chosen: int, rejected: int) -> Row:
    """The example in which answer ``chosen`` of ``group`` (an index) is preferred to answer ``rejected``."""
    first, second = group.answers[chosen], group.answers[rejected]
    row: Row = {
        "example_id": short_digest("pair", first["sample_id"], second["sample_id"]),
        "tag": "self",
        "prompt_id": group.prompt["prompt_id"],
        "messages": group.prompt["messages"],
        "prompt_ids": first["prompt_token_ids"],
    }
    for side, answer, index in (("chosen", first, chosen), ("rejected", second, rejected)):
        row |= {
            f"{side}_sample_id": answer["sample_id"],
            side: answer["text"],
            f"{side}_ids": answer["token_ids"],
            f"{side}_truncated": answer["finish_reason"] == "length",
            f"score_{side}": group.rewards[index],
        }
    return row
