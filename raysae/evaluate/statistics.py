"""Intervals: the percentile bootstrap over groups, the unit that a split may not cut."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]


def bootstrap_interval(
    sums: np.ndarray, statistic: Statistic, resamples: int, confidence: float, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a statistic of sums, resampling groups with replacement (Efron & Tibshirani 1993, §13.3).

    sums: [groups, columns], additive per group. statistic: maps totals [resamples, columns] to values [resamples].
    Returns (nan, nan) for fewer than two groups, where nothing can be said. Same seed, same resamples, so that intervals
    of SAEs measured on the same groups are paired.
    """
    groups = sums.shape[0]
    if groups < 2 or not np.isfinite(sums).all():
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    chunk = max(1, min(resamples, 4_000_000 // groups))
    values = []
    for start in range(0, resamples, chunk):
        n = min(chunk, resamples - start)
        weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=n)  # [n, groups]
        values.append(statistic(weights @ sums))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
    return float(low), float(high)
