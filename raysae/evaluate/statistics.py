"""Intervals and tests over groups, the unit that a split may not cut: percentile bootstrap, permutations, effect sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy  # its parts load when used: model hosts, which import this, use none

Statistic = Callable[[np.ndarray], np.ndarray]
Matrix = Any  # np.ndarray or scipy.sparse
PERMUTATIONS_AT_ONCE = 20


def bootstrap_totals(sums: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """Totals [resamples, columns] over groups drawn with replacement (Efron & Tibshirani 1993, §13.3), for any statistics.

    sums: [groups, columns], additive per group. Same seed, same resamples, so that intervals of SAEs measured on the same
    groups are paired. All nan for fewer than two groups; so is a column with a sum that is not finite.
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


def group_weights(groups: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each group counts [1 + resamples, groups]: once in the first row, the estimate; then as a bootstrap draws.

    Metrics computed from the same weights are paired: the interval of a difference is that of their differences.
    """
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=resamples)
    return np.concatenate([np.ones((1, groups)), drawn])


def interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Percentile interval of a metric computed from `group_weights`; its first entry, the estimate, is left out."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(values[1:], [tail, 1 - tail])
    return float(low), float(high)


def auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, P(a positive row scores higher), ties half, for each row of weights [m, n]: [m].

    nan where a class has no weight.
    """
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])  # of each distinct score
    weights, positive = weights[:, order], positive[order]
    pos = np.add.reduceat(weights * positive, starts, axis=1)
    neg = np.add.reduceat(weights * ~positive, starts, axis=1)
    with np.errstate(invalid="ignore"):
        return (pos * (np.cumsum(neg, axis=1) - neg / 2)).sum(1) / (pos.sum(1) * neg.sum(1))


def paired_permutation(
    a: np.ndarray, b: np.ndarray, statistic: Statistic, permutations: int = 999, seed: int = 0
) -> float:
    """Two-sided p of statistic(Σa) - statistic(Σb) when each group's a and b [groups, columns] may change places."""
    both, groups = np.concatenate([a, b]), len(a)

    def difference(one: np.ndarray, two: np.ndarray, axis: int) -> np.ndarray:  # of group numbers [..., groups]
        return statistic(both[one].sum(axis - 1)) - statistic(both[two].sum(axis - 1))

    found = scipy.stats.permutation_test(
        (np.arange(groups), np.arange(groups) + groups), difference, permutation_type="samples", vectorized=True,
        n_resamples=permutations, batch=max(1, 4_000_000 // both.size), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)


def cohens_d(x: Matrix, positive: np.ndarray) -> np.ndarray:
    """Cohen's d [m, d] of each column of x [n, d], dense or sparse, for each row of positive [m, n] bool.

    d = (μ₁ - μ₀) / √((σ₁² + σ₀²)/2) with population σ; 0 for a column that does not vary.
    """
    x = x.astype(np.float64, copy=False)
    squared = x.multiply(x) if scipy.sparse.issparse(x) else np.square(x)
    means, variances = [], []
    for mask in (positive, ~positive):
        share = (mask / mask.sum(1, keepdims=True)).T
        means.append((x.T @ share).T)
        variances.append((squared.T @ share).T - means[-1] ** 2)
    spread = np.sqrt(np.maximum(variances[0] + variances[1], 0) / 2)
    return np.divide(means[0] - means[1], spread, out=np.zeros_like(spread), where=spread > 1e-6)


def largest_d_null(x: Matrix, positive: np.ndarray, permutations: int = 200, seed: int = 0) -> np.ndarray:
    """The largest |d| over the columns of x [n, d] when the labels [m, n] are shuffled: [permutations].

    It is what the largest of so many effect sizes is when there is none. Rows must be independent of each other.
    """
    rng, n = np.random.default_rng(seed), positive.shape[1]
    largest = []
    for start in range(0, permutations, PERMUTATIONS_AT_ONCE):
        orders = [rng.permutation(n) for _ in range(min(PERMUTATIONS_AT_ONCE, permutations - start))]
        d = cohens_d(x, np.concatenate([positive[:, order] for order in orders]))
        largest.append(np.abs(d).reshape(len(orders), -1).max(1))
    return np.concatenate(largest)
