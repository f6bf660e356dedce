"""Writing a store: shards, their facts, and the manifest made from them. docs/store.md says what lies where.

Capture writes a shard per token block by `write_shard`; `write_store` makes a whole store of vectors that are given.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from raysae.activations.store import DTYPES, ROW_COLUMNS, SCHEMA_VERSION, Store
from raysae.artifacts import MANIFEST, fingerprint
from raysae.data.splits import SPLITS
from raysae.errors import UserError
from raysae.files import folder_name, read_json, sha256_of, whole_folder, write_atomic, write_json, write_sealed

REQUIRED = ("example_id", "group", "split")
OWN_NAMES = ("rows", "shards", "attempts", MANIFEST)
"""Names in a store that no site can have."""
Vectors = np.ndarray | Tensor | Iterable[np.ndarray | Tensor]
"""An array [rows, d], or blocks of it [some rows, d] in order."""


def write_store(
    path: Path,
    vectors: Mapping[str, Vectors],
    columns: Any,
    *,
    dtype: str = "float32",
    seed: int = 0,
    rows_per_shard: int = 65_536,
    facts: Mapping[str, Any] | None = None,
) -> Store:
    """Make a store of any vectors at `path`, whole or not at all; what lay there is replaced.

    vectors: by site, an array [rows, d], or an iterable of its blocks, which need not fit in memory together. columns: one
    row per vector, as whatever `pyarrow.table` takes (a table, a data frame, a mapping of arrays): example_id, group and
    split; position, token_id, sequence_id, step and labels of any name where there are some. Unset, position counts an
    example's rows and sequence_id the examples, and token_id and step are -1. facts: more keys of the manifest.

    Rows of a split are permuted as one, by the seed. Raises UserError for rows that are not finite in `dtype`, rows and
    columns of different number, a group in two splits, and whatever else makes no store.
    """
    path = Path(path)
    with whole_folder(path) as folder:
        manifest = write_vectors(
            folder, vectors, columns, dtype=dtype, seed=seed, rows_per_shard=rows_per_shard, facts=facts
        )
        write_sealed(folder / MANIFEST, manifest)
    return Store(path)


def write_vectors(
    root: Path,
    vectors: Mapping[str, Vectors],
    columns: Any,
    *,
    dtype: str,
    seed: int,
    rows_per_shard: int,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the shards of `write_store` below `root`, a stage's folder for example, and return the manifest."""
    if dtype not in (known := [str(d).removeprefix("torch.") for d in DTYPES.values()]):
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(known)}")
    if rows_per_shard < 1:
        raise UserError(f"rows_per_shard: {rows_per_shard} is below 1")
    table = _row_columns(columns)
    _check_sites(vectors)
    split_of, shards = table["split"].to_pandas().to_numpy(), []
    with ExitStack() as stack:
        x_of = {}
        for site, given in vectors.items():
            scratch = root / f".{site}.{os.getpid()}.tmp"  # what a killed writer leaves is known by such a name
            stack.callback(scratch.unlink, missing_ok=True)
            x_of[site] = _array(site, given, table.num_rows, getattr(torch, dtype), scratch)
        for number, split in enumerate(SPLITS):
            at = np.flatnonzero(split_of == split)
            order = at[np.random.default_rng([seed, number]).permutation(len(at))]
            for index, start in enumerate(range(0, len(order), rows_per_shard)):
                rows = order[start : start + rows_per_shard]
                part = table.take(pa.array(rows))
                keys = [part[name].to_pylist() for name in ("example_id", "position")]
                shard = f"{split}-{index:05d}-{fingerprint(keys, 8)}"
                picked = ((site, _finite(site, x, rows, getattr(torch, dtype))) for site, x in x_of.items())
                shards.append(write_shard(root, shard, split, picked, _encoded(part)))
    manifest = manifest_of(shards, tuple(vectors), dtype, None)
    own = sorted({*manifest} & {*(facts or {})})
    if own:
        raise UserError(f"facts: {', '.join(own)}: the manifest's own; choose other names")
    return {**manifest, **(facts or {})}


def write_shard(
    root: Path,
    name: str,
    split: str,
    vectors: Iterable[tuple[str, Tensor]],
    columns: pa.Table,
    non_finite: int = 0,
    norm_outliers: int = 0,
) -> dict[str, Any]:
    """Write x [rows, d_model] of each site, the rows' columns, and last the shard's facts, which are returned.

    vectors: (site, x) one after another, in the dtype to store. non_finite, norm_outliers: rows that were dropped. Sums
    are of the stored values, in float64.
    """
    facts: dict[str, Any] = {"name": name, "split": split, "rows": columns.num_rows}
    facts |= {"non_finite": non_finite, "norm_outliers": norm_outliers, "sites": {}, "sha256": {}}
    written = []
    for site, x in vectors:
        facts["sites"][site] = moments(x)
        written.append(_write(root, f"{site}/{name}.safetensors", lambda p, x=x: save_file({"x": x}, p)))
    written.append(_write(root, f"rows/{name}.parquet", lambda p: pq.write_table(columns, p)))
    facts["sha256"] = {relative: sha256_of(root / relative) for relative in written}
    file = root / "shards" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, facts)
    return facts


def is_written(root: Path, name: str) -> bool:
    """Whether the shard of this name is there, whole."""
    return (root / "shards" / f"{name}.json").exists()


def facts_of(root: Path, name: str) -> dict[str, Any]:
    """What `write_shard` returned."""
    return read_json(root / "shards" / f"{name}.json")


def manifest_of(
    shards: Sequence[Mapping[str, Any]], sites: Sequence[str], dtype: str, model: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A store's manifest from its shards' facts.

    mean and mean_square_norm are of the training rows: validation and test have no part in the input scale. In a store
    without training rows, of a dataset that is held out, they are of all rows.
    """
    scaled_by = [s for s in shards if s["split"] == "train"] or shards
    counts = [s["rows"] for s in scaled_by]
    lost = {why: sum(s[why] for s in shards) for why in ("non_finite", "norm_outliers")}
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "sites": {
            site: {**mean_of(counts, [s["sites"][site] for s in scaled_by]), "non_finite": lost["non_finite"]}
            for site in sites
        },
        "dtype": dtype,
        "norm_outliers": lost["norm_outliers"],
        "rows": {split: sum(s["rows"] for s in shards if s["split"] == split) for split in SPLITS},
        "shards": [{key: s[key] for key in ("name", "split", "rows", "sha256")} for s in shards],
    }


def moments(x: Tensor) -> dict[str, Any]:
    """Sums over rows x [n, d_model], in float64, and d_model."""
    x64 = x.double()
    return {"sum": x64.sum(0).tolist(), "sum_squares": x64.square().sum().item(), "d_model": x.shape[1]}


def mean_of(rows: Sequence[int], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a manifest says of a site, from the `moments` of parts of so many rows."""
    count = sum(rows)
    return {
        "d_model": parts[0]["d_model"],
        "mean": (np.sum([part["sum"] for part in parts], axis=0) / count).tolist(),
        "mean_square_norm": sum(part["sum_squares"] for part in parts) / count,
    }


def _write(root: Path, relative: str, write: Any) -> str:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, write)
    return relative


# ----------------------------------------------------------------------------------------------------------------------
# What is given


def _row_columns(given: Any) -> pa.Table:
    """The row columns, those that were not given filled in; UserError for what no store can hold."""
    try:
        framed = isinstance(given, pd.DataFrame)
        table = pa.Table.from_pandas(given, preserve_index=False) if framed else pa.table(given)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UserError(f"columns: no table with a row per vector: {str(error).splitlines()[0]}") from None
    for name in REQUIRED:
        if name not in table.column_names:
            raise UserError(f"columns: there is no {name}; give {', '.join(REQUIRED)}, and labels of any name")
    for name in table.column_names:
        if table.column_names.count(name) > 1:
            raise UserError(f"columns: two are called {name}")
    if not table.num_rows:
        raise UserError("columns: there are no rows")
    columns = {name: table[name] for name in table.column_names}
    frame = pd.DataFrame({name: _cast(name, columns[name], pa.string()).to_pandas() for name in REQUIRED})
    for split in frame["split"].unique():
        if split not in SPLITS:
            raise UserError(f"columns.split: {split!r} is not one of {', '.join(SPLITS)}")
    _one_each(frame, "example_id", "group")
    _one_each(frame, "group", "split")
    rows = len(frame)
    filled = {
        "sequence_id": pd.factorize(frame["example_id"])[0],
        "position": frame.groupby("example_id", sort=False).cumcount().to_numpy(),
        "token_id": np.full(rows, -1),
        "step": np.full(rows, -1),
    }
    types = {"sequence_id": pa.int32(), "position": pa.int32(), "token_id": pa.int32(), "step": pa.int16()}
    columns = {name: columns.get(name, filled.get(name)) for name in (*ROW_COLUMNS, *columns)}
    columns |= {name: _cast(name, columns[name], types.get(name, pa.string())) for name in ROW_COLUMNS}
    twice = frame.assign(position=columns["position"].to_pandas()).duplicated(["example_id", "position"])
    if twice.any():
        example, position = frame["example_id"][twice.idxmax()], columns["position"][int(twice.idxmax())]
        raise UserError(f"columns.position: two rows of {example} have position {position}")
    return pa.table(columns)


def _cast(name: str, values: Any, to: pa.DataType) -> pa.ChunkedArray:
    try:
        values = pa.chunked_array([pa.array(values)] if isinstance(values, np.ndarray) else values).cast(to)
    except pa.ArrowException as error:
        raise UserError(f"columns.{name}: not of type {to}: {str(error).splitlines()[0]}") from None
    if values.null_count:
        raise UserError(f"columns.{name}: {values.null_count} rows have none")
    return values


def _one_each(frame: pd.DataFrame, name: str, other: str) -> None:
    """UserError where a value of one column goes with two of another."""
    pairs = frame[[name, other]].drop_duplicates()
    twice = pairs[pairs[name].duplicated(keep=False)]
    if len(twice):
        value = twice[name].iloc[0]
        first, second, *_ = twice[other][twice[name] == value]
        raise UserError(f"columns.{name}: {value} has rows of {other} {first} and of {second}; it must be of one")


def _encoded(table: pa.Table) -> pa.Table:
    """Strings as dictionaries, of the names in this shard only: the same rows give the same bytes."""
    for at, (name, kind) in enumerate(zip(table.column_names, table.schema.types, strict=True)):
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            table = table.set_column(at, name, table[name].cast(pa.string()).combine_chunks().dictionary_encode())
    return table


def _check_sites(vectors: Mapping[str, Vectors]) -> None:
    if not vectors:
        raise UserError("vectors: there are no sites; give an array for at least one")
    folders: dict[str, str] = {name: "the store's own" for name in OWN_NAMES}
    for site in vectors:
        folder = folder_name(site, "vectors").casefold()
        if folder in folders:
            raise UserError(f"vectors: {site!r} has the same folder as {folders[folder]!r}; rename it")
        folders[folder] = site


def _array(site: str, given: Vectors, rows: int, dtype: torch.dtype, scratch: Path) -> np.ndarray | Tensor:
    """What is given as one array [rows, d]; blocks are put into the file `scratch`, of which it is a memory map."""
    if isinstance(given, np.ndarray | Tensor):
        if given.ndim != 2 or not given.shape[1]:
            raise UserError(f"vectors.{site}: an array of shape {[*given.shape]}, not [rows, d]")
        if len(given) != rows:
            raise UserError(f"vectors.{site}: {len(given)} rows, columns have {rows}")
        return given
    x, end = None, 0
    for block in _tensors(site, given):
        if x is None:
            x = torch.from_file(str(scratch), shared=True, size=rows * block.shape[1], dtype=dtype).view(rows, -1)
        if block.shape[1] != x.shape[1]:
            raise UserError(f"vectors.{site}: a block of {block.shape[1]} dimensions after one of {x.shape[1]}")
        start, end = end, end + len(block)
        if end <= rows:
            x[start:end] = block
    if x is None or end != rows:
        raise UserError(f"vectors.{site}: {end} rows, columns have {rows}")
    return x


def _tensors(site: str, blocks: Iterable[np.ndarray | Tensor]) -> Iterator[Tensor]:
    for block in blocks:
        if block.ndim != 2 or not block.shape[1]:
            raise UserError(f"vectors.{site}: a block of shape {[*block.shape]}, not [rows, d]")
        yield torch.as_tensor(block)


def _finite(site: str, x: np.ndarray | Tensor, rows: np.ndarray, dtype: torch.dtype) -> Tensor:
    """These rows of x as they are stored; UserError, with the number of the first, where some are not finite."""
    picked = torch.as_tensor(x[rows]).to("cpu", dtype)
    bad = ~picked.isfinite().all(1).numpy()
    if bad.any():
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"vectors.{site}: row {rows[bad].min()} holds NaN or inf in {name}; leave such rows out")
    return picked
