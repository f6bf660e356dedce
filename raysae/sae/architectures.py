"""SAE architectures: one class each, holding the forward pass, the training loss and its hand-derived gradients.

All share the affine form with x scaled to mean ‖x‖² = 1 over the training rows while they train:

    pre = (x - b_dec) W_enc + b_enc,   f = σ(pre),   x̂ = f W_dec + b_dec

with W_enc [d_in, d_sae], W_dec [d_sae, d_in] (SAELens' layout). They differ in σ and in the sparsity term. A new one is a
class below and its line in ARCHITECTURES; nothing else in the package knows their names. Gradients are
written out because autograd would also form the gradient of the input (12 instead of 10·d_in·d_sae FLOPs per token) and
keep more [batch, d_sae] tensors; tests compare them with autograd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
"""W_enc, b_enc, W_dec, b_dec, and an architecture's buffers, which the optimizer does not touch."""
TRAINED = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class SAEConfig:
    """What determines an SAE's function and its training: architecture, shape, sparsity, seed.

    `k` belongs to topk and batchtopk, `l1_coefficient` to relu. The coefficient is stated for sum-over-d squared error and
    inputs of mean squared norm 1; at E‖x‖ = sqrt(d_in) the same SAE has sqrt(d_in) times as much.
    """

    architecture: str
    d_in: int
    d_sae: int
    k: int | None = None
    l1_coefficient: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: {self.architecture!r} is unknown; known: {', '.join(ARCHITECTURES)}")
        needed = ARCHITECTURES[self.architecture].coefficient
        if getattr(self, needed) is None:
            raise ValueError(f"{needed}: {self.architecture} needs it")
        if self.k is not None and not 0 < self.k <= self.d_sae:
            raise ValueError(f"k: {self.k} must lie in 1..d_sae={self.d_sae}")


class Step(NamedTuple):
    """One training step's outcome: gradients by parameter name, sums of the batch, and which latents fired."""

    gradients: Parameters
    squared_error: Tensor  # [] sum over the batch of ‖x - x̂‖², scaled units
    sparsity: Tensor  # [] mean over the batch of the sparsity term, without its coefficient (0 for topk)
    fired: Tensor  # [d_sae] bool
    buffers: Parameters = {}  # noqa: RUF012 new values of the architecture's buffers


class Architecture(ABC):
    """What an architecture is to the rest of the package. `p` are its parameters, in whatever units x has."""

    coefficient: str
    """Field of SAEConfig that sets its sparsity: k or l1_coefficient."""
    saelens: str
    """SAELens' name of its inference form."""
    constrain_decoder = False
    """Whether decoder rows are kept at unit norm."""

    @classmethod
    @abstractmethod
    def encode(cls, p: Parameters, config: SAEConfig, x: Tensor) -> Tensor:
        """f [rows, d_sae] of x [rows, d_in], by the inference rule."""

    @classmethod
    @abstractmethod
    def step(cls, p: Parameters, config: SAEConfig, x: Tensor, coefficient: float, dead: Tensor | None) -> Step:
        """Loss and gradients on a batch x [rows, d_in], with the L1 coefficient of this step and the dead latents."""

    @classmethod
    def buffers(cls) -> Parameters:
        """Initial values of what it keeps beside the trained parameters."""
        return {}

    @classmethod
    def to_saelens(cls, p: Parameters, config: SAEConfig) -> tuple[Parameters, dict[str, object]]:
        """SAELens' tensors and its extra config fields."""
        return {name: p[name] for name in TRAINED}, {}

    @classmethod
    def from_saelens(cls, tensors: Parameters) -> Parameters:
        """The inverse of `to_saelens` for tensors."""
        return tensors


class ReLU(Architecture):
    """ReLU with an L1 penalty weighted by the decoder norms (Conerly et al., April 2024).

    loss = mean_n [ ‖x_n - x̂_n‖² + λ Σ_j f_nj ‖W_dec,j‖ ]. Weighting by ‖W_dec,j‖ makes the penalty blind to rescaling
    f against W_dec, so the decoder needs no norm constraint.
    """

    coefficient, saelens = "l1_coefficient", "standard"

    @classmethod
    def encode(cls, p: Parameters, config: SAEConfig, x: Tensor) -> Tensor:
        return torch.relu(preactivations(p, x))

    @classmethod
    def step(cls, p: Parameters, config: SAEConfig, x: Tensor, coefficient: float, dead: Tensor | None) -> Step:
        rows = x.shape[0]
        centred = x - p["b_dec"]
        f = torch.addmm(p["b_enc"], centred, p["W_enc"]).relu_()  # [rows, d_sae]
        error = torch.addmm(p["b_dec"] - x, f, p["W_dec"])  # x̂ - x [rows, d_in]
        norms = p["W_dec"].norm(dim=1)  # [d_sae]
        sums = f.sum(0)
        on = f > 0
        g_out = error * (2 / rows)
        g_W_dec = f.T @ g_out
        g_W_dec += (coefficient / rows * sums / norms.clamp_min(1e-12)).unsqueeze(1) * p["W_dec"]
        g_pre = torch.addmm(norms * (coefficient / rows), g_out, p["W_dec"].T).mul_(on)
        gradients = _gradients(p, centred, g_out, g_W_dec, g_pre)
        return Step(gradients, error.square().sum(), (sums * norms).sum() / rows, _any_row(on))


class TopK(Architecture):
    """The k largest positive pre-activations, unit-norm decoder, AuxK against dead latents (Gao et al. 2024, §2.3, A.2).

    loss = mean_n [ ‖x_n - x̂_n‖² + (1/32) ‖e_n - ê_n‖² · (E‖x - x̄‖² / E‖e - ē‖²) ], with e = x - x̂ detached and ê
    decoded, without bias, from the k_aux = d_in/2 largest pre-activations among dead latents. The published aux term is
    the share of the error's variance that ê misses; the factor puts it in units of x's variance.
    """

    coefficient, saelens = "k", "topk"
    constrain_decoder = True
    aux_coefficient = 1 / 32

    @classmethod
    def encode(cls, p: Parameters, config: SAEConfig, x: Tensor) -> Tensor:
        return _keep_largest(preactivations(p, x), config.k or 0)

    @classmethod
    def select(cls, pre: Tensor, k: int) -> Tensor:
        """Training's f from pre-activations [rows, d_sae]."""
        return _keep_largest(pre, k)

    @classmethod
    def updated_buffers(cls, p: Parameters, f: Tensor) -> Parameters:
        """The buffers after a batch with latents f."""
        return {}

    @classmethod
    def to_saelens(cls, p: Parameters, config: SAEConfig) -> tuple[Parameters, dict[str, object]]:
        return {name: p[name] for name in TRAINED}, {"k": config.k, "rescale_acts_by_decoder_norm": False}

    @classmethod
    def step(cls, p: Parameters, config: SAEConfig, x: Tensor, coefficient: float, dead: Tensor | None) -> Step:
        rows = x.shape[0]
        centred = x - p["b_dec"]
        pre = torch.addmm(p["b_enc"], centred, p["W_enc"])  # [rows, d_sae]
        f = cls.select(pre, config.k or 0)
        error = torch.addmm(p["b_dec"] - x, f, p["W_dec"])  # x̂ - x [rows, d_in]
        on = f > 0
        g_out = error * (2 / rows)
        g_W_dec = f.T @ g_out
        g_pre = (g_out @ p["W_dec"].T).mul_(on)
        if dead is not None and bool(dead.any()):
            cls._add_aux_gradients(p, pre, error, x, dead, g_W_dec, g_pre)
        gradients = _gradients(p, centred, g_out, g_W_dec, g_pre)
        none = torch.zeros((), device=x.device)
        return Step(gradients, error.square().sum(), none, _any_row(on), cls.updated_buffers(p, f))

    @classmethod
    def _add_aux_gradients(
        cls, p: Parameters, pre: Tensor, error: Tensor, x: Tensor, dead: Tensor, g_W_dec: Tensor, g_pre: Tensor
    ) -> None:
        index = dead.nonzero().squeeze(1)
        k_aux = min(max(x.shape[1] // 2, 1), index.numel())
        f_aux = _keep_largest(pre[:, index], k_aux)  # [rows, n_dead]
        miss = f_aux @ p["W_dec"][index] + error  # ê - e, since e = -error
        scale = (x - x.mean(0)).square().sum() / (error - error.mean(0)).square().sum().clamp_min(1e-12)
        g_miss = miss * (2 * cls.aux_coefficient / x.shape[0] * scale)
        g_W_dec.index_add_(0, index, f_aux.T @ g_miss)
        g_pre.index_add_(1, index, (g_miss @ p["W_dec"][index].T).mul_(f_aux > 0))


class BatchTopK(TopK):
    """The k·rows largest positive pre-activations of the whole batch (Bussmann, Leask & Nanda 2024), AuxK as TopK.

    A row may use more latents than another. For inference, where there is no batch, a latent is on above a threshold: the
    running mean over batches (decay 0.99) of the smallest activation kept. Measured L0 therefore differs from k. SAELens
    knows this form as jumprelu.
    """

    saelens = "jumprelu"
    decay = 0.99

    @classmethod
    def encode(cls, p: Parameters, config: SAEConfig, x: Tensor) -> Tensor:
        pre = preactivations(p, x)
        return pre.relu() * (pre > p["threshold"])

    @classmethod
    def buffers(cls) -> Parameters:
        return {"threshold": torch.tensor(-1.0)}  # negative: no batch seen yet

    @classmethod
    def select(cls, pre: Tensor, k: int) -> Tensor:
        flat = pre.flatten()
        values, index = flat.topk(k * pre.shape[0], sorted=False)
        return torch.zeros_like(flat).scatter_(0, index, values.relu_()).view_as(pre)

    @classmethod
    def updated_buffers(cls, p: Parameters, f: Tensor) -> Parameters:
        smallest = torch.where(f > 0, f, torch.inf).min()
        before = p["threshold"]
        mean = torch.where(before < 0, smallest, cls.decay * before + (1 - cls.decay) * smallest)
        return {"threshold": torch.where(smallest.isfinite(), mean, before)}

    @classmethod
    def to_saelens(cls, p: Parameters, config: SAEConfig) -> tuple[Parameters, dict[str, object]]:
        tensors = {name: p[name] for name in TRAINED}
        return tensors | {"threshold": p["threshold"].expand(config.d_sae)}, {}

    @classmethod
    def from_saelens(cls, tensors: Parameters) -> Parameters:
        return tensors | {"threshold": tensors["threshold"][0]}


ARCHITECTURES: dict[str, type[Architecture]] = {"relu": ReLU, "topk": TopK, "batchtopk": BatchTopK}


def _gradients(p: Parameters, centred: Tensor, g_out: Tensor, g_W_dec: Tensor, g_pre: Tensor) -> Parameters:
    """All gradients from those at the output [rows, d_in], W_dec and the pre-activations [rows, d_sae]."""
    g_b_enc = g_pre.sum(0)
    g_b_dec = g_out.sum(0) - p["W_enc"] @ g_b_enc  # b_dec is added to the output and taken from the input
    return {"W_enc": centred.T @ g_pre, "b_enc": g_b_enc, "W_dec": g_W_dec, "b_dec": g_b_dec}


def _any_row(on: Tensor) -> Tensor:
    """on.any(0), at less than half of its time on a CPU."""
    return on.view(torch.uint8).amax(0).bool()


def preactivations(p: Parameters, x: Tensor) -> Tensor:
    """(x - b_dec) W_enc + b_enc, [rows, d_sae]."""
    return torch.addmm(p["b_enc"], x - p["b_dec"], p["W_enc"])


def _keep_largest(pre: Tensor, k: int) -> Tensor:
    """`pre` with all but its k largest positive entries per row set to zero."""
    values, index = pre.topk(k, dim=1, sorted=False)
    return torch.zeros_like(pre).scatter_(1, index, values.relu_())


def initial_parameters(config: SAEConfig, b_dec: Tensor) -> Parameters:
    """Random unit-norm decoder rows, W_enc = W_decᵀ (tied at the start; Gao et al. A.1), b_dec [d_in] as given, b_enc 0.

    Drawn on the CPU from the member's own generator, so a seed means the same SAE on every device.
    """
    generator = torch.Generator().manual_seed(config.seed)
    W_dec = torch.randn(config.d_sae, config.d_in, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    if not ARCHITECTURES[config.architecture].constrain_decoder:
        W_dec *= 0.1  # Anthropic (April 2024): small decoder norms at the start keep L1 from killing latents early
    return {
        "W_enc": (W_dec / W_dec.norm(dim=1, keepdim=True)).T.contiguous(),
        "b_enc": torch.zeros(config.d_sae),
        "W_dec": W_dec,
        "b_dec": b_dec.to(torch.float32).clone(),
        **ARCHITECTURES[config.architecture].buffers(),
    }
