"""Capture: token blocks in, store shards out. Plain functions; a bench maps them over hosts.

A block becomes one shard. Its sequences are a random draw of the split's (the token stage shuffles them), and its rows
are permuted as they are written, so training reads shards front to back. Each file is written under a temporary name and
renamed, and the shard's own JSON comes last: a block that is done again replaces itself, a killed capture resumes at the
first block without that JSON, and no row is lost or doubled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raysae.activations.write import facts_of, manifest_of, write_shard
from raysae.activations.write import is_written as done
from raysae.data.tokens import TokenBlock, micro_batches
from raysae.errors import CaptureError, UserError
from raysae.models.host import ModelHost


@dataclass(frozen=True)
class CaptureSettings:
    """What a shard depends on, besides the model and its tokens."""

    sites: tuple[str, ...]
    dtype: str
    tokens_per_forward: int
    seed: int
    max_norm_ratio: float | None = None
    """Rows of a norm above so many times the block's median, at any site, are dropped."""


@dataclass(frozen=True)
class Capture:
    """`capture_block` with its settings, as a pool of hosts wants it."""

    root: Path
    settings: CaptureSettings

    def __call__(self, host: ModelHost, block: TokenBlock) -> dict[str, Any]:
        return capture_block(host, block, self.root, self.settings)


def capture_block(host: ModelHost, block: TokenBlock, root: Path, settings: CaptureSettings) -> dict[str, Any]:
    """Write the shard of `block` below `root` and return its facts (also in `shards/<name>.json`).

    Rows are the block's kept tokens (loss_mask), less those with NaN or inf at any site, and those of too large a norm
    (`max_norm_ratio`), which are counted. Sums are of the stored values, in float64.
    """
    rows = block.rows
    order = np.random.default_rng([settings.seed, int(block.name.rsplit("-", 1)[-1], 16)]).permutation(rows)
    target = torch.from_numpy(order)
    dtype = getattr(torch, settings.dtype)
    x_of = {site: torch.empty(rows, host.width(site), dtype=dtype) for site in settings.sites}
    finite = torch.ones(rows, dtype=torch.bool)
    starts = np.cumsum([0, *(int(mask.sum()) for mask in block.loss_mask)])
    for batch in micro_batches(block, settings.tokens_per_forward):
        reads = host.read(batch.input_ids, batch.attention_mask, settings.sites)
        into = target[torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch.index]))]
        for site, read in reads.items():
            x = read[batch.mask.to(read.device)].to("cpu", dtype)  # [rows of this batch, width]
            finite[into] &= x.isfinite().all(1)
            x_of[site][into] = x
    columns = _row_columns(block, order)
    usual = finite.clone()
    for x in x_of.values() if settings.max_norm_ratio and bool(finite.any()) else ():
        norm = x.float().norm(dim=1)
        usual &= norm <= settings.max_norm_ratio * norm[finite].median()
    kept, non_finite = int(usual.sum()), rows - int(finite.sum())
    stored = ((site, x if kept == rows else x[usual]) for site, x in x_of.items())
    table = columns if kept == rows else columns.filter(pa.array(usual.numpy()))
    return write_shard(root, block.name, block.split, stored, table, non_finite, rows - non_finite - kept)


def _row_columns(block: TokenBlock, order: np.ndarray) -> pa.Table:
    """The kept tokens' columns, row i of the block at order[i]."""

    def kept(arrays: Sequence[np.ndarray]) -> np.ndarray:
        flat = np.concatenate([a[m] for a, m in zip(arrays, block.loss_mask, strict=True)])
        placed = np.empty_like(flat)
        placed[order] = flat
        return placed

    lengths = [len(ids) for ids in block.input_ids]
    sequence = np.split(np.repeat(block.sequence_id, lengths), np.cumsum(lengths)[:-1])
    example = pa.array(kept(block.example).astype(np.int32))
    # Names must be distinct: Parquet files of a dictionary with repeats do not come out the same twice.
    groups = pa.array(block.groups).dictionary_encode()
    return pa.table(
        {
            "example_id": pa.DictionaryArray.from_arrays(example, pa.array(block.example_ids)),
            "group": pa.DictionaryArray.from_arrays(groups.indices.take(example), groups.dictionary),
            "sequence_id": kept(sequence).astype(np.int32),
            "position": kept(block.positions).astype(np.int32),
            "token_id": kept(block.input_ids).astype(np.int32),
            "step": kept(block.step).astype(np.int16),
            "split": pa.array([block.split] * len(order)).dictionary_encode(),
        }
    )


def attempt(root: Path, name: str, limit: int) -> None:
    """Note that work on `name` begins; raise CaptureError once its process has died on it more than `limit` times.

    Ray restarts a dead actor and hands it the same block without end; a block that kills its host (out of memory, a
    crash in a kernel) must fail with its name instead. One line per attempt, with the process's id, appended before the
    work starts.
    """
    path = root / "attempts" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    before = len(path.read_text().splitlines()) if path.exists() else 0
    if before > limit:
        raise CaptureError(f"capture: {name} killed its host {before} times in a row; look at this block")
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
        file.flush()
        os.fsync(file.fileno())


def finish(
    root: Path,
    blocks: Sequence[dict[str, Any]],
    settings: CaptureSettings,
    model: dict[str, Any],
    max_non_finite_fraction: float,
) -> dict[str, Any]:
    """The store's manifest from its shards' facts; checks that every kept token became a row, once."""
    absent = [block["name"] for block in blocks if not done(root, block["name"])]
    if absent:
        raise CaptureError(f"capture: {len(absent)} of {len(blocks)} blocks have no shard, such as {absent[0]}")
    shards = [facts_of(root, block["name"]) for block in blocks]
    non_finite = sum(s["non_finite"] for s in shards)
    tokens = sum(block["rows"] for block in blocks)
    if non_finite > max_non_finite_fraction * tokens:
        raise UserError(
            f"capture.max_non_finite_fraction: {non_finite} of {tokens} rows hold NaN or inf "
            f"({non_finite / tokens:.2%}, allowed {max_non_finite_fraction:.2%}); with float16 try bfloat16"
        )
    rows = sum(s["rows"] for s in shards)
    if rows + non_finite + sum(s["norm_outliers"] for s in shards) != tokens:
        raise CaptureError(f"capture: {tokens} tokens were to be captured, the shards hold {rows} rows")
    return manifest_of(shards, settings.sites, settings.dtype, model)
