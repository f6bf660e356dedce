"""Intervals and tests over groups, the unit that a split may not cut: bootstrap, permutations, effect sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import scipy  # its parts load when used: model hosts, which import this, use none

Statistic = Callable[[np.ndarray], np.ndarray]
Matrix = Any  # np.ndarray or scipy.sparse
PERMUTATIONS_AT_ONCE = 20
AT_ONCE = 4_000_000
STEP = 1e-3
"""Of a column's Σs² under the root, the step of a derivative: small beside its total, large beside rounding."""
ROUNDING = 1e-14
"""A variance below this part of the columns' own is rounding: the statistic does not vary."""


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: groups drawn so many times, what share of intervals hold the truth, and the draws' seed."""

    resamples: int
    confidence: float
    seed: int


class Intervals(NamedTuple):
    """Estimates and the ends of their intervals, each [metrics]."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def intervals(samples: np.ndarray | Sequence[np.ndarray], statistic: Statistic, bootstrap: Bootstrap) -> Intervals:
    """Bootstrap-t intervals by group of statistics of totals (Efron & Tibshirani 1993, §12.5).

    samples: sums [groups, columns], additive per group; or several, of independent groups, their columns side by side.
    statistic: of totals [n, columns], [n, metrics] or [n]; smooth in them, such as a ratio, or a difference of two. A pair
    of SAEs measured on the same groups goes in side by side, and the interval of their difference is paired.

    In each resample t is (estimate - that of all groups) / its standard error, which comes from the groups' influences
    (infinitesimal jackknife, the gradient by central differences). With few or unequal groups the standard error falls
    where the estimate does, so that percentiles of the estimate alone cover too little: `benchmarks/coverage.py`. Ends may
    lie outside of a metric's range. nan below two groups; so is a metric of a column with a sum that is not finite.
    """
    parts = [samples] if isinstance(samples, np.ndarray) else list(samples)
    finite = np.concatenate([np.isfinite(part).all(0) for part in parts])
    parts = [np.where(np.isfinite(part).all(0), part, 0.0) for part in parts]
    columns = len(finite)
    scale = np.concatenate([np.sqrt(np.square(part).sum(0)) for part in parts])
    step = STEP * np.where(scale > 0, scale, 1.0)
    moved = np.concatenate([np.zeros((1, columns)), np.diag(step), -np.diag(step)])
    products = [_products(part) for part in parts]

    def measure(weights: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Estimates [n, metrics] and their standard errors where groups count as `weights` [n, groups] say."""
        drawn = [w @ part for w, part in zip(weights, parts, strict=True)]
        totals = np.where(finite, np.concatenate(drawn, axis=1), np.nan)
        values = statistic((totals + moved[:, None]).reshape(-1, columns)).reshape(len(moved), len(totals), -1)
        slopes = (values[1 : columns + 1] - values[columns + 1 :]) / (2 * step[:, None, None])
        slopes = np.ascontiguousarray(slopes.transpose(1, 0, 2))  # [n, columns, metrics]
        variance, first = np.zeros(values.shape[1:]), 0
        for w, part, product, total in zip(weights, parts, products, drawn, strict=True):
            groups, width = part.shape
            slope = slopes[:, first : (first := first + width)]
            upper = np.triu_indices(width)
            second = np.empty((len(w), width, width))  # Σ of a group's sums by its sums
            second[:, upper[0], upper[1]] = second[:, upper[1], upper[0]] = w @ product
            about = (slope * (second @ slope)).sum(1) - (total[:, :, None] * slope).sum(1) ** 2 / groups
            variance += about * groups / max(groups - 1, 1)
        rounding = ROUNDING * np.square(slopes * scale[:, None]).sum(1)
        return values[0], np.sqrt(np.where(variance <= rounding, 0.0, variance))

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value, error = (of_all[0] for of_all in measure([np.ones((1, len(part))) for part in parts]))
        if min(map(len, parts)) < 2:
            return Intervals(value, *np.full((2, len(value)), np.nan))
        rngs = [np.random.default_rng(bootstrap.seed + i) for i in range(len(parts))]
        at_once = max(1, AT_ONCE // max(*map(len, parts), columns * (2 * columns + 1)))
        ts = []
        for start in range(0, bootstrap.resamples, at_once):
            n = min(at_once, bootstrap.resamples - start)
            values, errors = measure([_draw(rng, len(part), n) for rng, part in zip(rngs, parts, strict=True)])
            ts.append(np.where(values == value, 0.0, (values - value) / errors))
    tail = (1 - bootstrap.confidence) / 2
    t = np.quantile(np.concatenate(ts), [1 - tail, tail], axis=0, method="inverted_cdf")  # of inf too
    with np.errstate(invalid="ignore"):
        low, high = (np.where(error == 0, value, value - end * error) for end in t)
    return Intervals(value, low, high)


def _products(part: np.ndarray) -> np.ndarray:
    """Products of each two columns [groups, columns (columns + 1) / 2] of sums [groups, columns]."""
    one, two = np.triu_indices(part.shape[1])
    return part[:, one] * part[:, two]


def _draw(rng: np.random.Generator, groups: int, resamples: int) -> np.ndarray:
    """How often each group is drawn [resamples, groups]."""
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(np.float64)


def effective_groups(sizes: np.ndarray) -> float:
    """How many groups of one size say as much as groups of these sizes [groups], (Σn)² / Σn² (Kish 1965, §11.7); or 0."""
    sizes = np.asarray(sizes, np.float64)
    squared = np.square(sizes).sum()
    return float(sizes.sum() ** 2 / squared) if squared > 0 else 0.0


def group_weights(groups: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each group counts [1 + resamples, groups]: once in the first row, the estimate; then as a bootstrap draws.

    Metrics computed from the same weights are paired: the interval of a difference is that of their differences.
    """
    return np.concatenate([np.ones((1, groups)), _draw(np.random.default_rng(seed), groups, resamples)])


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

    test = scipy.stats.permutation_test(
        (np.arange(groups), np.arange(groups) + groups), difference, permutation_type="samples", vectorized=True,
        n_resamples=permutations, batch=max(1, 4_000_000 // both.size), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(test.pvalue)


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


def centred_ranks(x: Matrix) -> scipy.sparse.csc_matrix:
    """Ranks of each column of x [n, d], ties in the middle, less the rank of a zero: sparse where x is."""
    centred = scipy.sparse.csc_matrix(x, dtype=np.float64, copy=True)
    centred.eliminate_zeros()
    for start, end in pairwise(centred.indptr):
        values = centred.data[start:end]
        below, zeros = (values < 0).sum(), centred.shape[0] - len(values)
        of_zero = below + (zeros + 1) / 2
        ranks = scipy.stats.rankdata(values) + np.where(values > 0, zeros, 0)
        centred.data[start:end] = ranks - of_zero
    return centred


class RankScores:
    """Wilcoxon's rank-sum of each column of x [n, d] for classes [m, n] bool, standardised by its variance over all
    permutations of the labels (ties included; Hollander et al. 2014, §4.1): z of mean 0 and variance 1 under shuffled
    labels, whatever the share of zeros, however few the class or constant the column in it.
    """

    def __init__(self, x: Matrix) -> None:
        self.n, self.ranks = x.shape[0], centred_ranks(x)
        self._mean = np.asarray(self.ranks.mean(0)).ravel()
        squared = np.asarray(self.ranks.multiply(self.ranks).mean(0)).ravel()
        self._variance = np.maximum(squared - self._mean**2, 0)

    def z(self, positive: np.ndarray) -> np.ndarray:
        """[m, d]; 0 for a column that does not vary."""
        inside = positive.sum(1, keepdims=True)
        above = (self.ranks.T @ positive.T.astype(np.float64)).T - inside * self._mean
        spread = np.sqrt(inside * (self.n - inside) / (self.n - 1) * self._variance)
        return np.divide(above, spread, out=np.zeros_like(above), where=spread > 0)

    def auroc(self, positive: np.ndarray) -> np.ndarray:
        """P(a row of the class ranks above one outside of it), ties half [m, d]."""
        inside = positive.sum(1, keepdims=True)
        mean = (self.ranks.T @ positive.T.astype(np.float64)).T / inside
        return 0.5 + (mean - self._mean) / (self.n - inside)

    def largest_null(self, positive: np.ndarray, permutations: int, seed: int = 0) -> np.ndarray:
        """The largest |z| over columns and classes when the labels are shuffled: [permutations].

        It is what the largest of so many is when there is nothing. Rows must be independent of each other.
        """
        rng, largest = np.random.default_rng(seed), []
        for start in range(0, permutations, PERMUTATIONS_AT_ONCE):
            orders = [rng.permutation(self.n) for _ in range(min(PERMUTATIONS_AT_ONCE, permutations - start))]
            z = self.z(np.concatenate([positive[:, order] for order in orders]))
            largest.append(np.abs(z).reshape(len(orders), -1).max(1))
        return np.concatenate(largest)


def family_wise_p(statistics: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """P that the largest of shuffled labels is at least each of these statistics, in their shape (Westfall & Young 1993).

    Of all that have p <= 0.05, any is a false one with probability 0.05 at most.
    """
    above = len(largest) - np.searchsorted(np.sort(largest), statistics - 1e-9)
    return (1 + above) / (1 + len(largest))
