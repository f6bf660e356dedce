"""Fidelity sums over rows. Sums and counts are kept apart, in float64, and divided once at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

DENSE_ABOVE = 0.1
"""A latent that fires on more than this share of rows is called dense."""


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
    active: int = 0  # Σ number of non-zero latents
    l2_ratio: float = 0.0  # Σ ‖x̂‖/‖x‖
    cosine: float = 0.0  # Σ cos(x, x̂)
    shifted: Tensor = field(init=False)  # Σ (x - shift) [d]
    firings: Tensor | None = None  # rows on which each latent is non-zero [d_sae]

    def __post_init__(self) -> None:
        self.shift = self.shift.to(torch.float64)
        self.shifted = torch.zeros_like(self.shift)

    def add(self, x: Tensor, x_hat: Tensor, f: Tensor) -> dict[str, Tensor]:
        """Add rows; returns the per-row terms [n] (float64) that were added, for sums by group."""
        x64, x_hat64 = x.double(), x_hat.double()
        centred = x64 - self.shift.to(x.device)
        norm, norm_hat = x64.norm(dim=1), x_hat64.norm(dim=1)
        on = (f != 0).view(torch.uint8)  # sums of bytes into int32 are many times faster than of bool into int64
        active = on.sum(1, dtype=torch.int32)
        terms = {
            "squared_error": (x64 - x_hat64).square().sum(1),
            "squared_shifted": centred.square().sum(1),
            "active": active.double(),
            "l2_ratio": norm_hat / norm.clamp_min(1e-12),
            "cosine": (x64 * x_hat64).sum(1) / (norm * norm_hat).clamp_min(1e-12),
        }
        self.rows += x.shape[0]
        self.squared_error += terms["squared_error"].sum().item()
        self.squared_shifted += terms["squared_shifted"].sum().item()
        self.active += int(active.sum())
        self.l2_ratio += terms["l2_ratio"].sum().item()
        self.cosine += terms["cosine"].sum().item()
        self.shifted += centred.sum(0).cpu()
        firings = on.sum(0, dtype=torch.int32).long().cpu()
        self.firings = firings if self.firings is None else self.firings + firings
        return terms

    def merge(self, other: RowSums) -> RowSums:
        """Sums over both sets of rows; both must have the same shift."""
        if not torch.equal(self.shift, other.shift):
            raise ValueError("sums about different shifts do not add")
        merged = RowSums(self.shift)
        for name in ("rows", "squared_error", "squared_shifted", "active", "l2_ratio", "cosine", "shifted"):
            setattr(merged, name, getattr(self, name) + getattr(other, name))
        both = [s.firings for s in (self, other) if s.firings is not None]
        merged.firings = sum(both[1:], start=both[0]) if both else None
        return merged

    @property
    def total_variance(self) -> float:
        """Σ ‖x - μ‖² with μ the mean of the rows seen."""
        return self.squared_shifted - self.shifted.square().sum().item() / max(self.rows, 1)

    def metrics(self) -> dict[str, float]:
        """FVU = Σ‖x-x̂‖² / Σ‖x-μ‖², EV = 1 - FVU (not clipped), L0, and the rest, over the rows seen."""
        fvu = self.squared_error / self.total_variance if self.total_variance > 0 else float("nan")
        firings = self.firings if self.firings is not None else torch.zeros(1)
        rows = max(self.rows, 1)
        return {
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "l0": self.active / rows,
            "l2_ratio": self.l2_ratio / rows,
            "cosine": self.cosine / rows,
            "never_fired_fraction": (firings == 0).double().mean().item(),
            "dense_fraction": (firings > DENSE_ABOVE * rows).double().mean().item(),
        }
