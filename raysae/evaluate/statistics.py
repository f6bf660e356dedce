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
    return percentile_interval(statistic(bootstrap_totals(sums, resamples, seed)), confidence)


def bootstrap_totals(sums: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """Totals [resamples, columns] over groups drawn with replacement; for several statistics of the same resamples.

    Arguments as of `bootstrap_interval`. All nan for fewer than two groups; so is a column with a sum that is not finite.
    """
    groups = sums.shape[0]
    if groups < 2:
        return np.full((resamples, sums.shape[1]), np.nan)
    sums = np.where(np.isfinite(sums).all(0), sums, np.nan)
    rng = np.random.default_rng(seed)
    chunk = max(1, min(resamples, 4_000_000 // groups))
    parts = []
    for start in range(0, resamples, chunk):
        n = min(chunk, resamples - start)
        weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=n)  # [n, groups]
        parts.append(weights @ sums)
    return np.concatenate(parts)


def percentile_interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """The middle `confidence` of values [resamples]; (nan, nan) if any is nan."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
