"""The drift guard: has the self-annotating loop begun to feed on its own mistakes?

In practice nobody has gold labels, so the guard looks at what a user has: held-out seed labels that no step trained
on, and the answers themselves. A plain "lower than before" would trip in most healthy runs, so it asks for evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align_loop.evaluators.statistics import Z95_ONE_SIDED, paired_upper_bound, wilson_interval


@dataclass(frozen=True)
class DriftGuard:
    """When the guard trips.

    ``margin``: how much judge accuracy may fall; ``most_cut``: share of answers cut at the limit;
    ``least_distinct``: what has to be left of the start's distinct-2.
    """

    margin: float = 0.05
    most_cut: float = 0.5
    least_distinct: float = 0.5

    def check(self, baseline: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
        """Why ``now`` has drifted from ``baseline``, in a sentence, or None.

        Both: ``heldout`` (example id -> whether the judge agreed, 0 or 1), ``truncated_share``, ``distinct_2``.
        """
        return self._judge(baseline["heldout"], now["heldout"]) or self._answers(baseline, now)

    def _judge(self, before: Mapping[str, float], now: Mapping[str, float]) -> str | None:
        ids = sorted(before.keys() & now.keys())
        if not ids:
            return None
        right = sum(now[i] for i in ids)
        bound = paired_upper_bound([before[i] for i in ids], [now[i] for i in ids])
        if bound < -self.margin:
            fall = sum(before[i] for i in ids) / len(ids), right / len(ids)
            change = f"fell from {fall[0]:.2f} to {fall[1]:.2f}"
            return f"judge accuracy on held-out labels {change} (95 % bound of the change: {bound:+.2f})"
        high = wilson_interval(round(right), len(ids), Z95_ONE_SIDED)[1]
        if high < 0.5:
            share = right / len(ids)
            return f"judge accuracy on held-out labels is {share:.2f}, worse than a coin (95 % bound: {high:.2f})"
        return None

    def _answers(self, baseline: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
        if now["truncated_share"] is not None and now["truncated_share"] > self.most_cut:
            return f"{now['truncated_share']:.0%} of the answers are cut at the length limit"
        before, after = baseline["distinct_2"], now["distinct_2"]
        if before and after is not None and after < self.least_distinct * before:
            return f"answers repeat themselves: distinct-2 fell from {before:.3f} to {after:.3f}"
        return None
