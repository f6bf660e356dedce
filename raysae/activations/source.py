"""Where training rows come from: what a trial asks of a source, and the part of a store in which a column has a value.

A `Store` is a source; so is whatever else has these methods, such as a stream that never rests on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raysae.activations.store import ROW_COLUMNS, Store
from raysae.activations.write import mean_of, moments
from raysae.errors import UserError


class Source(Protocol):
    """Rows x [rows, d_model] of one or more sites, in splits. Picklable: trials travel to their workers with it."""

    def rows(self, split: str) -> int:
        """How many rows an epoch of a split has."""

    def mean(self, site: str) -> Tensor:
        """Per-dimension mean of the training rows [d_model], float64."""

    def variance(self, site: str) -> float:
        """E‖x - mean‖² of the training rows; UserError where there is none."""

    def head(self, site: str, split: str, rows: int) -> Tensor:
        """A fair sample of up to so many rows of a split, the same whenever asked."""

    def batches(self, site: str, split: str, batch_size: int, *, seed: int = 0, start: int = 0) -> Iterator[Tensor]:
        """Batches [batch_size, d_model] without end, from batch `start` of the stream of this seed on."""

    def labelled_batches(
        self, site: str, split: str, batch_size: int, label: str, *, neighbours: bool, seed: int = 0, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x [n, d_model], an integer column [n], whether a row is the token after the one before it [n]), as `batches`."""


class Subset(Store):
    """The rows of a store at which a column has a value, as a store: one position, one label, one group, one kind.

    Its moments are of its own training rows, in the order of which nothing changes. UserError for a column that the store
    does not have, or a value that no row has. The manifest stays that of the whole store.
    """

    def __init__(self, source: Store, column: str, value: int | str) -> None:
        self.source, self.column, self.value = source, column, value
        self.path, self.manifest, self.shards = source.path, source.manifest, []
        if source.shards and column not in (known := source.columns()):
            raise UserError(f"store: {self.path} has no column {column}; it has {', '.join(known)}")
        self._chosen: dict[str, np.ndarray] = {}
        for shard in source.shards:
            chosen = np.flatnonzero(source.row_columns(shard.name, (column,))[column].to_pandas() == value)
            if len(chosen):
                self.shards.append(replace(shard, rows=len(chosen)))
                self._chosen[shard.name] = chosen
        if not self.shards:
            raise UserError(f"store: {self.path} has no row with {column} {value!r}")
        self._site = lru_cache(maxsize=None)(self._moments_of)

    def _key(self) -> tuple[Any, ...]:
        return self.source, self.column, self.value

    def site(self, site: str) -> dict[str, Any]:
        return self._site(site)

    def _moments_of(self, site: str) -> dict[str, Any]:
        whole = self.source.site(site)
        scaled_by = [s for s in self.shards if s.split == "train"] or self.shards
        return whole | mean_of([s.rows for s in scaled_by], [moments(self.shard(site, s.name)) for s in scaled_by])

    def shard(self, site: str, name: str) -> Tensor:
        return self.source.shard(site, name)[torch.from_numpy(self._chosen[name])]

    def row_columns(self, name: str, columns: Sequence[str] = ROW_COLUMNS) -> pa.Table:
        return self.source.row_columns(name, columns).take(pa.array(self._chosen[name]))
