"""Fidelity sums over rows. Sums and counts are kept apart, in float64, and divided once at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raysae.sae.latents import Dense, Latents

DENSE_ABOVE = 0.1
"""A latent that fires on more than this share of rows is called dense."""

SCALARS = (
    "squared_error", "squared_shifted", "active", "l1", "squared_norm_hat", "inner_product", "l2_ratio", "cosine",
)  # fmt: skip
"""The sums of one number per row, by their name in `RowSums`."""


class Rows:
    """Rows x [n, d] with what every SAE's sums need of them alone, in float64: ‖x‖, x - shift, ‖x - shift‖²."""

    def __init__(self, x: Tensor, shift: Tensor) -> None:
        self.x, self.x64 = x, x.double()
        self.norm = self.x64.norm(dim=1)
        centred = self.x64 - shift.to(self.x64)
        self.squared_shifted, self.sum_shifted = centred.square().sum(1), centred.sum(0).cpu()


@dataclass
class RowSums:
    """Sums over rows x [n, d] and reconstructions x̂, from which every row metric follows.

    `shift` [d] is any vector near the mean: second moments are taken about it, so that float64 loses nothing when the
    mean is large, and the exact mean of the rows seen is taken out at the end.
    """

    shift: Tensor
    rows: int = 0
    squared_error: float = 0.0  # Σ ‖x - x̂‖²
    squared_shifted: float = 0.0  # Σ ‖x - shift‖²
    active: float = 0.0  # Σ number of non-zero latents
    l1: float = 0.0  # Σ Σ_j |f_j|
    squared_norm_hat: float = 0.0  # Σ ‖x̂‖²
    inner_product: float = 0.0  # Σ ⟨x, x̂⟩
    l2_ratio: float = 0.0  # Σ ‖x̂‖/‖x‖
    cosine: float = 0.0  # Σ cos(x, x̂)
    shifted: Tensor = field(init=False)  # Σ (x - shift) [d]
    residual: Tensor = field(init=False)  # Σ (x - x̂) [d]
    firings: Tensor | None = None  # rows on which each latent is non-zero [d_sae]

    def __post_init__(self) -> None:
        self.shift = self.shift.to(torch.float64)
        self.shifted = torch.zeros_like(self.shift)
        self.residual = torch.zeros_like(self.shift)

    def add(self, x: Tensor | Rows, x_hat: Tensor, f: Tensor | Latents) -> dict[str, Tensor]:
        """Add rows; returns the per-row terms [n] (float64) of SCALARS that were added, for sums by group.

        `x` may be Rows about the same shift, which several SAEs share.
        """
        rows = x if isinstance(x, Rows) else Rows(x, self.shift)
        x_hat64 = x_hat.double()
        residual = rows.x64 - x_hat64
        squared_norm_hat, inner = x_hat64.square().sum(1), (rows.x64 * x_hat64).sum(1)
        norm_hat = squared_norm_hat.sqrt()
        active, l1, firings = (Dense(f) if isinstance(f, Tensor) else f).counts()
        terms = {
            "squared_error": residual.square().sum(1),
            "squared_shifted": rows.squared_shifted,
            "active": active.double(),
            "l1": l1.double(),  # a row's own sum in the dtype of f: in float64 it takes six times as long
            "squared_norm_hat": squared_norm_hat,
            "inner_product": inner,
            "l2_ratio": norm_hat / rows.norm.clamp_min(1e-12),
            "cosine": inner / (rows.norm * norm_hat).clamp_min(1e-12),
        }
        self.rows += x_hat.shape[0]
        sums = torch.stack([values.sum() for values in terms.values()]).tolist()
        for name, value in zip(terms, sums, strict=True):
            setattr(self, name, getattr(self, name) + value)
        self.shifted += rows.sum_shifted
        self.residual += residual.sum(0).cpu()
        firings = firings.long().cpu()
        self.firings = firings if self.firings is None else self.firings + firings
        return terms

    def merge(self, other: RowSums) -> RowSums:
        """Sums over both sets of rows; both must have the same shift."""
        if not torch.equal(self.shift, other.shift):
            raise ValueError("sums about different shifts do not add")
        merged = RowSums(self.shift)
        for name in ("rows", *SCALARS, "shifted", "residual"):
            setattr(merged, name, getattr(self, name) + getattr(other, name))
        both = [s.firings for s in (self, other) if s.firings is not None]
        merged.firings = sum(both[1:], start=both[0]) if both else None
        return merged

    @property
    def total_variance(self) -> float:
        """Σ ‖x - μ‖² with μ the mean of the rows seen."""
        return self.squared_shifted - self.shifted.square().sum().item() / max(self.rows, 1)

    def metrics(self) -> dict[str, float]:
        """FVU = Σ‖x-x̂‖² / Σ‖x-μ‖², EV = 1 - FVU (not clipped), L0, and the rest, over the rows seen.

        l1: mean Σ_j |f_j|, in the units of the (folded) SAE's latents. relative_reconstruction_bias: E‖x̂‖² / E⟨x, x̂⟩,
        below 1 where x̂ is shrunk (Rajamanoharan et al. 2024, arXiv:2404.16014, eq. 10).
        """
        fvu = _ratio(self.squared_error, self.total_variance)
        firings = self.firings if self.firings is not None else torch.zeros(1)
        rows = max(self.rows, 1)
        return {
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "l0": self.active / rows,
            "l1": self.l1 / rows,
            "l2_ratio": self.l2_ratio / rows,
            "relative_reconstruction_bias": self.squared_norm_hat / (self.inner_product or math.nan),
            "cosine": self.cosine / rows,
            "never_fired_fraction": (firings == 0).double().mean().item(),
            "dense_fraction": (firings > DENSE_ABOVE * rows).double().mean().item(),
            **self.published_variances(),
        }

    def published_variances(self) -> dict[str, float]:
        """Four other definitions of explained variance, only so that published tables can be compared.

        With r = x - x̂, and m the mean of all elements of x (a scalar):

            ev_resid_var    1 - Σ_d var(r_d) / Σ_d var(x_d): does not see a constant offset of x̂
            ev_global       1 - var(all elements of r) / var(all elements of x): credits the per-dimension mean, and does
                            not see an offset that is the same in every dimension
            ev_scalar_mean  1 - Σ‖r‖² / Σ‖x - m‖²: credits the per-dimension mean
            ev_clipped      max(0, ev_scalar_mean): hides all that is worse than nothing
        """
        rows, d = max(self.rows, 1), self.shift.numel()
        mean, bias = self.shift + self.shifted / rows, self.residual / rows
        about_scalar = self.total_variance + rows * (mean - mean.mean()).square().sum().item()
        of_residual = self.squared_error - rows * bias.square().sum().item()
        all_of_residual = self.squared_error - rows * d * bias.mean().square().item()
        ev_scalar_mean = 1 - _ratio(self.squared_error, about_scalar)
        return {
            "ev_resid_var": 1 - _ratio(of_residual, self.total_variance),
            "ev_global": 1 - _ratio(all_of_residual, about_scalar),
            "ev_scalar_mean": ev_scalar_mean,
            "ev_clipped": max(ev_scalar_mean, 0.0),  # in this order, nan stays nan
        }


def _ratio(numerator: float, denominator: float) -> float:
    """nan for a denominator, a sum of squares, that is not above 0."""
    return numerator / denominator if denominator > 0 else math.nan
