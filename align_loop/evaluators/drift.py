"""The drift guard: has the self-annotating loop begun to feed on its own mistakes?

In practice nobody has gold labels, so the guard looks at what a user has: held-out seed labels that no step trained
on, the answers themselves, and what the initial policy thinks of them. A plain "lower than before" would trip in most
healthy runs, so it asks for evidence.

Held-out labels alone see a collapse late or never: they are pairs that people wrote or the initial policy sampled, and
a judge can keep ordering those while the policy answers with something else, for which the implicit reward has no
bound. The *implausible share* sees it at once: a healthy policy prefers some of the initial policy's answers to others,
so hardly any answer of its own is one the initial policy would not give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align_loop.evaluators.statistics import Z95_ONE_SIDED, paired_upper_bound, wilson_interval


@dataclass(frozen=True)
class DriftGuard:
    """When the guard trips.

    ``margin``: how much judge accuracy may fall; ``most_cut``: share of answers cut at the limit;
    ``least_distinct``: what has to be left of the start's distinct-2; ``most_implausible``: share of answers that the
    initial policy finds implausible. Accuracy and implausible share trip by the one-sided 95 % bound.
    """

    margin: float = 0.05
    most_cut: float = 0.5
    least_distinct: float = 0.5
    most_implausible: float = 0.1

    def __post_init__(self) -> None:
        for name in ("margin", "most_cut", "least_distinct", "most_implausible"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"guard.{name}={value} must be in [0, 1], a share")

    def check(self, baseline: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
        """Why ``now`` has drifted from ``baseline``, in a sentence, or None.

        Both: ``heldout`` (example id -> whether the judge agreed, 0 or 1), ``truncated_share``, ``distinct_2``; ``now``
        also ``implausible_share`` and ``answers`` (their number).
        """
        return (
            self._judge(baseline["heldout"], now["heldout"])
            or self._answers(baseline, now)
            or self._plausibility(now["implausible_share"], now["answers"])
        )

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

    def _plausibility(self, share: float | None, answers: int) -> str | None:
        if share is None:
            return None
        low = wilson_interval(round(share * answers), answers, Z95_ONE_SIDED)[0]
        if low <= self.most_implausible:
            return None
        return f"the initial policy would hardly give {share:.0%} of the answers (95 % bound: {low:.0%})"


def implausible_share(initial: Mapping[str, float], now: Mapping[str, float]) -> float | None:
    """The share of answers that are less likely than 99 % of the initial policy's own; None where there are none.

    Both: prompt id -> mean log-prob per token (nats) of the answer under the *initial* policy. The initial policy's own
    share is 0.01 by construction, that of a policy which only prefers some of its answers to others is near 0.
    """
    if not initial or not now:
        return None
    own = sorted(initial.values())
    limit = own[math.floor(0.01 * (len(own) - 1))]
    return sum(value < limit for value in now.values()) / len(now)
