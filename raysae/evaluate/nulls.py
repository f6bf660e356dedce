"""Nulls: what an SAE must be better than, measured on the same rows with the same code.

Each is an SAE like any other, on disk in the same layout, and stands beside one trained SAE: of each site and architecture,
the widest with the median coefficient. Its kind says what it lacks:

untrained        training: the compared SAE before its first step. It knows the rows' mean and norm
permuted         its decoder: each latent's row of W_dec is another's; encoder, L0 and firings are the compared SAE's
pca, ica         more directions than axes: the principal, or independent, components of training rows, of which a row keeps
                 the k largest, signed (AbsTopK)
shuffled_rows    structure: trained as the compared SAE was, on rows whose dimensions were shuffled apart from each other
                 (`sweep.trial.unpaired`), and measured on real rows
untrained_model  a trained model: trained as the compared SAE was, on the activations of the same architecture with random
                 weights, and measured on these. Spliced into a model that predicts nothing it has no loss to recover, so
                 its cross-entropies are not measured (Heap et al. 2025 find such SAEs as interpretable as others)

Equal size, for pca and ica: the same L0, k = that of the compared SAE rounded up, and as many directions as it has up to
d_in, which is all that a linear code has. A signed component counts as one latent. Components are fitted on FITTED_ROWS.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from raysae.activations.store import Store
from raysae.sae import formats
from raysae.sae.architectures import ARCHITECTURES, SAEConfig
from raysae.sae.losses import Losses
from raysae.sae.sae import SAE
from raysae.sae.train import Member, untrained
from raysae.sweep.trial import Trial, input_scale

FITTED_ROWS = 20_000
"""Training rows, at most, on which PCA and ICA are fitted."""
SMALLEST_VARIANCE = 1e-7
"""Share of the variance below which a principal component is rounding, which ICA must not whiten."""
ICA_STEPS, ICA_TOLERANCE = 200, 1e-3
TRAINED = ("shuffled_rows", "untrained_model")
"""Kinds that are trained as the compared SAE was."""
ELSEWHERE = "untrained_model"
"""The kind that is made from, and measured on, another store."""


class Peer(NamedTuple):
    """A trained SAE that nulls are compared with."""

    sae_id: str
    site: str
    sae: SAE
    l0: float
    """On the validation sample of its last rung."""
    learning_rate: float
    """Its peak."""

    def null(self, kind: str, d_sae: int | None = None) -> str:
        """The id of its null of a kind. No kind holds a dash."""
        config = self.sae.config
        return f"control-{kind}-{config.architecture}-{d_sae or config.d_sae}-{self.site}"


def peers(sweep: Path) -> list[Peer]:
    """The SAEs of a sweep's stage that nulls are compared with."""
    curves = pd.read_parquet(sweep / "curves.parquet").groupby("sae_id").tail(1).set_index("sae_id")
    found = []
    for row in compared(pd.read_parquet(sweep / "table.parquet")).to_dict("records"):
        sae_id = str(row["sae_id"])
        sae = formats.load(sweep / "saes" / sae_id)
        l0 = float(curves.at[sae_id, "l0"])
        found.append(Peer(sae_id, str(row["site"]), sae, l0, float(row["learning_rate"])))
    return found


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """Of each site and architecture the widest completed SAE with the median coefficient, the lower of two; first seed."""
    rows = []
    for (_, architecture), alike in table[table["status"] == "completed"].groupby(["site", "architecture"]):
        widest = alike[alike["d_sae"] == alike["d_sae"].max()]
        knob = ARCHITECTURES[str(architecture)].coefficient
        median = widest[knob].quantile(0.5, interpolation="lower")
        rows.append(widest[widest[knob] == median].sort_values("seed").head(1))
    return pd.concat(rows) if rows else table.head(0)


def build(
    root: Path,
    kinds: Sequence[str],
    found: Sequence[Peer],
    trial: Trial,
    losses: Losses,
    seed: int,
    train: Callable[[Trial, Mapping[str, Sequence[Member]]], None],
) -> dict[str, dict[str, Any]]:
    """Make the nulls of these kinds below `root/saes/`, those that are trained by one pack per site and kind.

    Returns, by id, kind, site, architecture, d_sae, expansion_factor, the compared SAE's id, and `made`: false where a
    training diverged. `train` gets a trial (with `root` as its root) and the packs by site; what was trained before is in
    none of them.
    """
    store = Store(trial.store)
    facts: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        packs: dict[str, list[Member]] = {}
        for peer in found:
            config, more = peer.sae.config, dict[str, Any]()
            if kind in TRAINED:
                name = peer.null(kind)
                if not _there(root, name):
                    packs.setdefault(peer.site, []).append(Member(name, config, peer.learning_rate, losses))
            else:
                sae, more = made(kind, peer, store, seed)
                config, name = sae.config, peer.null(kind, sae.config.d_sae)
                formats.save(sae, root / "saes" / name)
            facts[name] = {
                "kind": kind,
                "site": peer.site,
                "architecture": peer.sae.config.architecture,
                "d_sae": config.d_sae,
                "expansion_factor": config.d_sae / config.d_in,
                "compared": peer.sae_id,
                **more,
            }
        if packs:
            train(replace(trial, root=root, shuffled=kind == "shuffled_rows"), packs)
    return {name: {**known, "made": _there(root, name)} for name, known in facts.items()}


def _there(root: Path, name: str) -> bool:
    return (root / "saes" / name / "cfg.json").exists()


def made(kind: str, peer: Peer, store: Store, seed: int) -> tuple[SAE, dict[str, Any]]:
    """A null that needs no training, and for ica whether it converged."""
    sae = peer.sae
    if kind == "untrained":
        return _labelled(untrained(sae.config, input_scale(store, peer.site)), sae), {}
    if kind == "permuted":
        return permuted(sae, seed), {}
    if kind not in ("pca", "ica"):
        raise ValueError(f"kind: {kind!r} is unknown")
    count = min(FITTED_ROWS, store.rows("train"))
    rows = next(store.batches(peer.site, "train", count, seed=seed)).float()
    config = SAEConfig("abstopk", sae.config.d_in, min(sae.config.d_sae, sae.config.d_in), k=1, seed=seed)
    code, converged = pca(rows, config) if kind == "pca" else ica(rows, config)
    k = min(max(1, math.ceil(peer.l0 - 1e-9)), code.config.d_sae)
    code = SAE(replace(code.config, k=k), code.parameters)
    return _labelled(code, sae), {} if converged is None else {"converged": converged}


def random_sae(sae: SAE, store: Store, site: str, seed: int) -> SAE:
    """The SAE before its first step, from another seed than its own, which would give the start it was trained from."""
    return untrained(replace(sae.config, seed=sae.config.seed + seed + 1), input_scale(store, site))


def _labelled(null: SAE, sae: SAE) -> SAE:
    """The null with the compared SAE's metadata: it reads the same site."""
    return SAE(null.config, null.parameters, dict(sae.metadata))


def permuted(sae: SAE, seed: int) -> SAE:
    """The SAE with its decoder rows permuted in one cycle drawn at random: no latent keeps its own."""
    order = torch.randperm(sae.config.d_sae, generator=torch.Generator().manual_seed(seed))
    source = torch.empty_like(order)
    source[order] = order.roll(1)
    W_dec = sae.parameters["W_dec"][source.to(sae.parameters["W_dec"].device)]
    return SAE(sae.config, {**sae.parameters, "W_dec": W_dec}, dict(sae.metadata))


def pca(rows: Tensor, config: SAEConfig) -> tuple[SAE, None]:
    """f = V (x - mean), x̂ = Vᵀ f + mean with V the first d_sae principal components (rows) of `rows` [n, d_in]."""
    fitted = PCA(_rank(rows, config.d_sae), svd_solver="covariance_eigh").fit(rows.numpy())
    return _code(config, fitted.components_, fitted.components_, fitted.mean_), None


def ica(rows: Tensor, config: SAEConfig) -> tuple[SAE, bool]:
    """f = U (x - mean), x̂ = A f + mean with FastICA's unmixing U and mixing A (Hyvärinen 1999), and if it converged.

    Sources are scaled to mixing columns of unit norm, so that the largest are those that contribute most to x̂.
    """
    fitted = FastICA(
        _rank(rows, config.d_sae), whiten="unit-variance", whiten_solver="eigh", max_iter=ICA_STEPS, tol=ICA_TOLERANCE,
        random_state=config.seed,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        fitted.fit(rows.double().numpy())
    norms = np.linalg.norm(fitted.mixing_, axis=0)  # mixing_ [d_in, n], components_ [n, d_in]
    code = _code(config, fitted.components_ * norms[:, None], (fitted.mixing_ / norms).T, fitted.mean_)
    return code, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def _rank(rows: Tensor, most: int) -> int:
    """How many principal components of rows [n, d] carry more than rounding, at most `most`."""
    centred = rows.double() - rows.double().mean(0)
    variance = torch.linalg.eigvalsh(centred.T @ centred)
    return max(1, min(most, len(rows) - 1, int((variance > SMALLEST_VARIANCE * variance.sum()).sum())))


def _code(config: SAEConfig, encode: np.ndarray, decode: np.ndarray, mean: np.ndarray) -> SAE:
    """The SAE of a linear code: `encode` and `decode` [n, d_in], one row per component."""
    n = len(decode)
    tensors = {"W_enc": encode.T, "W_dec": decode, "b_enc": np.zeros(n), "b_dec": mean}
    parameters = {name: torch.from_numpy(np.ascontiguousarray(t, dtype=np.float32)) for name, t in tensors.items()}
    return SAE(replace(config, d_sae=n), parameters)


def beside(facts: Mapping[str, Mapping[str, Any]], kind: str, site: str, architecture: str) -> str | None:
    """The null of a kind for SAEs of this site and architecture, by what `build` returned; None if it was not made."""
    for name, found in facts.items():
        if (found["kind"], found["site"], found["architecture"]) == (kind, site, architecture) and found["made"]:
            return name
    return None
