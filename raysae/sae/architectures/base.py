"""What an architecture is: a forward pass for inference, and a training step with hand-derived gradients.

All but Gated share the affine form, with x scaled to mean ‖x‖² = 1 over the training rows while they train:

    pre = (x - b_dec) W_enc + b_enc,   f = σ(pre),   x̂ = f W_dec + b_dec

with W_enc [d_in, d_sae], W_dec [d_sae, d_in] (SAELens' layout). They differ in σ and in the sparsity term. Gradients are
written out because autograd would also form the gradient of the input (12 instead of 10·d_in·d_sae FLOPs per token) and
keep more [batch, d_sae] tensors; tests compare them with autograd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from raysae.sae.latents import Dense, Latents, entries

Parameters = dict[str, Tensor]
"""W_enc, b_enc, W_dec, b_dec (and what else an architecture trains), and its buffers, which no optimizer touches."""

COEFFICIENTS = ("l1_coefficient", "k", "target_l0", "l0_coefficient")
"""Fields of SAEConfig that set an architecture's sparsity; each architecture has one."""

ARCHITECTURES: dict[str, type[Architecture]] = {}
"""By name. A class enters by having one."""


@dataclass(frozen=True)
class SAEConfig:
    """What determines an SAE's function and its training: architecture, shape, sparsity, seed.

    Each architecture is set by one of the sparsity fields. Coefficients are stated for sum-over-d squared error and inputs
    of variance E‖x - μ‖² = 1; at a variance of d_in the same SAE has sqrt(d_in) times the L1 coefficient.
    """

    architecture: str
    d_in: int
    d_sae: int
    k: int | None = None
    l1_coefficient: float | None = None
    target_l0: float | None = None
    l0_coefficient: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: {self.architecture!r} is unknown; known: {', '.join(ARCHITECTURES)}")
        needed = ARCHITECTURES[self.architecture].coefficient
        if getattr(self, needed) is None:
            raise ValueError(f"{needed}: {self.architecture} needs it")
        if self.k is not None and not 0 < self.k <= self.d_sae:
            raise ValueError(f"k: {self.k} must lie in 1..d_sae={self.d_sae}")
        if self.target_l0 is not None and (self.target_l0 <= 0 or self.target_l0 > self.d_sae):
            raise ValueError(f"target_l0: {self.target_l0} must lie in (0, d_sae={self.d_sae}]")

    @property
    def sparsity(self) -> float:
        """The value of the field that sets this architecture's sparsity."""
        return float(getattr(self, ARCHITECTURES[self.architecture].coefficient))


@dataclass(frozen=True)
class Moment:
    """Where in its training a member stands, as far as its loss depends on it."""

    sparsity: float = 1.0
    """Share of the sparsity coefficient (its warm-up)."""
    progress: float = 0.0
    """Share of the training done."""
    dead: Tensor | None = None
    """[d_sae] bool: latents that the loss shall revive, for an architecture that `revives`."""
    dtype: torch.dtype | None = None
    """Of the matrix products, x's own if None; parameters and sums stay as they are."""
    latent_terms: Callable[[Tensor], Tensor] | None = None
    """Gradient [rows, d_sae] of further loss terms at the latents f [rows, d_sae]."""

    @property
    def dead_index(self) -> Tensor:
        """The indices of `dead` [n]; none where it is None."""
        return (torch.zeros(0) if self.dead is None else self.dead).nonzero().squeeze(1)

    def latents(self, f: Tensor, on: Tensor | None = None) -> Latents:
        """f [rows, d_sae] as this step computes with it: dense where a further term needs all of it."""
        return Dense(f) if self.latent_terms is not None else entries(f, on)

    def gradient(self, latents: Latents, g_out: Tensor, W_dec: Tensor, bias: Tensor | None = None) -> Latents:
        """dL/df at the latents' places: through the decoder, plus `bias` [d_sae], plus the further terms."""
        g = latents.gradient(g_out, W_dec, bias)
        if self.latent_terms is not None:
            g.values.add_(self.latent_terms(latents.values))
        return g


class Step(NamedTuple):
    """One training step's outcome."""

    gradients: Parameters
    terms: dict[str, Tensor]  # [] the loss by term, each a mean over the batch with its coefficient, in scaled units
    fired: Tensor  # [d_sae] bool
    buffers: Parameters = {}  # noqa: RUF012 new values of the architecture's buffers


class Architecture(ABC):
    """What an architecture is to the rest of the package. `p` are its parameters, in whatever units x has."""

    name: ClassVar[str]
    coefficient: ClassVar[str]
    """Field of SAEConfig that sets its sparsity: k, l1_coefficient, target_l0 or l0_coefficient."""
    saelens: ClassVar[str]
    """SAELens' name of its inference form."""
    trained: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "W_dec", "b_dec")
    constrain_decoder: ClassVar[bool] = False
    """Whether decoder rows are kept at unit norm."""
    rates: ClassVar[Mapping[str, float]] = MappingProxyType({})
    """Learning rates of parameters as shares of the member's, where not 1."""
    revives: ClassVar[bool] = False
    """Whether its loss revives dead latents by itself (its term "aux")."""
    encoder_norm: ClassVar[float] = 0.3
    """Of the encoder's columns at the start. Adam's steps are of one size, so a smaller encoder turns faster: TopK's FVU
    is 0.049 with 0.3, 0.050 with 0.6, 0.053 with 1 (stories260K, 500k tokens)."""

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            ARCHITECTURES[cls.name] = cls

    @classmethod
    @abstractmethod
    def encode(cls, p: Parameters, config: SAEConfig, x: Tensor) -> Tensor:
        """f [rows, d_sae] of x [rows, d_in], by the inference rule."""

    @classmethod
    def encode_latents(cls, p: Parameters, config: SAEConfig, x: Tensor) -> Latents:
        """As `encode`, sparse where that pays."""
        return entries(cls.encode(p, config, x))

    @classmethod
    @abstractmethod
    def step(cls, p: Parameters, config: SAEConfig, x: Tensor, moment: Moment) -> Step:
        """Loss and gradients on a batch x [rows, d_in]."""

    @classmethod
    def initial(cls, config: SAEConfig, p: Parameters) -> Parameters:
        """The start, from the common one (`initial_parameters`): what else it trains, and its buffers."""
        return p

    @classmethod
    def to_saelens(cls, p: Parameters, config: SAEConfig) -> tuple[Parameters, dict[str, object]]:
        """SAELens' tensors and its extra config fields."""
        return {name: p[name] for name in cls.trained}, {}

    @classmethod
    def from_saelens(cls, tensors: Parameters) -> Parameters:
        """The inverse of `to_saelens` for tensors."""
        return tensors


def preactivations(p: Parameters, x: Tensor) -> Tensor:
    """(x - b_dec) W_enc + b_enc, [rows, d_sae]."""
    return torch.addmm(p["b_enc"], x - p["b_dec"], p["W_enc"])


def product(dtype: torch.dtype | None, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """bias + a b in `dtype`."""
    dtype = dtype or bias.dtype
    return torch.addmm(bias.to(dtype), a.to(dtype), b.to(dtype))


def affine_gradients(p: Parameters, centred: Tensor, g_out: Tensor, g_W_dec: Tensor, g_pre: Latents) -> Parameters:
    """All gradients of the affine form from those at the output [rows, d_in], W_dec and the pre-activations."""
    g_b_enc = g_pre.sum()
    return {
        "W_enc": g_pre.columns(centred),
        "b_enc": g_b_enc,
        "W_dec": g_W_dec,
        "b_dec": g_out.sum(0) - p["W_enc"] @ g_b_enc,  # b_dec is added to the output and taken from the input
    }


def add_gradients_at(index: Tensor, gradients: Parameters, p: Parameters, centred: Tensor, g_pre: Latents) -> Tensor:
    """Add those of W_enc, b_enc and b_dec from `g_pre` [rows, n] at the pre-activations of latents `index` [n].

    Returns the sum of `g_pre` over rows [n].
    """
    sums = g_pre.sum()
    gradients["W_enc"].index_add_(1, index, g_pre.columns(centred))
    gradients["b_enc"].index_add_(0, index, sums)
    gradients["b_dec"] -= p["W_enc"][:, index] @ sums
    return sums


def reconstruct(p: Parameters, latents: Latents, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean_n ‖x_n - x̂_n‖², x̂ - x [rows, d_in], the first's gradient at x̂)."""
    error = latents.decode(p["W_dec"], p["b_dec"]).sub_(x)
    return error.square().sum() / x.shape[0], error, error * (2 / x.shape[0])


def initial_parameters(config: SAEConfig, b_dec: Tensor, rows: Tensor | None = None) -> Parameters:
    """Unit-norm decoder rows, W_enc ∝ W_decᵀ (tied at the start; Gao et al. A.1), b_dec [d_in] as given, b_enc 0.

    Decoder rows point at random, or, given `rows` [n, d_in], from b_dec to rows drawn from these. Drawn on the CPU from the
    member's own generator, so a seed means the same SAE on every device.
    """
    architecture = ARCHITECTURES[config.architecture]
    generator = torch.Generator().manual_seed(config.seed)
    W_dec = torch.randn(config.d_sae, config.d_in, generator=generator)
    if rows is not None:
        W_dec = rows[torch.randint(len(rows), (config.d_sae,), generator=generator)].to(W_dec) - b_dec.to(W_dec)
    W_dec /= W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    start = {
        "W_enc": (architecture.encoder_norm * W_dec.T).contiguous(),
        "b_enc": torch.zeros(config.d_sae),
        "W_dec": W_dec if architecture.constrain_decoder else 0.1 * W_dec,  # small norms keep L1 from killing latents
        "b_dec": b_dec.to(torch.float32).clone(),  # early (Anthropic, April 2024)
    }
    return architecture.initial(config, start)
