"""All answers of a prompt as one example, for objectives that read a whole ranking."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from align_loop.builders.pair import Built, about, undecided
from align_loop.groups import Group
from align_loop.record import short_digest


@dataclass
class WholeGroup:
    """One example of kind group a prompt, its answers in the order of ``k`` with their scores.

    Prompts with one answer, or with equal scores only, make none: there is nothing to tell apart.
    """

    def build(self, groups: list[Group], seed: int) -> Built:
        examples, dropped = [], Counter()
        for group in groups:
            if reason := undecided(group):
                dropped[reason] += 1
                continue
            ids = [answer["sample_id"] for answer in group.answers]
            columns = {
                "kind": "group",
                "group_sample_ids": ids,
                "group_ids": [answer["token_ids"] for answer in group.answers],
                "group_scores": group.rewards,
            }
            examples.append(about(group, group.answers[0], short_digest("group", *ids)) | columns)
        return examples, dropped
