"""SAEs on disk, in SAELens' own layout: `cfg.json` + `sae_weights.safetensors`, with a `raysae` block in the config.

The traps are SAELens 6's (each was a bug somewhere): normalisation must be folded and said to be "none"; `dtype`, `k` and
`metadata.sae_lens_version` must be there, or the loader fails, takes k=100, or drops the metadata without a word. Read
back only by data: JSON and safetensors, never pickle.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raysae.artifacts import write_json
from raysae.errors import UserError
from raysae.sae.architectures import ARCHITECTURES, SAEConfig, initial_parameters
from raysae.sae.sae import SAE

SAE_LENS_VERSION = "6.54.12"  # the layout that this writes; SAELens reads anything >= 6.0.0 as such


def save(sae: SAE, directory: Path, raysae: dict[str, Any] | None = None) -> None:
    """Write `sae` to `directory`, whole or not at all. `sae.metadata` should hold model_name and hook_name."""
    config = sae.config
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    cfg: dict[str, Any] = {
        "architecture": ARCHITECTURES[config.architecture].saelens,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAE_LENS_VERSION, **sae.metadata},
        "raysae": {"config": config.__dict__, **(raysae or {})},
    }
    tensors, fields = ARCHITECTURES[config.architecture].to_saelens(sae.parameters, config)
    cfg |= fields
    whole = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    save_file(whole, temporary / "sae_weights.safetensors")
    write_json(temporary / "cfg.json", cfg)
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)


def load(directory: Path) -> SAE:
    """The SAE in `directory`. Refuses pickles, and a config that does not determine the nonlinearity."""
    file = directory / "sae_weights.safetensors"
    if not file.is_file():
        pickles = [p.name for p in directory.glob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")]
        found = f"; {pickles[0]} is a pickle, which is never loaded: convert it to safetensors" if pickles else ""
        raise UserError(f"sae: {directory} holds no sae_weights.safetensors{found}")
    if not (directory / "cfg.json").is_file():
        raise UserError(f"sae: {directory} holds no cfg.json, without which its weights are no function")
    cfg = json.loads((directory / "cfg.json").read_text())
    ours = cfg.get("raysae", {}).get("config", {})
    architecture = _architecture(directory, cfg.get("architecture"), ours)
    if ARCHITECTURES[architecture].saelens == "topk" and "k" not in cfg:
        raise UserError(f"sae: {directory} is a topk SAE whose cfg.json has no k")
    if cfg.get("normalize_activations", "none") != "none" or not cfg.get("apply_b_dec_to_input", True):
        raise UserError(f"sae: {directory} has an unfolded normalisation or no b_dec on its input; fold it first")
    if cfg.get("rescale_acts_by_decoder_norm", False):
        raise UserError(
            f"sae: {directory} has rescale_acts_by_decoder_norm; fold W_dec's norms first (fold_W_dec_norm)"
        )
    coefficient = ARCHITECTURES[architecture].coefficient
    config = SAEConfig(
        architecture=architecture,
        d_in=cfg["d_in"],
        d_sae=cfg["d_sae"],
        k=cfg.get("k", ours.get("k")) if coefficient == "k" else None,
        l1_coefficient=ours.get("l1_coefficient", 0.0) if coefficient == "l1_coefficient" else None,
        seed=ours.get("seed", 0),
    )
    tensors = {name: tensor.to(torch.float32) for name, tensor in load_tensors(file).items()}
    start = initial_parameters(config, torch.zeros(config.d_in))
    expected = {n: tuple(t.shape) for n, t in ARCHITECTURES[architecture].to_saelens(start, config)[0].items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        raise UserError(f"sae: {file} holds {shapes}, its cfg.json needs {expected}")
    return SAE(config, ARCHITECTURES[architecture].from_saelens(tensors), cfg.get("metadata", {}))


def _architecture(directory: Path, theirs: str | None, ours: dict[str, Any]) -> str:
    """Our name of a file's architecture: what our own block says, if SAELens' name agrees, else the one of that name."""
    named = {name: a.saelens for name, a in ARCHITECTURES.items()}
    if "architecture" in ours and named.get(ours["architecture"]) == theirs:
        return ours["architecture"]
    if theirs in ("standard", "topk"):
        return next(name for name, saelens in named.items() if saelens == theirs)
    raise UserError(
        f"sae: {directory} has architecture {theirs!r}; known: standard, topk, and what raysae wrote itself"
    )


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, or one clear line where it is something else, such as a pickle."""
    try:
        return load_file(file)
    except SafetensorError:
        raise UserError(f"{file.name}: {file} is not a safetensors file; pickles are never loaded") from None
