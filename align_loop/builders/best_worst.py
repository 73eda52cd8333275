"""Best against worst: of each prompt's scored answers, the highest and the lowest reward make a pair."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from align_loop.record import Row, short_digest

ONE_ANSWER, TIE = "only one answer", "tied scores"


@dataclass
class BestWorst:
    """One pair a prompt. Prompts with one answer, and those whose best and worst score alike, make none."""

    def build(self, prompts: list[Row], answers: list[Row], scores: dict[str, float]) -> tuple[list[Row], Counter[str]]:
        """(rows of ``record.EXAMPLES`` in prompt order, prompts that made no pair by reason).

        ``scores``: sample id -> reward. Equal rewards are ordered by ``k``, so the result depends on no order of rows.
        """
        grouped: dict[str, list[Row]] = {}
        for row in answers:
            if row["sample_id"] in scores:
                grouped.setdefault(row["prompt_id"], []).append(row)
        pairs, dropped = [], Counter()
        for prompt in prompts:
            group = sorted(grouped.get(prompt["prompt_id"], []), key=lambda a: (-scores[a["sample_id"]], a["k"]))
            if len(group) < 2:
                dropped["no answer" if not group else ONE_ANSWER] += 1
            elif scores[group[0]["sample_id"]] == scores[group[-1]["sample_id"]]:
                dropped[TIE] += 1
            else:
                pairs.append(pair(prompt, group[0], group[-1], scores))
        return pairs, dropped


def pair(prompt: Row, chosen: Row, rejected: Row, scores: dict[str, float]) -> Row:
    """One example from two sampled answers to the same prompt."""
    row: Row = {
        "example_id": short_digest("pair", chosen["sample_id"], rejected["sample_id"]),
        "tag": "self",
        "prompt_id": prompt["prompt_id"],
        "messages": prompt["messages"],
        "prompt_ids": chosen["prompt_token_ids"],
    }
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        row |= {
            f"{side}_sample_id": answer["sample_id"],
            side: answer["text"],
            f"{side}_ids": answer["token_ids"],
            f"{side}_truncated": answer["finish_reason"] == "length",
            f"score_{side}": scores[answer["sample_id"]],
        }
    return row
