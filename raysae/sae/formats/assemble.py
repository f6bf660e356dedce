"""From a file's tensors and facts to an SAE: names, shapes, units, and what the file leaves unsaid.

Every format passes through SAELens' names: W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec, threshold [d_sae], and
b_gate, b_mag, r_mag for Gated.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from raysae.errors import UserError
from raysae.sae.architectures import ARCHITECTURES, Parameters, SAEConfig
from raysae.sae.formats.files import plain
from raysae.sae.sae import SAE

TRAINING = [field.name for field in fields(SAEConfig) if field.name not in ("architecture", "d_in", "d_sae")]
"""Fields of SAEConfig that shapes do not give: k, coefficients, seed."""


class Activation(NamedTuple):
    """A nonlinearity as a user or a file states it."""

    architecture: str
    k: int | None = None

    @classmethod
    def parse(cls, text: str) -> Activation:
        """`relu` or `topk:K`."""
        name, _, k = text.partition(":")
        if name == "topk" and k.isdigit() and int(k) > 0:
            return cls("topk", int(k))
        if text != "relu":
            raise UserError(f"activation: {text!r} must be relu or topk:K, with K latents per row")
        return cls("relu")

    def __str__(self) -> str:
        return self.architecture if self.k is None else f"{self.architecture}:{self.k}"


def settled(where: Path, file: Activation | None, user: Activation | None) -> Activation:
    """The nonlinearity, if it is stated once or twice the same."""
    if file and user and file != user:
        raise UserError(f"activation: {where} says {file}, not {user}")
    stated = file or user
    if stated is None:
        raise UserError(f"activation: {where} does not say its nonlinearity; state it: --activation relu or topk:K")
    return stated


def sae_of(
    where: Path,
    architecture: str,
    tensors: Parameters,
    facts: Mapping[str, Any],
    metadata: Mapping[str, Any],
    shape: tuple[int, int] | None = None,
) -> SAE:
    """The SAE of `tensors` (SAELens' names), checked against `shape` = (d_in, d_sae) or else W_enc's.

    `facts` are fields of SAEConfig as far as the file knows them; an unknown training coefficient becomes NaN. Raises
    UserError for a missing k, and for tensors that are not the architecture's.
    """
    d_in, d_sae = shape or (tensors["W_enc"].shape[0], tensors["W_enc"].shape[1])
    config = _config(where, architecture, d_in, d_sae, {name: facts.get(name) for name in TRAINING})
    tensors = {name: tensor.detach().to(torch.float32) for name, tensor in tensors.items()}
    expected = _shapes(config)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise UserError(f"sae: {where} holds {found}, its config needs {expected}")
    parameters = ARCHITECTURES[architecture].from_saelens(tensors)
    if (one := parameters.get("threshold")) is not None and not bool((tensors["threshold"] == one).all()):
        raise UserError(f"sae: {where} has a threshold per latent, so it is not the {architecture} that it says it is")
    return SAE(config, {name: tensor.contiguous() for name, tensor in parameters.items()}, dict(metadata))


def _config(where: Path, architecture: str, d_in: int, d_sae: int, facts: dict[str, Any]) -> SAEConfig:
    needed = ARCHITECTURES[architecture].coefficient
    if needed == "k" and type(facts["k"]) is not int:
        raise UserError(f"sae: {where} is a {architecture} SAE whose config has no k, a number of latents")
    if facts[needed] is None:
        facts[needed] = math.nan  # how it was trained is unknown, and changes nothing that it computes
    try:
        return SAEConfig(architecture, d_in, d_sae, **{name: fact for name, fact in facts.items() if fact is not None})
    except (ValueError, TypeError) as error:
        raise UserError(f"sae: {where}: {error}") from None


def _shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of an architecture's tensors in SAELens' names."""
    architecture, d_in, d_sae = ARCHITECTURES[config.architecture], config.d_in, config.d_sae
    of = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    start = architecture.initial(config, {name: torch.empty(shape, device="meta") for name, shape in of.items()})
    return {name: tuple(tensor.shape) for name, tensor in architecture.to_saelens(start, config)[0].items()}


def block_of(sae: SAE) -> dict[str, Any]:
    """What a foreign format has no field for, as the `raysae` block that its loader ignores."""
    return {"config": plain(sae.config.__dict__), "metadata": plain(sae.metadata)}


def trusted_block(cfg: Mapping[str, Any], architectures: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, metadata) of a file's `raysae` block; both empty unless its architecture is one that the file may be."""
    block = cfg.get("raysae")
    config = block.get("config") if isinstance(block, dict) else None
    if not isinstance(config, dict) or config.get("architecture") not in architectures:
        return {}, {}
    metadata = block.get("metadata") if isinstance(block, dict) else None
    return config, metadata if isinstance(metadata, dict) else {}


# ----------------------------------------------------------------------------------------------------------------------
# Layouts of foreign tensors


def renamed(
    where: Path, tensors: Mapping[str, Any], names: Mapping[str, str], idle: Collection[str] = ()
) -> Parameters:
    """Tensors under SAELens' names in float32, by `names` = {theirs: ours}; `*.weight` are nn.Linear's, [out, in].

    Raises UserError for a missing tensor, for one whose shape does not fit W_enc's (a threshold may be one number), and for
    a further one that is not `idle`: it would change what is computed.
    """
    missing = [name for name in names if not isinstance(tensors.get(name), torch.Tensor)]
    if missing:
        raise UserError(f"sae: {where} has no tensor {', '.join(missing)}")
    further = [
        name for name, value in tensors.items() if isinstance(value, torch.Tensor) and name not in (*names, *idle)
    ]
    if further:
        raise UserError(f"sae: {where} has a tensor {', '.join(further)}, for which there is no place")
    if any(tensors[name].ndim != 2 for name, ours in names.items() if ours.startswith("W_")):
        raise UserError(f"sae: {where} has weights that are not matrices")
    found = {ours: tensors[name].T if _is_linear(name) else tensors[name] for name, ours in names.items()}
    d_in, d_sae = found["W_enc"].shape
    wanted = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, ours in names.items():
        shape = tuple(found[ours].shape)
        if shape != wanted.get(ours, (d_sae,)) and not (ours == "threshold" and shape == ()):
            raise UserError(
                f"sae: {where} has {name} of shape {list(tensors[name].shape)} at {d_in} inputs, {d_sae} latents"
            )
    return {name: tensor.detach().to(torch.float32) for name, tensor in found.items()}


def named_as(parameters: Parameters, names: Mapping[str, str]) -> Parameters:
    """The inverse of `renamed`."""
    theirs = {name: parameters[ours].T if _is_linear(name) else parameters[ours] for name, ours in names.items()}
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in theirs.items()}


def _is_linear(name: str) -> bool:
    return name.endswith(".weight")


def subtract_b_dec(tensors: Parameters, sign: int = 1) -> Parameters:
    """From x W_enc + b_enc to (x - b_dec) W_enc + b_enc, the same function: b_enc + b_dec W_enc. sign -1: back."""
    shift = tensors["b_dec"].double() @ tensors["W_enc"].double()
    return tensors | {"b_enc": (tensors["b_enc"] + sign * shift).to(torch.float32)}


def unit_decoder(tensors: Parameters) -> Parameters:
    """Decoder rows of norm 1 with the norms moved into the encoder: x̂ and L0 as before, latents f·‖W_dec‖ (for ReLU).

    A latent whose decoder row is zero gets a zero encoder and any unit row: it adds nothing either way.
    """
    norm = tensors["W_dec"].norm(dim=1)
    if torch.allclose(norm, torch.ones_like(norm)):
        return tensors
    W_dec = tensors["W_dec"] / torch.where(norm > 0, norm, 1).unsqueeze(1)
    W_dec[norm == 0, 0] = 1
    return tensors | {"W_enc": tensors["W_enc"] * norm, "b_enc": tensors["b_enc"] * norm, "W_dec": W_dec}
