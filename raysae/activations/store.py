"""The activation store: a directory of token rows for one or more sites, read by memory map.

    manifest.json                       written last; see `SCHEMA_VERSION`
    rows/<shard>.parquet                the columns of each token row
    <site>/<shard>.safetensors          one tensor `x` [rows, d_model], row-aligned with rows/<shard>.parquet

A shard holds one split's rows, already shuffled across its examples, and is named `<split>-<index>-<content hash>`. The
trainer reads shards front to back and sees an iterator of batches. Nothing outside this module touches shard paths.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raysae.artifacts import MANIFEST, read_manifest
from raysae.errors import Damaged, UserError
from raysae.files import sha256_of

SCHEMA_VERSION = 1
ROW_COLUMNS = ("example_id", "group", "sequence_id", "position", "token_id", "step", "split")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Shard:
    """A shard as the manifest lists it: its name, split, rows, and the sha256 of each of its files."""

    name: str
    split: str
    rows: int
    sha256: dict[str, str]


class Store:
    """A finished store, opened for reading. Pickled, it is its path, and opened again where it arrives."""

    def __init__(self, path: Path) -> None:
        if not (path / MANIFEST).exists():
            raise UserError(f"store: {path} has no {MANIFEST}: it is not a store, or its capture has not finished")
        self.path = path
        self.manifest: dict[str, Any] = read_manifest(path)
        version = self.manifest.get("schema_version", 0)
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise UserError(
                f"store: {path} has schema version {version}, this raysae reads up to {SCHEMA_VERSION}; upgrade raysae"
            )
        try:
            self.shards = [Shard(s["name"], s["split"], s["rows"], s["sha256"]) for s in self.manifest["shards"]]
            self.manifest["sites"].items()
        except (KeyError, TypeError, AttributeError):
            raise Damaged(path / MANIFEST, "does not say what a store holds") from None

    def _key(self) -> tuple[Any, ...]:
        """What it was opened with, and is equal by."""
        return (self.path,)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._key()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._key() == self._key()

    def __hash__(self) -> int:
        return hash((type(self), self._key()))

    @property
    def sites(self) -> list[str]:
        return list(self.manifest["sites"])

    def d_model(self, site: str) -> int:
        return self.site(site)["d_model"]

    def site(self, site: str) -> dict[str, Any]:
        """The manifest's facts of a site: d_model, mean, mean_square_norm (training rows), non_finite."""
        if site not in self.manifest["sites"]:
            raise UserError(f"store: {self.path} has no site {site}; it has {', '.join(self.sites)}")
        return self.manifest["sites"][site]

    def mean(self, site: str) -> Tensor:
        """Per-dimension mean of the training rows [d_model], float64."""
        return torch.tensor(self.site(site)["mean"], dtype=torch.float64)

    def variance(self, site: str) -> float:
        """E‖x - mean‖² of the training rows. UserError where all of them are the same, so that nothing can be learnt."""
        square_norm = self.site(site)["mean_square_norm"]
        variance = square_norm - self.mean(site).square().sum().item()
        if not variance > 1e-12 * square_norm:
            raise UserError(f"capture.sites: all training rows of {site} are the same; name another site")
        return variance

    def offset(self, site: str) -> float:
        """√(E‖x‖² / E‖x - mean‖²) of the training rows: 1 where their mean is 0."""
        return math.sqrt(self.site(site)["mean_square_norm"] / self.variance(site))

    def rows(self, split: str) -> int:
        return sum(s.rows for s in self.shards if s.split == split)

    def names(self, split: str) -> list[str]:
        """Names of the split's shards, in order."""
        return [s.name for s in self.shards if s.split == split]

    def check_model(self, fingerprint: dict[str, Any]) -> None:
        """Refuse a store that another model made."""
        made_with = self.manifest["model"] or {"name": "vectors of no model"}
        keys = [key for key in ("class", "revision", "weights", "config") if key != "config" or key in made_with]
        if any(made_with.get(key) != fingerprint.get(key) for key in keys):
            raise UserError(
                f"store: {self.path} was made with {_model(made_with)}, model.name gives {_model(fingerprint)}; "
                "capture again, or name the model that made it"
            )

    def verify(self) -> None:
        """Compare every file with its sha256; one clear line for the first that differs."""
        for shard in self.shards:
            for relative, expected in shard.sha256.items():
                file = self.path / relative
                if not file.exists() or sha256_of(file) != expected:
                    state = "is missing" if not file.exists() else "does not match its sha256"
                    raise UserError(f"store: {file} {state}; delete {self.path} and capture again")

    def shard(self, site: str, name: str) -> Tensor:
        """A shard's activations [rows, d_model], memory-mapped: pages are shared with every other reader."""
        return _map_tensor(self.path / site / f"{name}.safetensors")

    def columns(self) -> list[str]:
        """Names of the row columns."""
        return pq.read_schema(self.path / "rows" / f"{self.shards[0].name}.parquet").names

    def row_columns(self, name: str, columns: Sequence[str] = ROW_COLUMNS) -> pa.Table:
        """A shard's row columns, row-aligned with its activations."""
        file = self.path / "rows" / f"{name}.parquet"
        try:
            return pq.read_table(file, columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise Damaged(file, f"does not hold the rows of a shard ({type(error).__name__})") from None

    def batches(self, site: str, split: str, batch_size: int, *, seed: int = 0, start: int = 0) -> Iterator[Tensor]:
        """Batches [batch_size, d_model] without end, in the store's dtype: shards in an order drawn anew each epoch.

        `start` skips that many batches without reading them, so a resumed run sees what it would have seen. Batches run
        on across shards and epochs; no row is left out.
        """
        shards = [s for s in self.shards if s.split == split]
        total = sum(s.rows for s in shards)
        if total == 0:
            raise UserError(f"store: {self.path} has no {split} rows")
        epoch, skip = divmod(start * batch_size, total)
        pending: list[Tensor] = []
        have = 0
        while True:
            order = np.random.default_rng([seed, epoch]).permutation(len(shards))
            for i in order:
                shard = shards[i]
                if skip >= shard.rows:
                    skip -= shard.rows
                    continue
                x = self.shard(site, shard.name)[skip:]
                skip = 0
                while have + x.shape[0] >= batch_size:
                    need = batch_size - have
                    yield torch.cat([*pending, x[:need]]) if pending else x[:need]
                    pending, have, x = [], 0, x[need:]
                if x.shape[0]:
                    pending.append(x)
                    have += x.shape[0]
            epoch += 1

    def head(self, site: str, split: str, rows: int) -> Tensor:
        """The first `rows` rows of a split (all, if it has fewer): shuffled rows, so a fair sample."""
        parts, left = [], rows
        for name in self.names(split):
            if left > 0:
                parts.append(self.shard(site, name)[:left])
                left -= parts[-1].shape[0]
        return torch.cat(parts)

    def labelled_batches(
        self, site: str, split: str, batch_size: int, label: str, *, neighbours: bool, seed: int = 0, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches (x [n, d_model], the integer column `label` [n], follows [n]) without end, for losses that need them.

        follows: the row is the next token of the example that the row before it is of. With `neighbours`, examples come
        whole and in order, in an order of examples drawn anew each epoch; else rows come as in `batches`, and none follows.
        """
        index = _RowIndex(self, split, label)
        order = lru_cache(maxsize=2)(lambda epoch: index.order(np.random.default_rng([seed, epoch]), neighbours))
        total, batch = len(index.positions), start
        while True:
            epoch, first = divmod(batch * batch_size, total)
            rows = order(epoch)[first : first + batch_size]
            while len(rows) < batch_size:  # on across epochs
                epoch += 1
                rows = np.concatenate([rows, order(epoch)[: batch_size - len(rows)]])
            follows = np.zeros(batch_size, dtype=bool)
            same = index.codes[rows[1:]] == index.codes[rows[:-1]]
            follows[1:] = neighbours & same & (index.positions[rows[1:]] == index.positions[rows[:-1]] + 1)
            labels = torch.from_numpy(index.labels[rows].astype(np.int64))
            yield self._gather(site, index, rows), labels, torch.from_numpy(follows)
            batch += 1

    def label_count(self, split: str, label: str) -> int:
        """One more than the largest value of an integer column."""
        return 1 + max(
            (int(self.row_columns(n, (label,))[label].to_numpy().max()) for n in self.names(split)), default=-1
        )

    def _gather(self, site: str, index: _RowIndex, rows: np.ndarray) -> Tensor:
        """x [n, d_model] of rows of the index."""
        x = torch.empty(len(rows), self.d_model(site), dtype=self.shard(site, index.names[0]).dtype)
        shard_of, row_of = index.shard_of[rows], torch.from_numpy(index.row_of[rows])
        for s in np.unique(shard_of):
            inside = torch.from_numpy(np.flatnonzero(shard_of == s))
            x[inside] = self.shard(site, index.names[s])[row_of[inside]]
        return x


class _RowIndex:
    """Where each row of a split lies, and whose it is, as arrays over all of its rows in stored order."""

    def __init__(self, store: Store, split: str, label: str | None = None) -> None:
        self.names = store.names(split)
        columns = ["example_id", "position", *([label] if label else [])]
        tables = [store.row_columns(name, columns) for name in self.names]
        ids = pa.concat_tables(tables)["example_id"].combine_chunks().dictionary_encode()
        ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
        self.codes: np.ndarray = ids.indices.to_numpy()
        self.positions = np.concatenate([t["position"].to_numpy() for t in tables])
        self.labels = np.concatenate([t[label].to_numpy() for t in tables]) if label else np.empty(0)
        self.shard_of = np.repeat(np.arange(len(self.names)), [t.num_rows for t in tables])
        self.row_of = np.concatenate([np.arange(t.num_rows) for t in tables])
        in_order = np.lexsort((self.positions, self.codes))
        self.examples = np.split(in_order, np.flatnonzero(np.diff(self.codes[in_order])) + 1)

    def order(self, rng: np.random.Generator, neighbours: bool) -> np.ndarray:
        """An epoch's order of the rows: by shuffled example, or by shuffled shard."""
        if neighbours:
            return np.concatenate([self.examples[i] for i in rng.permutation(len(self.examples))])
        starts = np.flatnonzero(np.r_[True, np.diff(self.shard_of) > 0])
        shards = np.split(np.arange(len(self.shard_of)), starts[1:])
        return np.concatenate([shards[i] for i in rng.permutation(len(shards))])


def _model(fingerprint: dict[str, Any]) -> str:
    parts = (fingerprint.get(key) for key in ("revision", "weights", "config"))
    return f"{fingerprint.get('name')} ({' '.join(str(part) for part in parts if part)})"


@lru_cache(maxsize=1024)
def _map_tensor(path: Path) -> Tensor:
    """The tensor `x` of a safetensors file as a private memory map: reads share the page cache, writes stay here.

    The header is a little-endian u64 length and JSON with dtype, shape and byte offsets (safetensors' format).
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))["x"]
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        dtype = DTYPES[header["dtype"]]
        shape = header["shape"]
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(mapped, dtype=dtype, offset=8 + length, count=int(np.prod(shape))).view(shape)
    except (OSError, ValueError, LookupError, TypeError, OverflowError, struct.error) as error:
        raise Damaged(path, f"does not hold the activations of a shard ({type(error).__name__})") from None
