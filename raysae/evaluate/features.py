"""What each latent of an SAE fires on: densities, contexts and purity, as a table, a summary and a card per latent.

The rows of a split are streamed twice (scan.py), so that memory is bounded by the SAE and not by the rows. An
untrained SAE goes through the same, because the largest activations of any direction resemble each other: that is what a
trained SAE's purity must be compared with.

Strength is |f|: the latents of AbsTopK have a sign, which contexts keep. On disk, below one directory:

features.parquet   a row per latent: `latent`, `density` (share of rows on which it fires), `active_rows`, `dead` (it never
                   fired on the rows of the summary), `dense` (density above 0.1), `mean` (of |f| where it fires), `max`,
                   `n_contexts`, `n_examples` (different ones among them), `token_agreement`, `coherence` (over the pairs
                   of top contexts, purity.py), the same `_active` over random contexts and `_null` over random rows,
                   `nearest_latent`, `nearest_cosine` (decoder directions); by kind of label `label_<kind>` (the most common
                   of the top contexts), `purity_<kind>`, `entropy_<kind>` (bits), both also `_null`, `base_rate_<kind>`
features.json      the same over latents: counts, `density_histogram` (log10), `means` with intervals over latents, labels,
                   `silhouette`, `decoder`, and `untrained`: the means of an untrained SAE of the same shape
cards.jsonl        a JSON object per latent and line, in order: the row of features.parquet without empty values, and
                   `histogram` (rows by strength, equal bins from 0 to `max`), `top_contexts`, `random_contexts`: lists of
                   {example_id, position, token_id, activation, first, tokens, activations}. tokens: the text of the tokens
                   from position `first` on; activations: the latent's on each, null on special tokens
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from raysae.activations.store import Store
from raysae.data.labels import LABELS, label_rows
from raysae.data.records import Problem
from raysae.evaluate import purity
from raysae.evaluate.contexts import Texts
from raysae.evaluate.nulls import random_sae
from raysae.evaluate.scan import KINDS, Contexts, Scan, Settings, Source, read_contexts, scan_rows
from raysae.files import plain, write_atomic, write_json
from raysae.sae.metrics import DENSE_ABOVE
from raysae.sae.sae import SAE

PURITIES = ("token_agreement", "coherence", "purity_")
"""How the columns of features.parquet begin that have a mean over latents."""


class Features(NamedTuple):
    table: pd.DataFrame
    summary: dict[str, Any]
    cards: Iterator[dict[str, Any]]


class Corpus(NamedTuple):
    """A store, and what its rows are in words."""

    store: Store
    site: str
    files: Mapping[str, Path]
    """The token block of each shard, by its name."""
    decode: Callable[[list[int]], str]
    """Token ids to text."""
    problems: Sequence[Problem]


def measure(sae: SAE, corpus: Corpus, split: str, settings: Settings) -> Features:
    """Features of an SAE over a split; UserError where it is empty, or tokens or records are not the store's."""
    store, site = corpus.store, corpus.site
    source = Source.of(store, site, split, settings.rows)
    rows, texts = source.rows, Texts(store, source.names, corpus.files)
    labels = _labels(texts, rows, corpus.problems)
    scan = scan_rows(sae, source, texts, settings)
    chance = {
        "token_agreement_null": purity.chance_agreement(texts.ids[texts.token_of_row[:rows]]),
        "coherence_null": float(purity.pair_cosine(scan.unit_sum, np.array(rows))),
    }
    contexts = read_contexts(sae, source, texts, scan, settings)
    alive = scan.active > 0
    nearest, decoder = _neighbours(sae.parameters["W_dec"], alive, settings)
    table = _table(scan, rows) | _purity_columns(scan, source, texts, labels, settings) | chance
    frame = pd.DataFrame(table | nearest)

    summary = {
        "site": site, "split": split, "rows": rows, "latents": len(frame),
        "dead": int((~alive).sum()), "dead_fraction": float((~alive).mean()),
        "dense_fraction": float(frame["dense"].mean()), "dense_above": DENSE_ABOVE,
        "density_histogram": density_histogram(scan.active, rows),
        "means": _means(frame, settings),
        "labels": {
            kind: {"classes": classes, "base_rates": (np.bincount(codes[codes >= 0]) / (codes >= 0).sum()).tolist()}
            for kind, (codes, classes) in labels.items()
        },
        "silhouette": purity.silhouette(scan.sample, scan.strongest, settings.seed),
        "decoder": decoder,
        "untrained": _untrained_means(random_sae(sae, store, site, settings.seed), source, texts, labels, chance, settings),
        "settings": settings.plain(),
    }  # fmt: skip
    return Features(frame, summary, cards(frame, scan, contexts, texts, corpus.decode))


def write(directory: Path, features: Features, **about: Any) -> None:
    """`features.parquet`, `features.json` (with `about`) and `cards.jsonl`, each by rename."""

    def lines(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for card in features.cards:
                file.write(json.dumps(plain(card), ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")

    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "cards.jsonl", lines)
    write_atomic(directory / "features.parquet", lambda path: features.table.to_parquet(path, index=False))
    write_json(directory / "features.json", {**about, **features.summary})


# ----------------------------------------------------------------------------------------------------------------------
# Cards, the table and the summary


def cards(
    table: pd.DataFrame, scan: Scan, contexts: Contexts, texts: Texts, decode: Callable[[list[int]], str]
) -> Iterator[dict[str, Any]]:
    """A card per row of the table, in order; see the module's docstring."""
    rounded = _significant(contexts.activations)

    def context(row: int, number: int) -> dict[str, Any]:
        token, first = int(texts.token_of_row[row]), int(contexts.first[number])
        values = rounded[contexts.offset[number] : contexts.offset[number + 1]].tolist()
        return {
            "example_id": texts.example_ids[texts.example[token]],
            "position": int(texts.position[token]),
            "token_id": int(texts.ids[token]),
            "activation": values[token - first],
            "first": int(texts.position[first]),
            "tokens": texts.pieces(first, first + len(values), decode),
            "activations": [None if value != value else value for value in values],
        }

    for i, facts in enumerate(table.to_dict("records")):
        card = {str(key): value for key, value in facts.items() if value is not None and value == value}
        card |= {key: float(f"{value:.4g}") for key, value in card.items() if isinstance(value, float)}
        card["histogram"] = contexts.histogram[i].tolist()
        for kind in KINDS:
            both = zip(scan.rows[kind][i].tolist(), contexts.number[kind][i].tolist(), strict=True)
            card[f"{kind}_contexts"] = [context(row, number) for row, number in both if row >= 0]
        yield card


def _significant(values: np.ndarray, digits: int = 4) -> np.ndarray:
    """Values rounded to so many significant digits, float64."""
    values = values.astype(np.float64)
    size = np.where((values == 0) | np.isnan(values), 1.0, np.abs(values))
    scale = 10.0 ** (digits - 1 - np.floor(np.log10(size)))
    return np.round(values * scale) / scale


def density_histogram(active: np.ndarray, rows: int, step: float = 0.25) -> dict[str, Any]:
    """Latents by log10 of their density: `edges` from below one row in `rows` up to 0, `counts`, and `never` fired."""
    low = np.floor(-np.log10(rows) / step) * step
    edges = np.linspace(low, 0.0, round(-low / step) + 1)
    counts, _ = np.histogram(np.log10(active[active > 0] / rows), bins=edges)
    return {"edges": edges.tolist(), "counts": counts.tolist(), "never": int((active == 0).sum())}


def _table(scan: Scan, rows: int) -> dict[str, Any]:
    fires = scan.active > 0
    return {
        "latent": np.arange(len(scan.active)),
        "density": scan.active / rows,
        "active_rows": scan.active,
        "dead": ~fires,
        "dense": scan.active > DENSE_ABOVE * rows,
        "mean": np.divide(scan.total, scan.active, out=np.full(len(fires), np.nan), where=fires),
        "max": np.where(fires, scan.largest, np.nan),
    }


def _purity_columns(
    scan: Scan, source: Source, texts: Texts, labels: Mapping[str, tuple[np.ndarray, list[str]]], settings: Settings
) -> dict[str, Any]:
    """Coherence of the top and the random contexts, and label purity of the top ones."""
    top = scan.rows["top"]
    examples = np.sort(np.where(top >= 0, texts.example[texts.token_of_row[top]], -1), axis=1)
    distinct = (np.diff(examples, axis=1, prepend=-1) != 0) & (examples >= 0)
    columns: dict[str, Any] = {"n_contexts": (top >= 0).sum(1), "n_examples": distinct.sum(1)}
    for kind, suffix in zip(KINDS, ("", "_active"), strict=True):
        rows = scan.rows[kind]
        tokens = np.where(rows >= 0, texts.ids[texts.token_of_row[rows]], -1)
        columns[f"token_agreement{suffix}"] = purity.pair_agreement(tokens)
        columns[f"coherence{suffix}"] = purity.pair_cosine(source.directions(rows), (rows >= 0).sum(1))
    for kind, (codes, classes) in labels.items():
        # A tie of contexts beyond the counted rows cannot be: contexts are chosen among these.
        of_top = purity.label_purity(np.where(top >= 0, codes[top], -1), codes, len(classes), settings.seed)
        names = np.array([*classes, None], dtype=object)
        columns |= {
            f"label_{kind}": names[of_top.mode],
            f"purity_{kind}": of_top.share,
            f"entropy_{kind}": of_top.entropy,
            f"base_rate_{kind}": of_top.base_rate,
            f"purity_{kind}_null": of_top.null,
            f"entropy_{kind}_null": of_top.null_entropy,
        }
    return columns


def _neighbours(
    W_dec: Tensor, alive: np.ndarray, settings: Settings
) -> tuple[dict[str, np.ndarray], dict[str, float | None]]:
    """Each firing latent's nearest other by the cosine of their decoder directions, and that cosine, as columns; and the
    mean cosine to its nearest ones, over the firing latents, beside that of random directions."""
    ids, n = np.flatnonzero(alive), int(alive.sum())
    which, cosine, mean = (np.full(len(alive), value) for value in (-1, np.nan, np.nan))
    null = None
    if n > 1:
        directions = torch.nn.functional.normalize(W_dec, dim=1).cpu().numpy()[ids]
        nearest, cosine[ids], mean[ids] = purity.nearest(directions)
        which[ids] = ids[nearest]
        null = purity.random_nearest(n, W_dec.shape[1], settings.null_latents, settings.seed)
    columns = {"nearest_latent": which, "nearest_cosine": cosine}
    return columns, {**purity.means({"cosine": mean}, settings.bootstrap)["cosine"], "null": null}


def _means(table: pd.DataFrame, settings: Settings) -> dict[str, dict[str, float]]:
    """Means over latents with at least two contexts; `null`, what chance gives, and `above_null` with its interval."""
    table = table[table["n_contexts"] > 1]
    names = [name for name in table if name.startswith(PURITIES) and not name.endswith("_null")]
    if table.empty:
        return {}
    nulls = {name: table[f"{name.removesuffix('_active')}_null"].where(table[name].notna()) for name in names}
    columns = {name: table[name].to_numpy() for name in names}
    columns |= {f"{name} above_null": (table[name] - nulls[name]).to_numpy() for name in names}
    means = purity.means(columns, settings.bootstrap)
    for name in names:
        above = means.pop(f"{name} above_null")
        means[name] |= {"null": float(nulls[name].mean()), "above_null": above["value"]}
        means[name] |= {"above_null_low": above["low"], "above_null_high": above["high"]}
    return means


def _untrained_means(
    sae: SAE, source: Source, texts: Texts, labels: Mapping[str, tuple[np.ndarray, list[str]]],
    chance: dict[str, float], settings: Settings,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """`_means` of an SAE before training, over a sample of its latents."""
    d_sae = sae.config.d_sae
    rng = np.random.default_rng(settings.seed)
    some = np.sort(rng.choice(d_sae, min(settings.null_latents, d_sae), replace=False))
    scan = scan_rows(sae, source, texts, settings, some)
    return _means(pd.DataFrame(_purity_columns(scan, source, texts, labels, settings) | chance), settings)


def _labels(texts: Texts, rows: int, problems: Sequence[Problem]) -> dict[str, tuple[np.ndarray, list[str]]]:
    """By kind of label with two classes or more: each row's class [rows], -1 for none, and the classes' names."""
    labelled = label_rows(texts.rows(rows), problems)
    labels = {}
    for kind in LABELS:
        codes, classes = pd.factorize(labelled[f"label_{kind}"], sort=True)
        if len(classes) > 1:
            labels[kind] = (codes, [str(name) for name in classes])
    return labels
