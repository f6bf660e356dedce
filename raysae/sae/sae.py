"""A trained SAE as a function: encode, decode, and the fold that lets it read raw activations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raysae.sae.architectures import ARCHITECTURES, Parameters, SAEConfig
from raysae.sae.latents import Latents


@dataclass(frozen=True)
class SAE:
    """Config and parameters (W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec), in units of raw activations.

    `metadata` travels with it on disk: model, site, context size, training config, provenance.
    """

    config: SAEConfig
    parameters: Parameters
    metadata: dict[str, Any] = field(default_factory=dict)

    def encode(self, x: Tensor) -> Tensor:
        """Latents f [rows, d_sae] of activations x [rows, d_in]."""
        return ARCHITECTURES[self.config.architecture].encode(self.parameters, self.config, x)

    def decode(self, f: Tensor) -> Tensor:
        """x̂ [rows, d_in] of latents f [rows, d_sae]."""
        return torch.addmm(self.parameters["b_dec"], f, self.parameters["W_dec"])

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Latents]:
        """x̂ [rows, d_in] of float32 x, and the latents, both computed as sparse where that pays."""
        f = ARCHITECTURES[self.config.architecture].encode_latents(self.parameters, self.config, x)
        return f.decode(self.parameters["W_dec"], self.parameters["b_dec"]), f

    def __call__(self, x: Tensor) -> Tensor:
        """x̂ [rows, d_in], in the dtype of x."""
        return self.reconstruct(x.to(torch.float32))[0].to(x.dtype)

    def to(self, device: torch.device | str) -> SAE:
        return SAE(self.config, {name: p.to(device) for name, p in self.parameters.items()}, self.metadata)


def fold(parameters: Parameters, scale: float) -> Parameters:
    """Parameters that do on raw x what `parameters` do on scale·x, latents unchanged: W_enc·s, W_dec/s, b_dec/s.

    The pre-activation ((s x) - b_dec) W_enc + b_enc = (x - b_dec/s)(s W_enc) + b_enc keeps b_enc as it is.
    """
    return {
        **{name: p.clone() for name, p in parameters.items()},  # b_enc and thresholds live in pre-activations
        "W_enc": parameters["W_enc"] * scale,
        "W_dec": parameters["W_dec"] / scale,
        "b_dec": parameters["b_dec"] / scale,
    }
