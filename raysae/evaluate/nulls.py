"""Nulls: what an SAE must be better than, measured on the same rows with the same code.

Each is an SAE like any other, on disk in the same layout, and stands beside trained ones. Its kind says what it lacks:

untrained        training: the compared SAE's size and start; a row keeps the k largest pre-activations
random_encoder   a trained encoder: as untrained, of another seed, but its decoder is the best there is for this encoder, by
                 least squares on training rows. What an SAE does no better is not owed to what its latents detect
permuted         its decoder: each latent's row of W_dec is another's; encoder, L0 and firings are the compared SAE's
pca, ica         more directions than axes: the principal, or independent, components of training rows, of which a row keeps
                 the k largest, signed (AbsTopK)
shuffled_rows    structure: trained as the compared SAE was, on rows whose dimensions were shuffled apart from each other
                 (`sweep.trial.unpaired`), and measured on real rows
untrained_model  a trained model: trained as the compared SAE was, on the activations of the same architecture with random
                 weights, and measured on these. Spliced into a model that predicts nothing it has no loss to recover, so
                 its cross-entropies are not measured (Heap et al. 2025 find such SAEs as interpretable as others)

The last two train, and stand beside one SAE of each site and architecture, the widest with the median coefficient. The
others stand beside every completed SAE, at its size and L0: k = its L0 rounded up, of which SAEs that agree share one.
None is a straw man: untrained and permuted decoders get their best scale and bias on training rows. A linear code has d_in
directions at most, and is judged at the width of the SAE; a signed component counts as one latent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from raysae.activations.source import Source
from raysae.files import read_json_if, write_json
from raysae.sae import formats
from raysae.sae.architectures import ARCHITECTURES, SAEConfig
from raysae.sae.losses import Losses
from raysae.sae.sae import SAE
from raysae.sae.train import Member, untrained
from raysae.sweep.trial import Trial, input_scale

FITTED_ROWS = 20_000
"""Training rows, at most, on which scales, PCA and ICA are fitted."""
ROWS_PER_LATENT, FITTED_NUMBERS = 8, 1 << 28
"""Rows for a decoder: FITTED_ROWS, or so many per latent, of at most so many numbers (1 GiB in float32)."""
RIDGE, TOLERANCE, SOLVER_STEPS = 1e-4, 1e-3, 60
"""Of the decoder's solve: ridge relative to a latent's mean variance, relative residual, and steps of the solver."""
GRAM_AT_MOST = 4096
"""Latents up to which their Gram matrix is formed once (64 MiB); beyond, each step goes over the rows."""
SMALLEST_VARIANCE = 1e-7
"""Share of the variance below which a principal component is rounding, which ICA must not whiten."""
ICA_STEPS, ICA_TOLERANCE = 200, 1e-3
TRAINED = ("shuffled_rows", "untrained_model")
"""Kinds that are trained as the compared SAE was."""
LINEAR = ("pca", "ica")
"""Linear codes: at most d_in directions."""
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
    median: bool = True
    """Whether kinds that train stand beside it."""

    @property
    def k(self) -> int:
        """Its L0 rounded up, at least 1."""
        return min(max(1, math.ceil(self.l0 - 1e-9)), self.sae.config.d_sae)

    def null(self, kind: str) -> str:
        """The id of its null of a kind: one of SAEs that can share it. No kind holds a dash."""
        config = self.sae.config
        if kind == "permuted":
            return f"control-{kind}-{self.sae_id}"
        if kind in TRAINED:
            return f"control-{kind}-{config.architecture}-{config.d_sae}-{self.site}"
        if kind in LINEAR:
            d_sae = min(config.d_sae, config.d_in)
            return f"control-{kind}-{d_sae}-k{min(self.k, d_sae)}-{self.site}"
        architecture = config.architecture if kind == "untrained" else self.code
        return f"control-{kind}-{architecture}-{config.d_sae}-k{self.k}-{self.site}"

    @property
    def code(self) -> str:
        """How its nulls choose k latents: with their sign, where it does."""
        return "abstopk" if self.sae.config.architecture == "abstopk" else "topk"


def peers(sweep: Path) -> Iterator[Peer]:
    """The completed SAEs of a sweep's stage, one at a time."""
    curves = pd.read_parquet(sweep / "curves.parquet").groupby("sae_id").tail(1).set_index("sae_id")
    table = pd.read_parquet(sweep / "table.parquet")
    median = {*compared(table)["sae_id"]}
    for row in table[table["status"] == "completed"].to_dict("records"):
        sae_id = str(row["sae_id"])
        sae = formats.load(sweep / "saes" / sae_id)
        l0, rate = float(curves.at[sae_id, "l0"]), float(row["learning_rate"])
        yield Peer(sae_id, str(row["site"]), sae, l0, rate, sae_id in median)


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
    trained: Iterable[Peer],
    trial: Trial,
    losses: Losses,
    seed: int,
    train: Callable[[Trial, Mapping[str, Sequence[Member]]], None],
) -> dict[str, dict[str, Any]]:
    """Make the nulls of these kinds below `root/saes/`, those that are trained by one pack per site and kind.

    Returns, by id, kind, site, architecture, d_sae, expansion_factor, `beside` (the ids of the SAEs that it stands beside),
    `made`: false where a training diverged, of those at an SAE's L0 their k, and of linear codes `latents`, the width at
    which they are judged. `train` gets a trial (with `root` as its root) and the packs by site; what was made before is
    neither made nor trained again.
    """
    maker = _Maker(trial.source, seed)
    facts: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in kinds}
    packs: dict[str, dict[str, list[Member]]] = {kind: {} for kind in TRAINED}
    for peer in trained:
        config = peer.sae.config
        for kind in kinds if peer.median else [kind for kind in kinds if kind not in TRAINED]:
            name, nulls = peer.null(kind), facts[kind]
            if name not in nulls:
                size, more = config, dict[str, Any]()
                if kind not in TRAINED:
                    size, more = maker.made(root, name, kind, peer)
                elif not _is_there(root, name):
                    packs[kind].setdefault(peer.site, []).append(Member(name, config, peer.learning_rate, losses))
                nulls[name] = {
                    "kind": kind, "site": peer.site, "architecture": config.architecture, "d_sae": size.d_sae,
                    "expansion_factor": size.d_sae / size.d_in, "beside": [], **more,
                }  # fmt: skip
            nulls[name]["beside"].append(peer.sae_id)
            if kind in LINEAR:
                nulls[name]["latents"] = max(nulls[name].get("latents", 0), config.d_sae)
    for kind, pack in packs.items():
        if pack:
            train(replace(trial, root=root, shuffled=kind == "shuffled_rows"), pack)
    return {name: {**null, "made": _is_there(root, name)} for nulls in facts.values() for name, null in nulls.items()}


def _is_there(root: Path, name: str) -> bool:
    return (root / "saes" / name / "cfg.json").exists()


class _Maker:
    """Nulls that need no training, with what those of one site share."""

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed
        self._codes: dict[tuple[str, str, int], tuple[SAE, bool | None]] = {}

    def made(self, root: Path, name: str, kind: str, peer: Peer) -> tuple[SAEConfig, dict[str, Any]]:
        """The config of a null below `root/saes/` and the facts of `make`, made only if it is not there."""
        if _is_there(root, name):
            return formats.load(root / "saes" / name).config, read_json_if(root / "facts" / f"{name}.json")
        null, more = self.make(kind, peer)
        (root / "facts").mkdir(parents=True, exist_ok=True)
        write_json(root / "facts" / f"{name}.json", more)
        formats.save(null, root / "saes" / name)
        return null.config, more

    def make(self, kind: str, peer: Peer) -> tuple[SAE, dict[str, Any]]:
        """A null, with its k and on how many rows it was fitted; for ica, whether it converged."""
        sae, config = peer.sae, peer.sae.config
        if kind == "permuted":
            rows = self.rows(peer.site, FITTED_ROWS)
            return scaled(permuted(sae, self.seed), rows), {"fitted_rows": len(rows)}
        if kind in LINEAR:
            size = min(config.d_sae, config.d_in)
            k = min(peer.k, size)
            code, converged = self._code(kind, peer.site, SAEConfig("abstopk", config.d_in, size, k=1, seed=self.seed))
            code = SAE(replace(code.config, k=min(k, code.config.d_sae)), code.parameters)
            more = {"k": k, "fitted_rows": len(self.rows(peer.site, FITTED_ROWS))}
            return _labelled(code, sae), more | ({} if converged is None else {"converged": converged})
        if kind not in ("untrained", "random_encoder"):
            raise ValueError(f"kind: {kind!r} is unknown")
        start = SAEConfig(peer.code, config.d_in, config.d_sae, k=peer.k, seed=config.seed)
        if kind == "untrained":
            rows = self.rows(peer.site, FITTED_ROWS)
            null = scaled(untrained(start, input_scale(self.source, peer.site)), rows)
        else:
            wanted = max(FITTED_ROWS, ROWS_PER_LATENT * config.d_sae)
            rows = self.rows(peer.site, min(wanted, FITTED_NUMBERS // config.d_in))
            null = fitted(untrained(_reseeded(start, self.seed), input_scale(self.source, peer.site)), rows)
        return _labelled(null, sae), {"k": peer.k, "fitted_rows": len(rows)}

    def rows(self, site: str, most: int) -> Tensor:
        """Up to so many training rows [n, d_in], the same for the same number."""
        count = min(most, self.source.rows("train"))
        return next(self.source.batches(site, "train", count, seed=self.seed)).float()

    def _code(self, kind: str, site: str, config: SAEConfig) -> tuple[SAE, bool | None]:
        key = (kind, site, config.d_sae)
        if key not in self._codes:
            self._codes[key] = (pca if kind == "pca" else ica)(self.rows(site, FITTED_ROWS), config)
        return self._codes[key]


def scaled(sae: SAE, rows: Tensor) -> SAE:
    """The SAE with the one factor on W_dec, and the b_dec, that leave least error on rows [n, d_in]; latents unchanged."""
    p = sae.parameters
    f = ARCHITECTURES[sae.config.architecture].encode_latents(p, sae.config, rows)
    u = f.decode(p["W_dec"], torch.zeros_like(p["b_dec"]))
    at = u.double().mean(0), rows.double().mean(0)
    apart = u.double() - at[0]
    factor = float((apart * (rows.double() - at[1])).sum() / apart.square().sum().clamp_min(1e-30))
    return _decoded(sae, p["W_dec"] * factor, (at[1] - factor * at[0]).float())


def fitted(sae: SAE, rows: Tensor) -> SAE:
    """The SAE with the W_dec and b_dec that leave least error on rows [n, d_in], by ridge regression on its latents.

    The centred normal equations by conjugate gradients, preconditioned by their diagonal (Saad 2003, alg. 9.1), for all
    dimensions at once. Latents stay sparse, and memory is a few times that of the rows. A latent that never fires gets
    a row of zeros.
    """
    p, n = sae.parameters, len(rows)
    f = ARCHITECTURES[sae.config.architecture].encode_latents(p, sae.config, rows)
    mean, of_rows = f.sum()[:, None] / n, rows.mean(0)
    squares = f.with_values(f.values.square()).sum()[:, None] / n
    variance = (squares - mean.square()).clamp_min(0)
    ridge = RIDGE * float(variance.mean())
    nothing = torch.zeros_like(p["b_dec"])
    gram = f.rows(f.dense()) / n if len(mean) <= GRAM_AT_MOST else None

    def times(v: Tensor) -> Tensor:
        """(FᵀF / n - mean meanᵀ + ridge) v for v [d_sae, d_in]."""
        product = f.rows(f.decode(v, nothing)) / n if gram is None else gram @ v
        return product.sub_(mean @ (mean.T @ v)).add_(v, alpha=ridge)

    residual = f.rows(rows - of_rows) / n  # the rows' mean is gone, and with it that of the latents
    scale = 1 / (variance + max(ridge, 1e-30))
    W_dec, goal = torch.zeros_like(residual), TOLERANCE * float(residual.norm())
    step = scale * residual
    energy = (residual * step).sum(0)
    for _ in range(SOLVER_STEPS):
        if float(residual.norm()) <= goal:
            break
        along = times(step)
        length = energy / (step * along).sum(0).clamp_min(1e-30)
        W_dec += length * step
        residual -= length * along
        before, better = energy, scale * residual
        energy = (residual * better).sum(0)
        step = better + energy / before.clamp_min(1e-30) * step
    return _decoded(sae, W_dec, of_rows - (mean.T @ W_dec)[0])


def _decoded(sae: SAE, W_dec: Tensor, b_dec: Tensor) -> SAE:
    """The SAE with another decoder. Encoders read x - b_dec: what that changes is given back to their biases."""
    p = dict(sae.parameters)
    moved = (b_dec - p["b_dec"]) @ p["W_enc"]
    if "b_enc" in p:
        p["b_enc"] = p["b_enc"] + moved
    else:  # gated: xw + b_gate > 0, xw · exp(r_mag) + b_mag
        p["b_gate"], p["b_mag"] = p["b_gate"] + moved, p["b_mag"] + moved * p["r_mag"].exp()
    return SAE(sae.config, p | {"W_dec": W_dec, "b_dec": b_dec}, dict(sae.metadata))


def _reseeded(config: SAEConfig, seed: int) -> SAEConfig:
    """From another seed than an SAE's own, which would give the start that it was trained from."""
    return replace(config, seed=config.seed + seed + 1)


def random_sae(sae: SAE, source: Source, site: str, seed: int) -> SAE:
    """The SAE before its first step, from another seed."""
    return untrained(_reseeded(sae.config, seed), input_scale(source, site))


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


def pca(rows: Tensor, config: SAEConfig) -> tuple[SAE, bool | None]:
    """f = V (x - mean), x̂ = Vᵀ f + mean with V the first d_sae principal components (rows) of `rows` [n, d_in]."""
    fitted = PCA(_rank(rows, config.d_sae), svd_solver="covariance_eigh").fit(rows.numpy())
    return _code(config, fitted.components_, fitted.components_, fitted.mean_), None


def ica(rows: Tensor, config: SAEConfig) -> tuple[SAE, bool | None]:
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
    wanted = {"kind": kind, "site": site, "architecture": architecture, "made": True}
    return next((name for name, null in facts.items() if all(null[k] == v for k, v in wanted.items())), None)
