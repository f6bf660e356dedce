"""From a file's tensors and facts to an SAE: names, shapes, units, and what the file leaves unsaid.

Every format passes through SAELens' names: W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec, threshold [d_sae], and
b_gate, b_mag, r_mag for Gated.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from raysae.errors import UserError
from raysae.files import plain
from raysae.sae.architectures import ARCHITECTURES, Parameters, SAEConfig
from raysae.sae.formats.files import shown
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


class Stated(NamedTuple):
    """What a user states of a one-file checkpoint that does not say it."""

    activation: Activation | None = None
    apply_b_dec_to_input: bool | None = None
    """Whether the encoder reads x - b_dec, or x."""
    mean: str | None = None
    """Entry of the file that is subtracted from x first: one number or d_in of them."""
    std: str | None = None
    """Entry that x, less the mean, is divided by."""
    scale: str | None = None
    """Entry that x, less the mean, is multiplied by."""


def settled(where: Path, said: Sequence[Activation], user: Activation | None) -> Activation:
    """The nonlinearity, from what the file says of it, which may be nothing or more than one, and from the user."""
    if user and said and user not in said:
        raise UserError(f"activation: {where} says {' and '.join(map(str, said))}, not {user}")
    stated = user or (said[0] if len(said) == 1 else None)
    if stated is None and said:
        raise UserError(f"activation: {where} says {' and '.join(map(str, said))}; state which: --activation {said[0]}")
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
    UserError for a missing k, for tensors that are not the architecture's or no weights, and for NaN.
    """
    W_enc = tensors.get("W_enc")
    if not isinstance(W_enc, torch.Tensor) or W_enc.ndim != 2 or 0 in W_enc.shape:
        found = f"W_enc of shape {list(W_enc.shape)}" if isinstance(W_enc, torch.Tensor) else "no W_enc"
        raise UserError(f"W_enc: {where} has {found}; its shape must be [d_in, d_sae]")
    d_in, d_sae = W_enc.shape
    for name, said, is_so in zip(("d_in", "d_sae"), shape or W_enc.shape, W_enc.shape, strict=True):
        if said != is_so:
            raise UserError(f"{name}: {where} says {said}, but its W_enc has shape {list(W_enc.shape)}")
    config = _config(where, architecture, d_in, d_sae, {name: facts.get(name) for name in TRAINING})
    expected = _shapes(config)
    found_shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found_shapes != expected:
        raise UserError(f"sae: {where} holds {found_shapes}, its config needs {expected}")
    tensors = {name: weight(where, name, tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if odd := int((~tensor.isfinite()).sum()):
            raise UserError(
                f"{name}: {odd} of {tensor.numel()} numbers of {where} are NaN or infinite: it is no function"
            )
    parameters = ARCHITECTURES[architecture].from_saelens(tensors)
    if (one := parameters.get("threshold")) is not None and not bool((tensors["threshold"] == one).all()):
        raise UserError(f"sae: {where} has a threshold per latent, so it is not the {architecture} that it says it is")
    return SAE(config, {name: tensor.contiguous() for name, tensor in parameters.items()}, dict(metadata))


def weight(where: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32, once it is what a weight can be."""
    return _dense(where, name, tensor).detach().to(torch.float32)


def _dense(where: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, if it is dense, of floating point, and every element stands in the file."""
    kind = str(tensor.dtype if tensor.layout is torch.strided else tensor.layout).removeprefix("torch.")
    if tensor.device.type == "meta":
        kind = "meta, a shape without numbers"
    elif tensor.layout is torch.strided and tensor.is_floating_point():
        stored = tensor.untyped_storage().nbytes() // tensor.element_size()
        if tensor.numel() <= stored:
            return tensor
        kind = f"{list(tensor.shape)} over {stored} stored numbers"
    raise UserError(f"{name}: {where} holds it as {kind}; weights are dense tensors of float32, bfloat16 or float16")


def dense_integers(tensor: torch.Tensor) -> bool:
    """Whether it is a number or a list of them that stand in the file, such as k or group sizes."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or tensor.ndim > 1:
        return False
    stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.dtype in (torch.int32, torch.int64) and tensor.numel() <= stored


def number_of_latents(where: Path, name: str, value: Any) -> int | None:
    """An integer, or a tensor of one, as a file states k; None where it states none."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and dense_integers(value):
        value = value.item()
    if value is not None and type(value) is not int:
        raise UserError(f"{name}: {where} says {shown(value)}, which is no number of latents")
    return value


def _config(where: Path, architecture: str, d_in: int, d_sae: int, facts: dict[str, Any]) -> SAEConfig:
    needed = ARCHITECTURES[architecture].coefficient
    if needed == "k" and type(facts["k"]) is not int:
        raise UserError(f"sae: {where} is a {architecture} SAE whose config has no k, a number of latents")
    for name, fact in facts.items():
        if fact is not None and type(fact) not in ((int,) if name in ("k", "seed") else (int, float)):
            raise UserError(f"{name}: {where} says {shown(fact)}, which is no number of its kind")
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
    if not isinstance(config, dict) or config.get("architecture") not in list(architectures):
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
    dense = {name: _dense(where, name, tensors[name]) for name in names}
    found = {ours: dense[name].T if _is_linear(name) else dense[name] for name, ours in names.items()}
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


def reading_raw(where: Path, entries: Mapping[str, Any], stated: Stated, tensors: Parameters) -> Parameters:
    """Parameters that read x, from `tensors` that read (x - mean) · scale / std, by the entries that the user named.

    With s = scale / std, per dimension: (s(x - m) - b_dec) W_enc = (x - m - b_dec/s) diag(s) W_enc, and x̂ is mapped back.
    """
    mean, std, scale = (_entry(where, entries, name, getattr(stated, name)) for name in ("mean", "std", "scale"))
    if mean is None and std is None and scale is None:
        return tensors
    d_in = tensors["W_enc"].shape[0]
    for name, value in (("mean", mean), ("std", std), ("scale", scale)):
        if value is not None and value.numel() not in (1, d_in):
            raise UserError(f"{name}: {getattr(stated, name)} of {where} has {value.numel()} numbers; x has {d_in}")
    one = torch.ones(d_in)
    s = (one if scale is None else scale) / (one if std is None else std)
    if not bool((s.isfinite() & (s > 0)).all()):
        raise UserError(f"std: {where} scales x by what is not above zero and finite")
    m = torch.zeros(d_in) if mean is None else mean
    return tensors | {
        "W_enc": tensors["W_enc"] * s.expand(d_in)[:, None],
        "W_dec": tensors["W_dec"] / s,
        "b_dec": tensors["b_dec"] / s + m,
    }


def _entry(where: Path, entries: Mapping[str, Any], name: str, key: str | None) -> torch.Tensor | None:
    if key is None:
        return None
    value = entries.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = torch.tensor(float(value))
    if not isinstance(value, torch.Tensor):
        raise UserError(
            f"{name}: {where} has no {key!r} of numbers; it has {', '.join(map(str, entries)) or 'nothing'}"
        )
    return weight(where, key, value).flatten()
