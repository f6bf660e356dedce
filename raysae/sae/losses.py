"""Loss terms that any architecture can carry beside reconstruction and sparsity, with their gradients.

Two act on the decoder: decorrelation and the largest cosine. Two act on the latents and need more than the activations: a
probe on row labels, and smoothness between neighbouring tokens. Each is off at coefficient 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLED_ATOMS = 256
"""Decoder rows whose largest cosine is looked at in one step: all take their turn."""


@dataclass(frozen=True)
class Losses:
    """Coefficients, in the units of the reconstruction term (inputs of variance 1, summed over d_in)."""

    decorrelation: float = 0.0
    max_cosine: float = 0.0
    max_cosine_above: float = 0.5
    """Cosine from which the largest one of an atom costs."""
    probe: float = 0.0
    probe_classes: int = 0
    """Number of labels."""
    temporal: float = 0.0

    @property
    def on_latents(self) -> bool:
        return self.probe > 0 or self.temporal > 0

    def only(self, name: str) -> Losses:
        """All terms off but this one."""
        off = {term: 0.0 for term in ("decorrelation", "max_cosine", "probe", "temporal") if term != name}
        return replace(self, **off)  # type: ignore[arg-type]


class Batch(NamedTuple):
    """Rows of activations and what the terms on latents need of them."""

    x: Tensor  # [rows, d_in]
    labels: Tensor | None = None  # [rows] int64; negative: no label
    follows: Tensor | None = None  # [rows] bool: the row is the next token of the example that the row before it is of


def decorrelation(W_dec: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared cosine of the pairs of decoder rows, and its gradient [d_sae, d_in].

    Σ_{i≠j} cos²_ij / (F (F-1)) = (‖ŴᵀŴ‖² - F) / (F (F-1)), with Ŵ the unit rows and F = d_sae: a d_in × d_in product
    instead of the F × F one. Bounded below by 0, where Σ_{i<j} w_i·w_j is not. Random rows have 1 / d_in.
    """
    count = W_dec.shape[0]
    norms = W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit = W_dec / norms
    moment = unit.T @ unit  # [d_in, d_in]
    pairs = count * (count - 1)
    value = (moment.square().sum() - count) / pairs
    return value, _at_rows(unit @ moment * (4 / pairs), unit, norms)


def max_cosine(W_dec: Tensor, above: float, step: int) -> tuple[Tensor, Tensor]:
    """Hinge Σ_i relu(max_{j≠i} cos_ij - above)² / n over this step's sample of n atoms, and its gradient [d_sae, d_in]."""
    count = W_dec.shape[0]
    size = min(SAMPLED_ATOMS, count)
    sample = (torch.arange(size, device=W_dec.device) + step * size) % count
    norms = W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit = W_dec / norms
    cosines = unit[sample] @ unit.T  # [n, d_sae]
    cosines[torch.arange(size, device=W_dec.device), sample] = -1
    largest, nearest = cosines.max(1)
    over = (largest - above).relu_()
    weight = (2 / size * over).unsqueeze(1)
    g_unit = torch.zeros_like(W_dec)
    g_unit.index_add_(0, sample, weight * unit[nearest]).index_add_(0, nearest, weight * unit[sample])
    return over.square().sum() / size, _at_rows(g_unit, unit, norms)


def _at_rows(g_unit: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """The gradient at rows w from the one at w / ‖w‖."""
    return (g_unit - (g_unit * unit).sum(1, keepdim=True) * unit) / norms


def probe(f: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy in nats of a linear head (weight [d_sae, classes], bias) on the labelled rows' latents.

    Returns it and its gradients at f, weight and bias. The head is trained with the SAE, so that the label becomes linearly
    readable from f; what it reads is no evidence: that is a fresh probe's, on held-out groups.
    """
    labelled = labels >= 0
    count = labelled.sum().clamp_min(1)
    logits = (f.to(weight.dtype) @ weight + bias).log_softmax(1)
    index = labels.clamp_min(0).unsqueeze(1)
    value = -(logits.gather(1, index).squeeze(1) * labelled).sum() / count
    g_logits = logits.exp().scatter_add(1, index, -torch.ones_like(index, dtype=logits.dtype))
    g_logits *= (labelled / count).unsqueeze(1)
    return value, g_logits @ weight.T, f.to(weight.dtype).T @ g_logits, g_logits.sum(0)


def temporal(f: Tensor, follows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over neighbouring tokens of ‖f_t - f_{t-1}‖², and its gradient at f [rows, d_sae].

    `follows` keeps pairs that cross from one example to the next, or skip a token, out of it.
    """
    paired = follows[1:].unsqueeze(1)
    count = paired.sum().clamp_min(1)
    change = (f[1:] - f[:-1]) * paired
    g = torch.zeros_like(f)
    g[1:] += change
    g[:-1] -= change
    return change.square().sum() / count, g * (2 / count)
