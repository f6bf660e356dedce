"""Whether what a latent fires on hangs together, beside what chance gives.

Coherence is the mean over all pairs of a latent's contexts: agreement, whether both rows are of the same token; and the
cosine of the rows' activations, less the training mean that all rows share. Chance is the same mean over all pairs of
rows. Label purity is the share of the most common label; a handful of random rows agree often by luck, so its chance is
that of as many random rows, not the label's base rate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import silhouette_score

from raysae.evaluate.statistics import Bootstrap, intervals

DRAWS = 2000
"""Draws behind the purity of random rows."""
NEIGHBOURS = 5
AT_ONCE = 1024


def pair_cosine(unit_sum: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Mean cosine [...] over the pairs of n = `count` unit vectors of sum [..., d], (|Σu|² - n) / (n (n - 1)), or nan."""
    n = np.asarray(count, np.float64)
    squared = np.square(unit_sum.astype(np.float64)).sum(-1)
    return np.divide(squared - n, n * (n - 1), out=np.full(n.shape, np.nan), where=n > 1)


def pair_agreement(values: np.ndarray) -> np.ndarray:
    """Share [m] of the pairs in each row of values [m, n] that are equal; negative values are none; nan below two."""
    given = values >= 0
    same = ((values[:, :, None] == values[:, None, :]) & given[:, :, None] & given[:, None, :]).sum((1, 2))
    n = given.sum(1)
    return np.divide(same - n, n * (n - 1), out=np.full(len(n), np.nan), where=n > 1)


def chance_agreement(values: np.ndarray) -> float:
    """Share of all pairs of values [n] that are equal; nan below two."""
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    n = float(len(values))
    return float((counts * (counts - 1)).sum() / (n * (n - 1))) if n > 1 else float("nan")


class Purity(NamedTuple):
    """Label purity of each latent's contexts; nan, and mode -1, where fewer than two have a label."""

    mode: np.ndarray  # int64 [m] the most common label, the most frequent over all rows among equals
    share: np.ndarray  # [m] of the contexts that have a label
    entropy: np.ndarray  # [m] of their labels, bits
    labelled: np.ndarray  # int64 [m] how many have one
    base_rate: np.ndarray  # [m] share of that label over all rows that have one
    null: np.ndarray  # [m] the mean purity of as many random rows
    null_entropy: np.ndarray  # [m] and entropy


def label_purity(contexts: np.ndarray, rows: np.ndarray, classes: int, seed: int = 0) -> Purity:
    """Purity of label codes contexts [m, n]; rows [R] are those of all rows; negative codes are no label."""
    rate = np.bincount(rows[rows >= 0], minlength=classes) / max((rows >= 0).sum(), 1)
    counts = np.stack([(contexts == label).sum(1) for label in range(classes)], 1)  # [m, classes]
    n = counts.sum(1)
    mode = np.where(n > 1, np.argmax(counts + rate / 2, axis=1), -1)  # rates are below 1: they only settle ties
    share, entropy = _purity(np.where(n[:, None] > 1, counts, 0))
    rng, most = np.random.default_rng(seed), contexts.shape[1]
    null = np.full((2, most + 1), np.nan)
    for size in range(2, most + 1):
        null[:, size] = np.mean(_purity(rng.multinomial(size, rate, DRAWS)), axis=1)
    return Purity(mode, share, entropy, n, np.where(mode >= 0, rate[mode], np.nan), null[0, n], null[1, n])


def _purity(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest share and entropy in bits of each row of counts [m, classes]; nan for a row of zeros."""
    n = counts.sum(1, keepdims=True)
    p = np.divide(counts, n, out=np.full(counts.shape, np.nan), where=n > 0)
    return p.max(1), np.where(p > 0, p * -np.log2(np.where(p > 0, p, 1)), p).sum(1)


def silhouette(x: np.ndarray, strongest: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Silhouette (Rousseeuw 1987), by cosine distance, of rows x [n, d] as clusters of their strongest latent [n].

    Latents that lead one row only, and rows without a latent (-1), are left out. `null`: the same clusters shuffled.
    """
    _, index, counts = np.unique(strongest, return_inverse=True, return_counts=True)
    kept = (counts[index] > 1) & (strongest >= 0) & (np.abs(x).sum(1) > 0)
    labels, value, null = strongest[kept], None, None
    clusters = len(np.unique(labels))
    if 1 < clusters < len(labels):
        mixed = np.random.default_rng(seed).permutation(labels)
        value, null = (float(silhouette_score(x[kept], each, metric="cosine")) for each in (labels, mixed))
    return {"rows": len(labels), "latents": clusters, "value": value, "null": null}


def nearest(directions: np.ndarray, queries: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of unit rows [m, d]: each query's nearest other row [q], its cosine [q], and the mean over NEIGHBOURS nearest [q].

    queries [q]: which rows; all if None.
    """
    queries = np.arange(len(directions)) if queries is None else queries
    k = min(NEIGHBOURS, len(directions) - 1)
    if k < 1:
        none = np.full(len(queries), np.nan)
        return np.full(len(queries), -1), none, none
    which, cosine, mean = [], [], []
    for start in range(0, len(queries), AT_ONCE):
        part = queries[start : start + AT_ONCE]
        cosines = directions[part] @ directions.T
        cosines[np.arange(len(part)), part] = -2
        best = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(cosines, best, axis=1)
        which.append(best[np.arange(len(part)), values.argmax(1)])
        cosine.append(values.max(1))
        mean.append(values.mean(1))
    return np.concatenate(which), np.concatenate(cosine), np.concatenate(mean)


def random_nearest(latents: int, d_in: int, queries: int, seed: int = 0) -> float:
    """What the mean cosine to the NEIGHBOURS nearest is among as many random directions; over at most `queries` of them."""
    directions = np.random.default_rng(seed).standard_normal((latents, d_in), np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return float(nearest(directions, np.arange(min(queries, latents)))[2].mean())


def _mean(totals: np.ndarray) -> np.ndarray:
    return totals[:, 0] / totals[:, 1]


def means(columns: dict[str, np.ndarray], bootstrap: Bootstrap) -> dict[str, dict[str, float]]:
    """By column [m]: `value`, its mean over the latents that have it; `low`, `high`, bootstrapped over them; their `n`."""
    by_column = {}
    for name, column in columns.items():
        known = column[np.isfinite(column)].astype(np.float64)
        ends = intervals(np.stack([known, np.ones(len(known))], 1), _mean, bootstrap)
        entry = {key: float(values[0]) for key, values in ends._asdict().items()}
        by_column[name] = {**entry, "n": len(known)}
    return by_column
