"""Row metrics: what an SAE makes of a store's rows, from the rows alone. No model, no tokens.

Sums by group, on disk by shard: `<shard>.parquet` (a row per sae_id and group, columns ROW_SUMS), `<shard>.safetensors`
(by sae_id, Σ(x - mean), Σ(x - x̂) and how often each latent fired) and, last, `<shard>.json`. `fidelity.collect` divides
them; where a model scored tokens too, its sums stand beside these in the same table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from raysae.activations.store import Store
from raysae.errors import UserError
from raysae.files import write_atomic, write_json
from raysae.sae.metrics import SCALARS, Rows, RowSums
from raysae.sae.sae import SAE

ROWS_AT_ONCE = 8192
NORM_ROWS = 20_000
"""Training rows, at most, that say which norms are usual."""
OUTLYING_MADS, OUTLYING_RATIO = 6.0, 3.0
"""A row is an outlier in norm if it is so many robust standard deviations (1.4826 MAD of log-norms) above the median, and
so many times the median: however many such rows there are, below half of all (Leys et al. 2013)."""
ROW_SUMS = ("rows", *SCALARS, "usual", "usual_error", "usual_shifted")


def measure_rows(store: Store, site: str, saes: Mapping[str, SAE], split: str, root: Path) -> list[str]:
    """Write the sums of each of the split's shards below `root`, those that are there already apart; return their names.

    `fidelity.collect(root, names, store.mean(site), ...)` makes metrics of them. UserError where the split has no rows.
    """
    names = store.names(split)
    if not store.rows(split):
        raise UserError(f"store: {store.path} has no {split} rows")
    for name in names:
        if not done(root, name):
            sums = row_sums(saes, store, site, name)
            write_sums(root, name, next(iter(sums.values()))[0].rows, sums)
    return names


def write_sums(root: Path, name: str, rows: int, sums: Mapping[str, tuple[RowSums, pd.DataFrame]]) -> dict[str, Any]:
    """Write the sums of one shard below `root`, by sae_id (in all, and by group as index). Facts last: then it is done."""
    vectors: dict[str, Tensor] = {}
    for sae_id, (total, _) in sums.items():
        vectors |= {f"{sae_id}.shifted": total.shifted, f"{sae_id}.residual": total.residual}
        if total.firings is not None:
            vectors[f"{sae_id}.firings"] = total.firings
    frames = [by.rename_axis("group").reset_index().assign(sae_id=sae_id) for sae_id, (_, by) in sums.items()]
    table, facts = pd.concat(frames, ignore_index=True), {"name": name, "rows": rows}
    root.mkdir(parents=True, exist_ok=True)
    write_atomic(root / f"{name}.parquet", lambda path: table.to_parquet(path, index=False))
    write_atomic(root / f"{name}.safetensors", lambda path: save_file(vectors, path))
    write_json(root / f"{name}.json", facts)
    return facts


def done(root: Path, name: str) -> bool:
    """Whether the sums of the shard of this name are there, whole."""
    return (root / f"{name}.json").exists()


class Usual(NamedTuple):
    """Which rows of a site are of usual norm: those within `limit` of `centre`."""

    centre: Tensor
    """Median of each dimension [d_in], which rows of huge norm do not move; norms are taken about it."""
    limit: float
    mean: Tensor
    """Of such rows [d_in], float64."""

    def of(self, x: Tensor) -> Tensor:
        """Which rows x [n, d_in] are: [n] bool."""
        return (x.float() - self.centre.to(x.device)).norm(dim=1) <= self.limit


@lru_cache(maxsize=64)
def usual_rows(store: Store, site: str) -> Usual:
    """By up to NORM_ROWS training rows of a store's site; of its test rows where all of it is held out."""
    x = store.head(site, "train" if store.rows("train") else "test", NORM_ROWS).float()
    centre = x.median(0).values
    norm = (x - centre).norm(dim=1).double()
    middle = norm.median()
    if middle <= 0:  # most rows are one and the same: no norm is unusual
        return Usual(centre, math.inf, x.double().mean(0))
    spread = 1.4826 * (norm / middle).clamp_min(1e-30).log().abs().median()
    limit = float(middle * (OUTLYING_MADS * spread).exp().clamp_min(OUTLYING_RATIO))
    return Usual(centre, limit, x[norm <= limit].double().mean(0))


def row_sums(saes: Mapping[str, SAE], store: Store, site: str, name: str) -> dict[str, tuple[RowSums, pd.DataFrame]]:
    """By sae_id: sums over one shard's rows, in all, and by group (index group, columns ROW_SUMS).

    usual, usual_error, usual_shifted: number, Σ‖x - x̂‖² and Σ‖x - mean of usual rows‖² of those of usual norm.
    """
    x, shift, norms = store.shard(site, name), store.mean(site), usual_rows(store, site)
    groups = store.row_columns(name, ("group",))["group"].to_pandas()
    codes, names = pd.factorize(groups, sort=True)
    device = next(iter(saes.values())).parameters["b_dec"].device
    sums = {sae_id: RowSums(shift) for sae_id in saes}
    by_group = {sae_id: {column: np.zeros(len(names)) for column in ROW_SUMS} for sae_id in saes}
    for start in range(0, x.shape[0], ROWS_AT_ONCE):
        part = codes[start : start + ROWS_AT_ONCE]
        rows = Rows(x[start : start + ROWS_AT_ONCE].to(device, torch.float32), shift)
        usual = norms.of(rows.x)
        alike = {"rows": torch.ones(len(part)), "usual": usual}
        alike["usual_shifted"] = (rows.x64 - norms.mean.to(rows.x64)).square().sum(1) * usual
        for sae_id, sae in saes.items():
            x_hat, f = sae.reconstruct(rows.x)
            terms = sums[sae_id].add(rows, x_hat, f)
            terms["usual_error"] = terms["squared_error"].where(usual, 0)
            count(by_group[sae_id], {**alike, **terms}, part)
    index = pd.Index(names, dtype=object)  # categories would keep the order of the shard's dictionary
    return {i: (sums[i], pd.DataFrame(by_group[i], index=index)) for i in saes}


def count(sums: dict[str, np.ndarray], values: Mapping[str, Tensor], codes: np.ndarray) -> None:
    """Add values [n] to the sums of their groups."""
    for name, value in values.items():
        sums[name] += np.bincount(codes, weights=value.double().cpu().numpy(), minlength=len(sums[name]))
