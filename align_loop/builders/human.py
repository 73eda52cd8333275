"""Examples from labelled preferences: people's answers through the same renderer as the sampled ones."""

from __future__ import annotations

from align_loop.record import Row
from align_loop.render import Renderer


def from_preferences(preferences: list[Row], renderer: Renderer) -> list[Row]:
    """Rows of ``record.EXAMPLES`` from rows of ``record.PREFERENCES``, in their order."""
    return [
        {
            "example_id": row["example_id"],
            "tag": "human",
            "prompt_id": row["prompt_id"],
            "messages": row["messages"],
            "chosen": row["chosen"],
            "rejected": row["rejected"],
            "prompt_ids": renderer.prompt_ids(row["messages"]),
            "chosen_ids": renderer.answer_ids(row["chosen"]),
            "rejected_ids": renderer.answer_ids(row["rejected"]),
            "chosen_truncated": False,
            "rejected_truncated": False,
            "gold_chosen": row["gold_chosen"],
            "gold_rejected": row["gold_rejected"],
        }
        for row in preferences
    ]
