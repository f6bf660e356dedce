"""ReLU SAEs: L1 penalties and p-annealing."""

from __future__ import annotations

import torch
from torch import Tensor

from raysae.sae.architectures.base import (
    Architecture,
    Moment,
    Parameters,
    SAEConfig,
    Step,
    affine_gradients,
    preactivations,
    product,
    reconstruct,
)


class ReLU(Architecture):
    """ReLU with an L1 penalty weighted by the decoder norms (Conerly et al., April 2024).

    loss = mean_n [ ‖x_n - x̂_n‖² + λ Σ_j f_nj ‖W_dec,j‖ ]. Weighting by ‖W_dec,j‖ makes the penalty blind to rescaling
    f against W_dec, so the decoder needs no norm constraint.
    """

    name, coefficient, saelens = "relu", "l1_coefficient", "standard"

    @classmethod
    def encode(cls, p: Parameters, config: SAEConfig, x: Tensor) -> Tensor:
        return preactivations(p, x).relu_()

    @classmethod
    def step(cls, p: Parameters, config: SAEConfig, x: Tensor, moment: Moment) -> Step:
        weight = config.sparsity * moment.sparsity / x.shape[0]
        centred = x - p["b_dec"]
        f = moment.latents(product(moment.dtype, p["b_enc"], centred, p["W_enc"]).relu_())  # [rows, d_sae]
        loss, _, g_out = reconstruct(p, f, x)
        norms = p["W_dec"].norm(dim=1)  # [d_sae]
        sums = f.sum()
        g_W_dec = f.rows(g_out).addcmul_(p["W_dec"], (weight * sums / norms.clamp_min(1e-12)).unsqueeze(1))
        g_pre = moment.gradient(f, g_out, p["W_dec"], norms * weight).where_positive(f)
        terms = {"reconstruction": loss, "sparsity": weight * (sums * norms).sum()}
        return Step(affine_gradients(p, centred, g_out, g_W_dec, g_pre), terms, sums > 0)


class UnitNormReLU(ReLU):
    """ReLU with plain L1 and unit-norm decoder rows (Bricken et al. 2023): where all norms are 1, the loss is ReLU's."""

    name, constrain_decoder = "relu_unit_norm", True


class PAnneal(Architecture):
    """Lp^p with p annealed from 1 to 0.2, unit-norm decoder (Karvonen et al. 2024, p-annealing).

    loss = mean_n [ ‖x_n - x̂_n‖² + λ s Σ_j f_nj^p ], with f^p read as f · max(f, 1e-3)^(p-1): its slope would have no bound
    at zero. p falls in equal steps from half of the training to its end; at each fall s is set so that the penalty of
    the batch at hand stays what it was.
    """

    name, coefficient, saelens, constrain_decoder = "p_anneal", "l1_coefficient", "standard", True
    p_end, starts_at, falls, floor = 0.2, 0.5, 10, 1e-3

    @classmethod
    def encode(cls, p: Parameters, config: SAEConfig, x: Tensor) -> Tensor:
        return ReLU.encode(p, config, x)

    @classmethod
    def initial(cls, config: SAEConfig, p: Parameters) -> Parameters:
        return p | {"p": torch.tensor(1.0), "scale": torch.tensor(1.0)}

    @classmethod
    def power(cls, progress: float) -> float:
        """p at this share of the training."""
        fallen = int(max(0.0, (progress - cls.starts_at) / (1 - cls.starts_at)) * cls.falls) / cls.falls
        return 1 - (1 - cls.p_end) * min(fallen, 1.0)

    @classmethod
    def step(cls, p: Parameters, config: SAEConfig, x: Tensor, moment: Moment) -> Step:
        centred = x - p["b_dec"]
        latents = moment.latents(product(moment.dtype, p["b_enc"], centred, p["W_enc"]).relu_())
        loss, _, g_out = reconstruct(p, latents, x)
        f, power, before, scale = latents.values, cls.power(moment.progress), float(p["p"]), p["scale"]
        slope = f.clamp_min(cls.floor).pow_(power - 1)
        total = (f * slope).sum()
        if power != before:
            scale = scale * (f * f.clamp_min(cls.floor).pow_(before - 1)).sum() / total.clamp_min(1e-12)
        weight = config.sparsity * moment.sparsity / x.shape[0] * scale
        g_pre = moment.gradient(latents, g_out, p["W_dec"])
        g_pre.values.addcmul_(slope, torch.where(f > cls.floor, weight * power, weight).to(f.dtype))
        gradients = affine_gradients(p, centred, g_out, latents.rows(g_out), g_pre.where_positive(latents))
        terms = {"reconstruction": loss, "sparsity": weight * total}
        return Step(gradients, terms, latents.fired(), {"p": torch.tensor(power), "scale": scale})
