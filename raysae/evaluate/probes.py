"""Probes: what can be read linearly from an SAE's latents, beside everything that it must be compared with.

A probe is a logistic regression, dense or on k columns, cross-validated by group: all rows of a group lie in one fold. What
a probe may choose (columns, regularisation) it chooses inside the training folds. Latents are `SAE.encode`'s, after the
nonlinearity. Every probe of a label runs on the same rows, folds and bootstrap resamples, so that differences are paired:

majority        class frequencies of the training folds
position        position in the sequence, one-hot and as a number
token           one-hot token id
bigram          one-hot token id, the one before, and the pair
raw             the activations that the SAE reads
sae             its latents
shuffled        its latents with the labels of other parts (examples, for a label of whole examples); mean of 5 shuffles
random_sae      latents of the SAE as it was before training, from another seed
untrained_model latents of an SAE of an untrained model, on the same tokens; where that null was measured, or a run is given

Scores: macro-F1, balanced accuracy (chance is 1 / classes), AUROC (one against the rest, mean over classes and folds),
each with a percentile interval over groups. Selectivity = macro-F1 - that of the same probe on a control task: a label
drawn at random for each word type (token id), as often as the true ones are, so that only a probe that learns words by
heart solves it (Hewitt & Liang 2019, §2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse, stats

from raysae.activations.store import Store
from raysae.data.duplicates import near_duplicates
from raysae.data.labels import label_rows, part_labels
from raysae.data.records import Problem
from raysae.errors import UserError
from raysae.evaluate.linear import Fit, Scored, Settings, cross_validate, group_folds, macro_f1, majority, recall, score
from raysae.evaluate.nulls import random_sae
from raysae.evaluate.statistics import RankScores, cohens_d, family_wise_p, group_weights, interval, paired_permutation
from raysae.files import write_atomic, write_json
from raysae.progress import Progress
from raysae.sae.formats import load
from raysae.sae.sae import SAE

ROWS_AT_ONCE = 4096
SURFACE = {"position": "the position", "token": "the token id", "bigram": "two token ids"}
"""Baselines that take no model, and what they are called in a flag."""
SCORES = ("macro_f1", "balanced_accuracy", "auroc")
NOT_GIVEN = "not measured: add untrained_model to evaluation.nulls, or give --untrained, a run on an untrained model"
CONTROL_ABOVE_CHANCE = 0.05
"""Balanced accuracy above chance from which shuffled labels that can be predicted mean a leak."""
INFORMATION_GAP = 0.05
"""Macro-F1 between SAE and raw activations from which information counts as gained or lost."""
SHUFFLES = 5
"""One shuffle's balanced accuracy varies by 0.03 on 1000 rows, more than the groups of the rows explain."""
FALSE_DISCOVERIES = 0.05
PERMUTATIONS = 999
"""Shuffles of the labels over groups behind the latents' p."""
FEWEST_GROUPS = 10
"""Of a class, and of the others: with fewer nothing can be told of a latent."""
FEWEST_FIRING = 5
"""Rows, one per group, on which a latent must fire to be tested: rarer ones only raise the largest z of chance."""
DUPLICATE_SIMILARITY = 0.8
"""Similarity from which two texts are near-duplicates (`data.duplicates`)."""
DUPLICATE_CONTAINMENT = 0.4
"""Share of the shorter text's word 3-grams from which it counts as a rewording of the other; laxer than what unites groups,
for a probe learns by heart what a split may well keep apart."""


class Subject(NamedTuple):
    """An SAE, and the store and site of the activations that it reads."""

    store: Store
    site: str
    sae: SAE


def subject(store: Path, site: str, sae: Path) -> Subject:
    """The subject in these directories."""
    return Subject(Store(store), site, load(sae))


def probe(
    subject: Subject,
    problems: Sequence[Problem],
    labels: Sequence[str],
    settings: Settings,
    other: Subject | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Probe each label: a table with a row per label, input and probe; and by label sizes, gaps, leakage and effects.

    other: an SAE of an untrained model that read the same tokens. Raises UserError where the records do not belong to the
    store, the split has too few groups, or no label has two classes.
    """
    store, site, sae = subject
    rows = label_rows(with_previous(row_table(store, settings.split)), problems)
    random = random_sae(sae, store, site, settings.seed)
    tables, facts = [], {}
    with Progress("probe", len(labels), "label") as progress:
        for label in labels:
            chosen, classes, dropped = sample(rows, f"label_{label}", settings)
            facts[label] = {"classes": classes, "dropped": dropped}
            if len(classes) < 2:
                tables.append(pd.DataFrame([{"label": label, "status": "not measured: fewer than two classes"}]))
            else:
                x = read_rows(store, site, chosen)
                inputs = {**surface(chosen), "raw": x, "random_sae": latents(random, x), "sae": latents(sae, x)}
                if other is not None:
                    same = align(chosen, other.store, settings.split)
                    inputs["untrained_model"] = latents(other.sae, read_rows(other.store, other.site, same))
                table, of_label = probe_label(inputs, chosen, classes, problems, settings)
                tables.append(table.assign(label=label))
                facts[label] |= of_label
            progress.advance(1, label)
    if not any("gaps" in of_label for of_label in facts.values()):
        raise _nothing_to_probe(labels, settings.split, settings.folds)
    _adjust(facts)
    table = pd.concat(tables, ignore_index=True)
    return table[["label", *(column for column in table if column != "label")]], facts


def check_labels(problems: Sequence[Problem], labels: Sequence[str], split: str, folds: int) -> None:
    """UserError where `problems`, those of the split, leave nothing to probe, as `probe` would find after a training."""
    parts = part_labels(problems)
    parts["group"] = parts["example_id"].map({p.example_id: p.group for p in problems})
    for label in labels:
        groups = parts.dropna(subset=[f"label_{label}"]).groupby(f"label_{label}")["group"].nunique()
        if (groups >= 2 * folds).sum() > 1:
            return
    raise _nothing_to_probe(labels, split, folds)


def _nothing_to_probe(labels: Sequence[str], split: str, folds: int) -> UserError:
    return UserError(
        f"labels: none of {', '.join(labels)} has two classes with {2 * folds} groups each in the {split} split; probe a "
        "run on problems with worked lines, or another split"
    )


def write(directory: Path, table: pd.DataFrame, facts: dict[str, Any], settings: Settings, **about: Any) -> None:
    """`probes.parquet`, the table; `probes.json`, what was probed (`about`), the settings, and by label the facts."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "probes.parquet", lambda path: table.to_parquet(path, index=False))
    write_json(directory / "probes.json", {**about, "settings": asdict(settings), "labels": facts})


# ----------------------------------------------------------------------------------------------------------------------
# Rows and inputs


def row_table(store: Store, split: str) -> pd.DataFrame:
    """The columns of a split's rows, in stored order, and where each lies: `shard`, `row`."""
    parts = []
    for name in store.names(split):
        columns = store.row_columns(name).to_pandas()
        parts.append(columns.astype({"example_id": str, "group": str}).assign(shard=name, row=np.arange(len(columns))))
    if not parts:
        raise UserError(f"split: {store.path} has no {split} rows")
    return pd.concat(parts, ignore_index=True)


def sample(rows: pd.DataFrame, column: str, settings: Settings) -> tuple[pd.DataFrame, list[str], list[str]]:
    """Rows that have a label, at most `settings.rows`, its classes, and those dropped for lack of groups.

    Groups take turns, so that every group gives about as many rows; the first rows are of distinct groups. A class needs
    two groups per fold.
    """
    rows = rows[rows[column].notna()]
    groups = rows.groupby(column)["group"].nunique()
    classes = sorted(groups.index[groups >= 2 * settings.folds])
    rows = rows[rows[column].isin(classes)]
    rows = rows.iloc[np.random.default_rng(settings.seed).permutation(len(rows))]
    turn = rows.groupby("group").cumcount().to_numpy()
    rows = rows.iloc[np.argsort(turn, kind="stable")[: settings.rows]]
    if len(classes) > 1 and rows["group"].nunique() < 2 * settings.folds:
        raise UserError(f"rows: {settings.rows} rows hold too few groups for {settings.folds} folds; raise it")
    return rows.assign(label=rows[column]), classes, sorted(set(groups.index) - set(classes))


def align(rows: pd.DataFrame, store: Store, split: str) -> pd.DataFrame:
    """Where the same tokens lie in another store, joined by example_id and position; UserError where one is not there."""
    key = ["example_id", "position"]
    known = row_table(store, split)[[*key, "token_id", "shard", "row"]]
    aligned = rows[[*key, "token_id"]].merge(known, on=[*key, "token_id"], how="left", validate="many_to_one")
    if aligned["shard"].isna().any():
        raise UserError(f"untrained: {store.path} lacks tokens of this run; use the same data, split and tokenizer")
    return aligned


def read_rows(store: Store, site: str, rows: pd.DataFrame) -> np.ndarray:
    """Activations [n, d_model] float32 of rows of `row_table`, in their order."""
    x = np.empty((len(rows), store.d_model(site)), np.float32)
    at = rows["row"].to_numpy(np.int64)
    for name, places in rows.groupby("shard").indices.items():
        x[places] = store.shard(site, str(name))[torch.from_numpy(at[places])].float().numpy()
    return x


def latents(sae: SAE, x: np.ndarray) -> sparse.csr_matrix:
    """The latents [n, d_sae] that `sae.encode` gives for x [n, d_in]: after the nonlinearity, never before."""
    parts = torch.from_numpy(x).split(ROWS_AT_ONCE)
    return sparse.vstack([sparse.csr_matrix(sae.encode(part).numpy()) for part in parts], format="csr")


def one_hot(values: np.ndarray) -> sparse.csr_matrix:
    """One column [n, distinct values] per value. A value that training rows lack has a constant column there: no weight."""
    distinct, index = np.unique(values, return_inverse=True)
    shape = (len(values), len(distinct))
    return sparse.csr_matrix((np.ones(len(values), np.float32), (np.arange(len(values)), index)), shape=shape)


def with_previous(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` of a `row_table` with the token id before each in its example, `previous_id`; -1 where it is no row."""
    before = rows[["example_id", "position", "token_id"]].assign(position=rows["position"] + 1)
    before = before.rename(columns={"token_id": "previous_id"}).drop_duplicates(["example_id", "position"])
    rows = rows.merge(before, on=["example_id", "position"], how="left")
    return rows.assign(previous_id=rows["previous_id"].fillna(-1).astype(np.int64))


def surface(rows: pd.DataFrame) -> dict[str, sparse.csr_matrix]:
    """What a row says without any model, by SURFACE: its position, its token, and this with the token before."""
    position, token = rows["position"].to_numpy(), rows["token_id"].to_numpy()
    previous = rows["previous_id"].to_numpy()
    pair = rows.groupby(["previous_id", "token_id"]).ngroup().to_numpy()
    number = sparse.csr_matrix(position[:, None].astype(np.float32))
    return {
        "position": sparse.hstack([one_hot(position), number], format="csr"),
        "token": one_hot(token),
        "bigram": sparse.hstack([one_hot(token), one_hot(previous), one_hot(pair)], format="csr"),
    }


def control_task(token_ids: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """A label [n] for each word type, drawn at random: every row of a token id [n] has the same (Hewitt & Liang 2019).

    Classes are about as frequent over the rows as in `labels`: word types in random order fill one class after another.
    """
    kinds, of_row, counts = np.unique(token_ids, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(kinds))
    middle = np.cumsum(counts[order]) - counts[order] / 2
    bounds = np.cumsum(np.bincount(labels))[:-1]
    of_kind = np.empty(len(kinds), np.int64)
    of_kind[order] = np.searchsorted(bounds, middle)
    return of_kind[of_row]


def shuffled(labels: np.ndarray, rows: pd.DataFrame, seed: int) -> np.ndarray:
    """Labels [n] handed on whole: each part's (example_id, step) rows get another part's label, or each example's another
    example's where a label does not change within examples. Constant within a unit as before, and at chance across groups.
    """
    examples = rows["example_id"].to_numpy()
    if pd.Series(labels).groupby(examples).nunique().max() == 1:
        unit = pd.factorize(examples)[0]
    else:
        unit = rows.groupby(["example_id", "step"]).ngroup().to_numpy()
    of_unit = labels[np.unique(unit, return_index=True)[1]]
    return np.random.default_rng(seed).permutation(of_unit)[unit]


# ----------------------------------------------------------------------------------------------------------------------
# One label


class Shared(NamedTuple):
    """What all probes of a label have in common, so that any two scores can be subtracted resample by resample."""

    groups: np.ndarray  # int [n] codes
    fold: np.ndarray  # int [n]
    weights: np.ndarray  # [1 + resamples, groups]
    settings: Settings


class Probed(NamedTuple):
    """One probe of a label."""

    name: str
    """Of its input."""
    k: int | None
    """Columns that it reads; None for all."""
    x: Any
    """The input [n, d]; None for the majority."""
    fit: Fit
    scored: Scored

    @property
    def kind(self) -> str:
        return "dense" if self.k is None else f"k={self.k}"


def probe_label(
    inputs: dict[str, Any], rows: pd.DataFrame, classes: list[str], problems: Sequence[Problem], settings: Settings
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """All probes of one label on one set of rows: the table, and sizes, gaps, leakage checks and the largest effects."""
    y = pd.Categorical(rows["label"], categories=classes).codes.astype(np.int64)
    groups = pd.factorize(rows["group"])[0]
    weights = group_weights(groups.max() + 1, settings.bootstrap, settings.seed)
    shared = Shared(groups, group_folds(groups, settings.folds), weights, settings)
    probes = probe_inputs(inputs, y, rows, shared)
    task = control_task(rows["token_id"].to_numpy(), y, settings.seed)
    # Else too few word types.
    by_heart = all(len(np.unique(task[shared.fold != f])) > 1 for f in np.unique(shared.fold))
    table: list[dict[str, Any]] = []
    for probe in probes:
        entry = _entry(probe, settings)
        if by_heart and probe.name not in ("majority", "shuffled"):
            entry |= _selectivity(probe, task, shared)
        table.append(entry)
    if "untrained_model" not in inputs:
        table.append({"input": "untrained_model", "status": NOT_GIVEN})
    dense = {probe.name: probe.scored for probe in probes if probe.k is None}
    gaps = _gaps(dense, len(classes), settings)
    facts = {
        "n_rows": len(rows),
        "n_groups": weights.shape[1],
        "class_rows": np.bincount(y, minlength=len(classes)).tolist(),
        "gaps": gaps,
        "leakage": leakage(dense["shuffled"], gaps, rows, shared.fold, len(classes), problems, settings),
        "effects": effects(inputs["sae"], y, groups, classes, settings),
    }
    return pd.DataFrame(table), facts


def probe_inputs(inputs: dict[str, Any], y: np.ndarray, rows: pd.DataFrame, shared: Shared) -> list[Probed]:
    """The majority, the latents with shuffled labels, and each input: dense, and those not of SURFACE on k columns."""
    guess, ks = majority(y, shared.fold), (None, *shared.settings.ks)
    probes = [Probed("majority", None, None, guess, score(guess, y, shared.groups, shared.fold, shared.weights))]
    shuffles = [shuffled(y, rows, shared.settings.seed + i) for i in range(SHUFFLES)]
    for k in ks:
        fit, first = fit_and_score(inputs["sae"], shuffles[0], k, shared)
        others = [fit_and_score(inputs["sae"], labels, k, shared, fit.c)[1] for labels in shuffles[1:]]
        probes.append(Probed("shuffled", k, inputs["sae"], fit, _mean([first, *others])))
    for name, x in inputs.items():
        for k in ks if name not in SURFACE else ks[:1]:
            probes.append(Probed(name, k, x, *fit_and_score(x, y, k, shared)))
    return probes


def fit_and_score(x: Any, y: np.ndarray, k: int | None, shared: Shared, c: float | None = None) -> tuple[Fit, Scored]:
    """A cross-validated probe of x [n, d] for labels y [n], with this C, or one that it chooses."""
    settings = shared.settings if c is None else replace(shared.settings, cs=(c,))
    fit = cross_validate(x, y, shared.groups, shared.fold, settings, k)
    return fit, score(fit, y, shared.groups, shared.fold, shared.weights)


def _entry(probe: Probed, settings: Settings) -> dict[str, Any]:
    """A probe's row of the table."""
    entry: dict[str, Any] = {"input": probe.name, "probe": probe.kind, "status": "measured"}
    for metric, values in probe.scored.values.items():
        entry |= _with_interval(metric, values, settings)
    total, fit, x = probe.scored.confusion.sum(0), probe.fit, probe.x
    often = pd.Series([column for fold in fit.columns for column in fold], dtype=int).value_counts()
    return (
        entry
        | {
            "accuracy": float(total.trace() / total.sum()),
            "recall": recall(total).tolist(),  # by class
            "columns": often.index[: len(fit.columns[0])].tolist() if fit.columns else None,  # chosen by most folds
            "c": fit.c,
            "not_converged": sum(not c for c in fit.converged),
            "n_columns": x.shape[1] if x is not None else 0,
            "l0": x.nnz / x.shape[0] if sparse.issparse(x) else None,
        }
    )


def _selectivity(probe: Probed, task: np.ndarray, shared: Shared) -> dict[str, float]:
    """The probe's macro-F1 on a `control_task`, with its own C, and how much better it is on the label."""
    learnt = fit_and_score(probe.x, task, probe.k, shared, probe.fit.c)[1].values["macro_f1"]
    above = probe.scored.values["macro_f1"] - learnt
    return _with_interval("control_f1", learnt, shared.settings) | _with_interval("selectivity", above, shared.settings)


def _gaps(dense: dict[str, Scored], classes: int, settings: Settings) -> dict[str, dict[str, float]]:
    """By baseline: macro-F1 of the latents' dense probe less the baseline's, its interval, and p."""
    gaps = {}
    for name in ("majority", *SURFACE, "raw", "random_sae", "untrained_model"):
        if name in dense:
            gap = dense["sae"].values["macro_f1"] - dense[name].values["macro_f1"]
            p = _permutation_p(dense["sae"], dense[name], classes, settings)
            gaps[name] = {**_with_interval("macro_f1", gap, settings), "p": p}
    return gaps


def leakage(
    on_shuffled: Scored, gaps: dict[str, Any], rows: pd.DataFrame, fold: np.ndarray, classes: int,
    problems: Sequence[Problem], settings: Settings,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Reasons to distrust a score, each with its figures and a `flag`, empty where there is none.

    duplicates: near-duplicate questions in more than one fold. control: shuffled labels can be predicted. information: the
    SAE's macro-F1 differs from the raw activations' by more than INFORMATION_GAP and its interval excludes 0. Of
    SURFACE: the SAE's probe is not clearly better than these alone.
    """
    control = on_shuffled.values["balanced_accuracy"]
    above = control[0] > 1 / classes + CONTROL_ABOVE_CHANCE and interval(control, settings.confidence)[0] > 1 / classes
    crossing = duplicates_across_folds(rows["example_id"].to_numpy(), fold, problems)
    raw = gaps["raw"]
    moved = abs(raw["macro_f1"]) > INFORMATION_GAP and not raw["macro_f1_low"] <= 0 <= raw["macro_f1_high"]
    return {
        "duplicates": {
            "groups_across_folds": crossing,
            "flag": f"{crossing} sets of near-duplicate questions lie in several folds" if crossing else "",
        },
        "control": {
            **_with_interval("balanced_accuracy", control, settings),
            "chance": 1 / classes,
            "flag": "shuffled labels are predicted above chance: folds leak" if above else "",
        },
        "information": {
            "gap": raw["macro_f1"],
            "flag": ("information gain" if raw["macro_f1"] > 0 else "information loss") if moved else "",
        },
        **{
            name: {
                "gap": gaps[name]["macro_f1"],
                "flag": f"{words} alone tells the label as well" if gaps[name]["macro_f1_low"] <= 0 else "",
            }
            for name, words in SURFACE.items()
            if name in gaps
        },
    }


def duplicates_across_folds(example_ids: np.ndarray, fold: np.ndarray, problems: Sequence[Problem]) -> int:
    """How many sets of near-duplicate questions have rows in more than one fold."""
    folds_of = pd.DataFrame({"example_id": example_ids, "fold": fold}).drop_duplicates()
    question = {p.example_id: p.question for p in problems}
    examples = folds_of["example_id"].unique()
    questions = [question[e] for e in examples]
    near = near_duplicates(questions, DUPLICATE_SIMILARITY, DUPLICATE_CONTAINMENT)
    like = dict(zip(examples, near.groups, strict=True))
    # An example whose own rows are cut counts too.
    return int((folds_of.groupby(folds_of["example_id"].map(like))["fold"].nunique() > 1).sum())


def effects(
    x: Any, y: np.ndarray, groups: np.ndarray, classes: list[str], settings: Settings, permutations: int = PERMUTATIONS
) -> dict[str, Any]:
    """Which single latents tell a class, on one row per group, so that rows are independent and labels may change places.

    A latent's rank-sum z of each class against the rest, beside the largest |z| when the labels are shuffled over groups;
    p is the chance of one so large anywhere (`family_wise_p`). Classes of fewer than FEWEST_GROUPS groups, or outside of
    which are fewer, are `left_out`; latents that fire on fewer than FEWEST_FIRING of the rows are not tested.
    """
    first = np.unique(groups, return_index=True)[1]
    x, y = sparse.csc_matrix(x[first]), y[first]
    counts = np.bincount(y, minlength=len(classes))
    enough = (counts >= FEWEST_GROUPS) & (len(y) - counts >= FEWEST_GROUPS)
    kept, tested = np.flatnonzero(enough), np.flatnonzero(x.getnnz(axis=0) >= FEWEST_FIRING)
    facts: dict[str, Any] = {
        "n_rows": len(first),
        "left_out": [name for name, many in zip(classes, enough, strict=True) if not many],
        "tested": len(tested),
        "largest_z": None, "null_largest_z": None, "null_largest_z_95": None, "p": None, "discoveries": 0, "latents": [],
    }  # fmt: skip
    if not len(kept) or not len(tested):
        return facts
    x, positive = x[:, tested], y == kept[:, None]
    scores = RankScores(x)
    z, auroc, null = (
        scores.z(positive),
        scores.auroc(positive),
        scores.largest_null(positive, permutations, settings.seed),
    )
    p, d = family_wise_p(np.abs(z), null), cohens_d(x, positive)
    fires = (x != 0).astype(np.float64)
    inside, outside = ((fires.T @ (rows / rows.sum(1, keepdims=True)).T).T for rows in (positive, ~positive))
    largest = zip(*np.unravel_index(np.argsort(-np.abs(z), axis=None, kind="stable")[:10], z.shape), strict=True)
    return {
        **facts,
        "largest_z": float(np.abs(z).max()),
        "null_largest_z": float(null.mean()),
        "null_largest_z_95": float(np.quantile(null, 0.95)),
        "p": float(p.min()),
        "discoveries": int((p <= FALSE_DISCOVERIES).any(axis=0).sum()),
        "latents": [
            {
                "latent": int(tested[j]), "class": classes[kept[c]], "z": float(z[c, j]), "p": float(p[c, j]),
                "auroc": float(auroc[c, j]), "d": float(d[c, j]), "fires": float(inside[c, j]),
                "fires_elsewhere": float(outside[c, j]),
            }
            for c, j in largest
        ],
    }  # fmt: skip


def _mean(several: list[Scored]) -> Scored:
    """Scores averaged; confusions added."""
    values = {name: np.mean([s.values[name] for s in several], axis=0) for name in SCORES}
    return Scored(values, np.sum([s.confusion for s in several], axis=0))


def _permutation_p(one: Scored, two: Scored, classes: int, settings: Settings) -> float:
    def f1(totals: np.ndarray) -> np.ndarray:
        return macro_f1(totals.reshape(*totals.shape[:-1], classes, classes))

    flat = [s.confusion.reshape(len(s.confusion), -1) for s in (one, two)]
    return paired_permutation(flat[0], flat[1], f1, seed=settings.seed)


def _adjust(facts: dict[str, Any]) -> None:
    """Adds to each gap its q: Benjamini-Hochberg over all labels and baselines."""
    gaps = [gap for of_label in facts.values() for gap in of_label.get("gaps", {}).values()]
    for gap, q in zip(gaps, stats.false_discovery_control([gap["p"] for gap in gaps]), strict=True):
        gap["q"] = float(q)


def _with_interval(name: str, values: np.ndarray, settings: Settings) -> dict[str, float]:
    low, high = interval(values, settings.confidence)
    return {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}


def summary(table: pd.DataFrame, facts: dict[str, Any]) -> str:
    """By label: classes and sizes, a line per input, what sets the latents apart, and what makes a score suspicious."""
    blocks = []
    for label, rows in table.groupby("label", sort=False):
        of_label = facts[str(label)]
        measured = rows[rows["status"] == "measured"]
        rare = f" (too rare: {', '.join(of_label['dropped'])})" if of_label["dropped"] else ""
        head = f"{label}: {', '.join(of_label['classes'])}{rare}"
        if measured.empty:
            blocks.append(f"{head}: {rows['status'].iloc[0]}")
            continue
        dense = measured[measured["probe"] == "dense"].set_index("input")
        shown = pd.DataFrame({f"{name} dense": _cells(dense, name) for name in (*SCORES, "selectivity")}, dense.index)
        on_k = measured[measured["probe"] != "dense"].pivot(index="input", columns="probe", values="macro_f1").round(3)
        shown = shown.join(on_k[[kind for kind in measured["probe"].unique() if kind != "dense"]])
        gaps = [f"{name} {gap['macro_f1']:+.3f} (q {gap['q']:.2g})" for name, gap in of_label["gaps"].items()]
        effect = of_label["effects"]
        flags = [f"! {check['flag']}" for check in of_label["leakage"].values() if check["flag"]]
        lines = [
            f"{head}; {of_label['n_rows']} rows, {of_label['n_groups']} groups",
            shown.rename_axis(None).to_string(na_rep="–"),
            *(f"{row.input}: {row.status}" for row in rows[rows["status"] != "measured"].itertuples()),
            f"macro-F1 of the latents' dense probe above {', '.join(gaps)}",
            in_words(effect),
            *(flags or ["no leak found"]),
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def in_words(effect: dict[str, Any]) -> str:
    """What `effects` found, in a line."""
    if effect["largest_z"] is None:
        return "no latent was tested: too few groups of a class, or no latent that fires on enough of them"
    return (
        f"largest rank-sum |z| of a latent {effect['largest_z']:.2f}; with shuffled labels {effect['null_largest_z']:.2f}, "
        f"95 % below {effect['null_largest_z_95']:.2f}; latents that tell a class at family-wise p <= {FALSE_DISCOVERIES}: "
        f"{effect['discoveries']} of {effect['tested']}"
    )


def _cells(rows: pd.DataFrame, name: str) -> list[str]:
    """`value [low, high]` of a score by row."""
    values = rows[[name, f"{name}_low", f"{name}_high"]].to_numpy()
    return ["–" if np.isnan(v) else f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in values]
