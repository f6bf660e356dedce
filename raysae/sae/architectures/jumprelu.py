"""JumpReLU SAEs: a learned threshold per latent, trained by straight-through estimators.

f = pre · 1[pre > θ] with θ = exp(log_threshold). The step's derivative, zero almost everywhere, is replaced by a rectangle
of width ε around the threshold (Rajamanoharan et al. 2024, eqs. 11-12): ∂f/∂θ = -(θ/ε) K((pre-θ)/ε), ∂1[pre>θ]/∂θ =
-(1/ε) K((pre-θ)/ε). The step is taken of `pre`, not of f, which would apply the threshold twice.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from raysae.sae.architectures.base import (
    Architecture,
    Moment,
    Parameters,
    SAEConfig,
    Step,
    add_gradients_at,
    affine_gradients,
    preactivations,
    product,
    reconstruct,
)
from raysae.sae.latents import Dense


class Penalty(NamedTuple):
    """A sparsity term and its gradients."""

    value: Tensor  # []
    at_l0: float | Tensor = 0.0  # of the batch's mean L0: the same for all latents
    at_f: Tensor | None = None  # [rows, d_sae]
    at_pre: Tensor | None = None  # [rows, d_sae]
    at_threshold: Tensor | None = None  # [d_sae]
    at_norm: Tensor | None = None  # [d_sae] of the decoder norms


class JumpReLU(Architecture):
    """Penalty (L0 / target - 1)² on the batch's mean L0, unit-norm decoder (Rajamanoharan et al. 2024, appendix; SAEBench).

    The quadratic says which L0 is wanted, so the axis of a sweep is L0 itself; a coefficient of L0 moves it far or not at
    all, with the learning rate, bandwidth and length of the run.

    Dead latents are moved back to their threshold by `pull` · mean_n Σ_dead relu(θ - pre), the second term of Anthropic's
    loss (January 2025), which there is for all latents. With it Adam may have β1 = 0.9 (0 in the paper): FVU at L0 16 is
    0.049 for 0.056, with 1 % dead; without it 14 to 43 % die (stories260K, 500k tokens).
    """

    name, coefficient, saelens, constrain_decoder = "jumprelu", "target_l0", "jumprelu", True
    trained: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "log_threshold", "W_dec", "b_dec")
    revives, pull = True, 1e-3
    local = True
    """Whether its penalty acts only on latents that are on or near their threshold."""
    widths, start = 0.5, 0.5
    """ε and the first θ in units of 1/sqrt(d_in), what a random direction reads of inputs of norm 1. The papers have 0.05
    of each, for runs of 10⁹ tokens and more; at 10⁶ or 10⁷ so narrow a rectangle at so low a threshold hardly moves it."""

    @classmethod
    def bandwidth(cls, d_in: int) -> float:
        """ε, in units where mean ‖x‖² = 1."""
        return cls.widths / math.sqrt(d_in)

    @classmethod
    def initial(cls, config: SAEConfig, p: Parameters) -> Parameters:
        return p | {"log_threshold": torch.full((config.d_sae,), math.log(cls.start / math.sqrt(config.d_in)))}

    @classmethod
    def encode(cls, p: Parameters, config: SAEConfig, x: Tensor) -> Tensor:
        pre = preactivations(p, x)
        return pre.mul_(pre > p["log_threshold"].exp())

    @classmethod
    def penalty(
        cls, p: Parameters, config: SAEConfig, moment: Moment, pre: Tensor, f: Tensor, on: Tensor, norms: Tensor
    ) -> Penalty:
        """The sparsity term, its coefficient included."""
        ratio = torch.count_nonzero(on).float() / (on.shape[0] * config.sparsity)
        return Penalty(moment.sparsity * (ratio - 1) ** 2, 2 * moment.sparsity * (ratio - 1) / config.sparsity)

    @classmethod
    def step(cls, p: Parameters, config: SAEConfig, x: Tensor, moment: Moment) -> Step:
        epsilon = cls.bandwidth(config.d_in)
        centred, threshold = x - p["b_dec"], p["log_threshold"].exp()
        pre = product(moment.dtype, p["b_enc"], centred, p["W_enc"])  # [rows, d_sae]
        low = threshold.to(pre.dtype)
        all_on, all_near = pre > low, (pre - low).abs_() < epsilon / 2
        dead = moment.dead_index
        missing = (low[dead] - pre[:, dead]).relu_()  # [rows, n_dead], before `pre` is written over
        # Places: where a latent is on, or near enough to its threshold to move it.
        f = moment.latents(pre.mul_(all_on), all_on | all_near) if cls.local else Dense(pre * all_on)
        on, near = f.at(all_on), f.at(all_near)
        loss, _, g_out = reconstruct(p, f, x)
        norms = p["W_dec"].norm(dim=1)
        penalty = cls.penalty(p, config, moment, pre, f.values, all_on, norms)
        g_W_dec, fired = f.rows(g_out), f.fired()
        window = f.with_values(near.to(f.values.dtype)).sum()  # [d_sae] rows near the threshold
        g_f = moment.gradient(f, g_out, p["W_dec"]).values
        if penalty.at_f is not None:
            g_f += penalty.at_f
        # f is done with: its memory serves. No products with masks, which would be copied to floats first.
        g_pre = f.with_values(torch.where(on, g_f, g_f.new_zeros(()), out=f.values))
        g_near = f.with_values(g_f.masked_fill_(near.logical_not_(), 0))
        g_threshold = threshold * g_near.sum() + penalty.at_l0 / x.shape[0] * window
        g_threshold /= -epsilon
        if penalty.at_pre is not None:
            g_pre.values.add_(penalty.at_pre)
        if penalty.at_threshold is not None:
            g_threshold += penalty.at_threshold
        if penalty.at_norm is not None:
            g_W_dec.addcmul_(p["W_dec"], (penalty.at_norm / norms.clamp_min(1e-12)).unsqueeze(1))
        gradients = affine_gradients(p, centred, g_out, g_W_dec, g_pre)
        terms = {"reconstruction": loss, "sparsity": penalty.value}
        if len(dead):
            terms["aux"] = cls.pull * Dense(missing).sum().sum() / x.shape[0]
            g_missing = Dense((missing > 0).to(missing.dtype).mul_(-cls.pull / x.shape[0]))
            g_threshold[dead] -= add_gradients_at(dead, gradients, p, centred, g_missing)
        gradients["log_threshold"] = g_threshold * threshold
        return Step({name: gradients[name] for name in cls.trained}, terms, fired)

    @classmethod
    def to_saelens(cls, p: Parameters, config: SAEConfig) -> tuple[Parameters, dict[str, object]]:
        tensors = {name: tensor for name, tensor in p.items() if name != "log_threshold"}
        return tensors | {"threshold": p["log_threshold"].exp()}, {}

    @classmethod
    def from_saelens(cls, tensors: Parameters) -> Parameters:
        kept = {name: tensor for name, tensor in tensors.items() if name != "threshold"}
        # SAELens' rule is relu(pre) · 1[pre > θ], so θ < 0 does what 0 does; its logarithm would be NaN
        return kept | {"log_threshold": tensors["threshold"].clamp_min(0).log()}


class StepJumpReLU(JumpReLU):
    """Penalty λ · L0 (Rajamanoharan et al. 2024, eq. 9)."""

    name, coefficient = "jumprelu_l0", "l0_coefficient"

    @classmethod
    def penalty(
        cls, p: Parameters, config: SAEConfig, moment: Moment, pre: Tensor, f: Tensor, on: Tensor, norms: Tensor
    ) -> Penalty:
        weight = config.sparsity * moment.sparsity
        return Penalty(weight * torch.count_nonzero(on).float() / on.shape[0], weight)


class TanhJumpReLU(JumpReLU):
    """Penalty λ_S Σ tanh(c f ‖W_dec‖) + λ_P Σ relu(θ - pre) ‖W_dec‖ (Anthropic, January 2025).

    Theirs is stated at E‖x‖ = sqrt(d): c = 4, ε = 2, θ starts at 0.1, λ_P = 3e-6 and λ_S near 20. At mean ‖x‖² = 1 these
    are c = 4 sqrt(d), ε = 2 / sqrt(d), θ = 0.1 / sqrt(d), λ_P / sqrt(d) and, the coefficient here, λ_S / d. The second term
    moves a latent that never fires back to its threshold.
    """

    name, coefficient, constrain_decoder = "jumprelu_tanh", "l0_coefficient", False
    revives, local, encoder_norm = False, False, 0.6
    widths, start = 2.0, 0.1

    @classmethod
    def penalty(
        cls, p: Parameters, config: SAEConfig, moment: Moment, pre: Tensor, f: Tensor, on: Tensor, norms: Tensor
    ) -> Penalty:
        rows, root = pre.shape[0], math.sqrt(config.d_in)
        weight = config.sparsity * moment.sparsity / rows
        norms, c = norms.to(pre.dtype), 4 * root
        squashed = (f * (c * norms)).tanh_()
        slope = (1 - squashed.square()).mul_(weight * c)  # [rows, d_sae] d/d(f ‖W_dec‖)
        missing = (p["log_threshold"].exp().to(pre.dtype) - pre).relu_()
        below, pull = missing > 0, 3e-6 / root / rows
        return Penalty(
            value=weight * Dense(squashed).sum().sum() + pull * (Dense(missing).sum() * norms).sum(),
            at_f=slope * norms,
            at_pre=below * (-pull * norms),
            at_threshold=pull * norms * Dense(below.to(pre.dtype)).sum(),
            at_norm=Dense(slope * f).sum() + pull * Dense(missing).sum(),
        )
