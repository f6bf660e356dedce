"""Two passes over a store's rows that find what each latent of an SAE fires on, in memory bounded by the SAE.

The first keeps counts, sums and the best rows of each latent; the second fills the histograms up to the maxima that the
first found, and the activations in the windows around the rows that it chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raysae.activations.store import Store
from raysae.errors import UserError
from raysae.evaluate.contexts import Texts
from raysae.evaluate.statistics import Bootstrap
from raysae.sae.sae import SAE

ROWS_AT_ONCE = 8192
ELEMENTS_AT_ONCE = 1 << 25  # of [rows, d_sae], 128 MiB in float32
KINDS = ("top", "random")


@dataclass(frozen=True)
class Settings:
    """How much is looked at."""

    bootstrap: Bootstrap
    """Over latents, behind the intervals of their means."""
    rows: int = 200_000
    """Most rows of the split: the first, which lie in random order."""
    contexts: int = 10
    """Contexts per latent: as many of the largest activations, and as many random ones."""
    reach: int = 10
    """Tokens on either side of a context."""
    bins: int = 20
    silhouette_rows: int = 2000
    null_latents: int = 512
    """Latents of the untrained SAE and random directions that are measured."""

    @property
    def seed(self) -> int:
        """Of all that is drawn: contexts, latents, shuffles, the untrained SAE."""
        return self.bootstrap.seed

    def plain(self) -> dict[str, Any]:
        """As features.json has them."""
        own = asdict(self)
        drawn = own.pop("bootstrap")
        return {**own, "bootstrap": drawn.pop("resamples"), **drawn}


# ----------------------------------------------------------------------------------------------------------------------
# First pass: counts, sums and the best rows


class Source(NamedTuple):
    """The rows that are read: the first `rows` of some shards of a site, and the training mean."""

    store: Store
    site: str
    names: tuple[str, ...]
    rows: int
    mean: Tensor  # [d_in] float32

    @classmethod
    def of(cls, store: Store, site: str, split: str, most: int) -> Source:
        """The first `most` rows of a split (all, if it has fewer), which lie in random order; UserError if it is empty."""
        names: list[str] = []
        have = 0
        for shard in store.shards:
            if shard.split == split and have < most:
                names.append(shard.name)
                have += shard.rows
        if not have:
            raise UserError(f"split: {store.path} has no {split} rows")
        return cls(store, site, tuple(names), min(have, most), store.mean(site).float())

    def chunks(self, at_once: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, x [n, d_in] in the store's dtype) of consecutive rows up to `stop`."""
        first = 0
        for name in self.names:
            shard = self.store.shard(self.site, name)
            end = min(len(shard), stop - first)
            for start in range(0, end, at_once):
                yield first + start, shard[start : min(start + at_once, end)]
            first += len(shard)

    def encoded(self, sae: SAE, latents: np.ndarray | None, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number of the first row, x [n, d_in], f [n, m]) of consecutive rows up to `stop`, on the SAE's device."""
        device = sae.parameters["W_dec"].device
        columns = None if latents is None else torch.from_numpy(latents).to(device)
        for first, stored in self.chunks(max(64, min(ROWS_AT_ONCE, ELEMENTS_AT_ONCE // sae.config.d_sae)), stop):
            x = stored.to(device, torch.float32)
            f = sae.encode(x)
            yield first, x, f if columns is None else f[:, columns]

    def directions(self, rows: np.ndarray) -> np.ndarray:
        """Σ over n of the directions [m, d_in] of rows [m, n]; -1 is none."""
        latent, row = np.nonzero(rows >= 0)[0], rows[rows >= 0]
        order = np.argsort(row, kind="stable")
        ordered = row[order]
        sums = torch.zeros(len(rows), self.mean.numel())
        for begin, x in self.chunks(ROWS_AT_ONCE, int(row.max(initial=-1)) + 1):
            part = order[slice(*np.searchsorted(ordered, [begin, begin + len(x)]))]
            sums.index_add_(
                0, torch.from_numpy(latent[part]), self.units(x[torch.from_numpy(row[part] - begin)].float())
            )
        return sums.numpy()

    def units(self, x: Tensor) -> Tensor:
        """Directions [n, d_in] of rows x from the training mean."""
        return torch.nn.functional.normalize(x - self.mean.to(x.device), dim=1)


class TopRows:
    """The `n` rows of highest score of each latent, streamed: score, row and example [latents, n], best first, -1 if none.

    distinct: of each example only its best row. The result does not depend on how the rows were cut.
    """

    def __init__(self, latents: int, n: int, distinct: bool) -> None:
        self.score = np.full((latents, n), -np.inf)
        self.row = np.full((latents, n), -1)
        self.example = np.full((latents, n), -1)
        self.distinct = distinct

    def add(self, latent: np.ndarray, row: np.ndarray, score: np.ndarray, example: np.ndarray) -> None:
        """Entries [e]; rows must come in ascending order from call to call."""
        new = score > self.score[latent, -1]
        if not new.any():
            return
        touched = np.unique(latent[new])
        had = self.row[touched] >= 0
        kept = (mine[touched][had] for mine in (self.row, self.score, self.example))
        parts = zip((np.repeat(touched, had.sum(1)), *kept), (latent, row, score, example), strict=True)
        latent, row, score, example = (np.concatenate([old, values[new]]) for old, values in parts)
        if self.distinct:
            order = np.lexsort((row, -score, example, latent))
            first = np.r_[True, (np.diff(latent[order]) != 0) | (np.diff(example[order]) != 0)]
            order = order[first]
            latent, row, score, example = (values[order] for values in (latent, row, score, example))
        order = np.lexsort((row, -score, latent))
        latent, row, score, example = (values[order] for values in (latent, row, score, example))
        starts = np.r_[True, np.diff(latent) != 0]
        place = np.arange(len(latent)) - np.flatnonzero(starts)[np.cumsum(starts) - 1]
        kept = place < self.row.shape[1]
        self.row[touched], self.score[touched], self.example[touched] = -1, -np.inf, -1
        for mine, values in ((self.row, row), (self.score, score), (self.example, example)):
            mine[latent[kept], place[kept]] = values[kept]


class Scan(NamedTuple):
    active: np.ndarray  # int64 [m] rows on which each latent fires
    total: np.ndarray  # [m] Σ |f|
    largest: np.ndarray  # [m] max |f|
    rows: dict[str, np.ndarray]  # int64 [m, contexts] by kind of context, -1 where there are no more
    unit_sum: np.ndarray  # [d_in] Σ of the rows' directions from the mean
    sample: np.ndarray  # [silhouette_rows, d_in] the first rows, from the mean
    strongest: np.ndarray  # int64 [silhouette_rows] the latent with the largest |f| ‖W_dec‖, -1 for none


def scan_rows(sae: SAE, source: Source, texts: Texts, settings: Settings, latents: np.ndarray | None = None) -> Scan:
    """The first pass over the rows, for all latents or for some."""
    m = sae.config.d_sae if latents is None else len(latents)
    active, total, largest = np.zeros(m, np.int64), np.zeros(m), np.zeros(m)
    distinct, best, drawn = (TopRows(m, settings.contexts, alone) for alone in (True, False, False))
    unit_sum = torch.zeros(source.mean.numel(), dtype=torch.float64)
    norms = sae.parameters["W_dec"].norm(dim=1)
    norms = norms if latents is None else norms[torch.from_numpy(latents).to(norms.device)]
    sample, strongest = [], []
    example_of_row = texts.example[texts.token_of_row]
    for first, x, f in source.encoded(sae, latents, source.rows):
        unit_sum += source.units(x).sum(0, dtype=torch.float64).cpu()
        strength = f.abs()
        if first < settings.silhouette_rows:
            part = slice(0, settings.silhouette_rows - first)
            contribution, latent_of = (strength[part] * norms).max(1)
            sample.append((x[part].cpu() - source.mean).numpy())
            strongest.append(torch.where(contribution > 0, latent_of, -1).cpu().numpy())
        flat = strength.cpu().numpy().ravel()
        index = np.flatnonzero(flat)
        row, latent = np.divmod(index, m)
        value, row = flat[index].astype(np.float64), row + first
        active += np.bincount(latent, minlength=m)
        total += np.bincount(latent, weights=value, minlength=m)
        largest = np.maximum(largest, strength.amax(0).cpu().numpy())
        example = example_of_row[row]
        distinct.add(latent, row, value, example)
        best.add(latent, row, value, example)
        drawn.add(latent, row, np.random.default_rng([settings.seed, first]).random(len(row)), example)
    rows = {"top": _filled(distinct.row, best.row), "random": drawn.row}
    return Scan(active, total, largest, rows, unit_sum.numpy(), np.concatenate(sample), np.concatenate(strongest))


def _filled(distinct: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Rows of distinct examples [m, n], then, where these are too few, the best others."""
    other = np.where((best[:, :, None] == distinct[:, None, :]).any(2), -1, best)
    both = np.concatenate([distinct, other], axis=1)
    order = np.argsort(both < 0, axis=1, kind="stable")
    return np.take_along_axis(both, order, axis=1)[:, : distinct.shape[1]]


# ----------------------------------------------------------------------------------------------------------------------
# Second pass: histograms, windows, directions


class Contexts(NamedTuple):
    """What was read around the rows of `Scan.rows`."""

    histogram: np.ndarray  # int64 [m, bins] rows by strength, equal bins from 0 to the maximum
    number: dict[str, np.ndarray]  # int64 [m, contexts] number of each context's window, by kind, -1 for none
    first: np.ndarray  # int64 [windows] first token
    offset: np.ndarray  # int64 [windows + 1] where each window's activations start
    activations: np.ndarray  # float32 [cells], nan for special tokens


def read_contexts(sae: SAE, source: Source, texts: Texts, scan: Scan, settings: Settings) -> Contexts:
    """The second pass."""
    stacked = np.stack([scan.rows[kind] for kind in KINDS])  # [kinds, m, contexts]
    m = stacked.shape[1]
    latent, row = np.nonzero(stacked >= 0)[1], stacked[stacked >= 0]
    number = np.full(stacked.shape, -1)
    number[stacked >= 0] = np.arange(len(row))
    first, last = texts.window(row, settings.reach)
    offset = np.concatenate([[0], np.cumsum(last - first)])
    token = np.repeat(first - offset[:-1], last - first) + np.arange(offset[-1])
    cell_row, cell_latent = texts.row_of_token[token], np.repeat(latent, last - first)
    activations = np.full(len(token), np.nan, np.float32)
    order = np.argsort(cell_row, kind="stable")
    ordered = cell_row[order]

    histogram = np.zeros(m * settings.bins, np.int64)
    width = np.where(scan.largest > 0, scan.largest, 1) / settings.bins
    stop = max(source.rows, int(ordered.max(initial=-1)) + 1)  # a window may reach beyond the rows that are counted
    for begin, _, f in source.encoded(sae, None, stop):
        f = f.cpu()
        part = order[slice(*np.searchsorted(ordered, [begin, begin + len(f)]))]
        activations[part] = f.numpy()[cell_row[part] - begin, cell_latent[part]]
        strength = f[: max(0, source.rows - begin)].abs().numpy().ravel()
        index = np.flatnonzero(strength)
        where = index % m
        bins = np.minimum((strength[index] / width[where]).astype(np.int64), settings.bins - 1)
        histogram += np.bincount(where * settings.bins + bins, minlength=len(histogram))
    numbers = dict(zip(KINDS, number, strict=True))
    return Contexts(histogram.reshape(m, -1), numbers, first, offset, activations)
