"""Intervals and text statistics, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from statistics import correlation as pearson

Z95 = NormalDist().inv_cdf(0.975)
Z95_ONE_SIDED = NormalDist().inv_cdf(0.95)


def mean_interval(values: Sequence[float]) -> tuple[float, list[float]]:
    """(mean, [low, high]) of the 95 % interval by the normal approximation; ``values`` must not be empty."""
    mean = fmean(values)
    half = Z95 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("inf")
    return mean, [mean - half, mean + half]


def wilson_interval(right: int, total: int, z: float = Z95) -> list[float]:
    """[low, high] of a share by Wilson (1927), which holds for small counts and shares near 0 or 1."""
    if total == 0:
        return [0.0, 1.0]
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def paired_upper_bound(before: Sequence[float], now: Sequence[float]) -> float:
    """The one-sided 95 % upper bound of the mean of ``now - before``, item by item (nats, shares, ...)."""
    differences = [n - b for b, n in zip(before, now, strict=True)]
    if len(differences) < 2:
        return float("inf")
    return fmean(differences) + Z95_ONE_SIDED * stdev(differences) / math.sqrt(len(differences))


def distinct_n(token_ids: Sequence[Sequence[int]], n: int = 2) -> float | None:
    """Different n-grams over all n-grams of the answers (Li et al. 2016); None where there are none."""
    grams = [tuple(ids[i : i + n]) for ids in token_ids for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def win_rate(ours: dict[str, float], theirs: dict[str, float]) -> float | None:
    """The share of prompts in both on which ``ours`` scores higher; a draw counts a half. None without prompts."""
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    return fmean(1.0 if ours[p] > theirs[p] else 0.5 if ours[p] == theirs[p] else 0.0 for p in both)


def precision_recall(marked: set[str], wrong: set[str]) -> tuple[float | None, float | None]:
    """(share of the marked that are wrong, share of the wrong that are marked); None where undefined."""
    hit = len(marked & wrong)
    return (hit / len(marked) if marked else None), (hit / len(wrong) if wrong else None)


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Pearson's correlation; None for fewer than two values and where one side doesn't vary."""
    if len(xs) < 2 or len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    return pearson(xs, ys)


def calibration_error(margins: Sequence[float], bins: int = 10) -> float | None:
    """Expected calibration error of log-odds ``margins``, whose true sign is plus; None without any.

    The confidence sigmoid(|margin|) lies in [0.5, 1], which ``bins`` parts of equal width divide (Guo et al. 2017); a
    value on a border belongs to the upper part. The error is the mean over pairs of |share with margin > 0 - mean
    confidence| of their part. Parts with few pairs make it too large: compare models on the same pairs only.
    """
    parts: dict[int, list[tuple[float, bool]]] = {}
    for margin in margins:
        confidence = 1.0 / (1.0 + math.exp(-abs(margin)))
        place = min(int((confidence - 0.5) * 2 * bins), bins - 1)
        parts.setdefault(place, []).append((confidence, margin > 0))
    gaps = [abs(sum(right for _, right in part) - sum(c for c, _ in part)) for part in parts.values()]
    return sum(gaps) / len(margins) if margins else None
