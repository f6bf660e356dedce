"""Linear probes: logistic regression on all columns or on k of them, cross-validated by group, and their scores.

All rows of a group lie in one fold. What a probe may choose (columns, regularisation) it chooses inside the training folds.
Scores: macro-F1, balanced accuracy (chance is 1 / classes), AUROC (a class against the rest; mean over classes and folds).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from raysae.evaluate.statistics import auroc

MAX_ITERATIONS = 300


@dataclass(frozen=True)
class Settings:
    """How probes are fitted and scored."""

    split: str = "test"
    rows: int = 4000
    """Most rows per label: of every group about as many, drawn at random."""
    folds: int = 5
    inner_folds: int = 3
    """Folds within the training folds that choose C."""
    ks: tuple[int, ...] = (1, 2, 5, 16)
    """Columns of the k-sparse probes."""
    cs: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    """Inverse strengths of the L2 penalty to choose from, columns scaled to unit variance."""
    bootstrap: int = 500
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """Out-of-fold class probabilities [n, classes], and per fold the chosen columns, C, and whether it converged."""

    probabilities: np.ndarray
    columns: list[list[int]]
    cs: list[float]
    converged: list[bool]

    @property
    def c(self) -> float | None:
        """The median C over the folds; None where nothing was fitted."""
        return float(np.median(self.cs)) if self.cs else None


@dataclass(frozen=True)
class Scored:
    """Values [1 + resamples] by score, the first from all rows; confusion counts [groups, classes, classes]."""

    values: dict[str, np.ndarray]
    confusion: np.ndarray


def group_folds(groups: np.ndarray, folds: int) -> np.ndarray:
    """The fold [n] in which each row is held out: groups go whole."""
    fold = np.empty(len(groups), np.int64)
    for number, (_, held) in enumerate(GroupKFold(folds).split(groups, groups=groups)):
        fold[held] = number
    return fold


def cross_validate(
    x: Any, y: np.ndarray, groups: np.ndarray, fold: np.ndarray, settings: Settings, k: int | None = None
) -> Fit:
    """Fit on all folds but one, predict that one. x [n, d] dense or sparse; y [n] codes 0..classes-1; fold [n].

    k: use the k columns, chosen on the training rows, whose class mean differs most from the mean of the other classes,
    in standard deviations (the largest over classes). C has the best balanced accuracy on inner folds by group.
    """
    fit = Fit(np.zeros((len(y), y.max() + 1)), [], [], [])
    for number in np.unique(fold):
        train, held = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        scaler = StandardScaler(with_mean=not sparse.issparse(x)).fit(x[train])
        known, new = scaler.transform(x[train]), scaler.transform(x[held])
        if k is not None:
            columns = largest_differences(known, y[train], k)
            known, new = known[:, columns], new[:, columns]
            fit.columns.append(columns.tolist())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
            c = _choose_c(known, y[train], groups[train], settings)
            model = _regression(c).fit(known, y[train])
        fit.probabilities[np.ix_(held, model.classes_)] = model.predict_proba(new)
        fit.cs.append(c)
        fit.converged.append(bool((model.n_iter_ < MAX_ITERATIONS).all()))
    return fit


def majority(y: np.ndarray, fold: np.ndarray) -> Fit:
    """Predict the class frequencies of the training folds."""
    frequencies = np.stack(
        [np.bincount(y[fold != f], minlength=y.max() + 1) / (fold != f).sum() for f in np.unique(fold)]
    )
    return Fit(frequencies[fold], [], [], [])


def largest_differences(x: Any, y: np.ndarray, k: int) -> np.ndarray:
    """The k columns of x [n, d] with the largest |mean in a class - mean in the others| over the classes y [n]."""
    inside = (y == np.arange(y.max() + 1)[:, None]).astype(np.float64)  # [classes, n]
    counts = inside.sum(1, keepdims=True)
    sums = (x.T @ inside.T).T
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = sums / counts - (sums.sum(0) - sums) / (len(y) - counts)
    return np.argsort(-np.nanmax(np.abs(difference), axis=0), kind="stable")[:k]


def score(fit: Fit, y: np.ndarray, groups: np.ndarray, fold: np.ndarray, weights: np.ndarray) -> Scored:
    """Scores of out-of-fold predictions under `group_weights` [1 + resamples, groups]; groups [n] are codes."""
    classes = fit.probabilities.shape[1]
    confusion = np.zeros((weights.shape[1], classes, classes))
    np.add.at(confusion, (groups, y, fit.probabilities.argmax(1)), 1)
    totals = np.tensordot(weights, confusion, 1)
    areas = np.full((classes, fold.max() + 1, len(weights)), np.nan)
    for number in np.unique(fold):
        held = np.flatnonzero(fold == number)
        of_rows = weights[:, groups[held]]
        for c in range(classes):
            areas[c, number] = auroc(fit.probabilities[held, c], y[held] == c, of_rows)
    with warnings.catch_warnings():  # a class that a resample lacks in every fold
        warnings.simplefilter("ignore", RuntimeWarning)
        area = np.nanmean(np.nanmean(areas, axis=1), axis=0)
    mean_recall = np.nanmean(recall(totals), axis=-1)
    return Scored({"macro_f1": macro_f1(totals), "balanced_accuracy": mean_recall, "auroc": area}, confusion)


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean over the classes that occur of 2 TP / (actual + predicted); confusion [..., actual, predicted]."""
    correct, actual = np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1)
    predicted = confusion.sum(-2)
    f1 = 2 * correct / np.maximum(actual + predicted, 1)
    return np.nanmean(np.where(actual > 0, f1, np.nan), axis=-1)


def recall(confusion: np.ndarray) -> np.ndarray:
    """Share of each class's rows that are predicted as it [..., classes]; nan for a class that does not occur."""
    with np.errstate(invalid="ignore"):
        return np.diagonal(confusion, axis1=-2, axis2=-1) / confusion.sum(-1)


def _choose_c(x: Any, y: np.ndarray, groups: np.ndarray, settings: Settings) -> float:
    """The C with the best balanced accuracy over inner folds by group; of equals the smallest."""
    if len(settings.cs) == 1:
        return settings.cs[0]
    total = np.zeros(len(settings.cs))
    for train, held in GroupKFold(settings.inner_folds).split(x, y, groups):
        model = _regression(settings.cs[0], warm_start=True)
        for i, c in enumerate(settings.cs):
            model.set_params(C=c).fit(x[train], y[train])
            confusion = confusion_matrix(y[held], model.predict(x[held]), labels=model.classes_)
            total[i] += np.nanmean(recall(confusion))  # over the classes that the fold has
    return settings.cs[int(total.argmax())]


def _regression(c: float, warm_start: bool = False) -> LogisticRegression:
    return LogisticRegression(C=c, class_weight="balanced", max_iter=MAX_ITERATIONS, tol=1e-3, warm_start=warm_start)
