"""SAELens 6, raysae's own format: `cfg.json` + `sae_weights.safetensors`, with a `raysae` block in the config.

The traps are SAELens' (each was a bug somewhere): normalisation must be folded and said to be "none"; `dtype`, `k` and
`metadata.sae_lens_version` must be there, or the loader fails, takes k=100, or drops the metadata without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from raysae.errors import UserError
from raysae.files import whole_folder, write_json
from raysae.sae.architectures import ARCHITECTURES, Parameters
from raysae.sae.formats.assemble import sae_of, trusted_block, weight
from raysae.sae.formats.files import load_json, load_tensors, shown
from raysae.sae.sae import SAE

SAE_LENS_VERSION = "6.54.12"  # the layout that this writes; SAELens reads anything >= 6.0.0 as such
WEIGHTS = "sae_weights.safetensors"
FOREIGN = {"standard": "relu", "topk": "topk", "abstopk": "abstopk", "jumprelu": "jumprelu", "gated": "gated"}
"""What a file is read as that raysae did not write: SAELens' name, ours."""


def save(sae: SAE, directory: Path, raysae: dict[str, Any] | None = None) -> None:
    """Write `sae` to `directory`, whole or not at all. `sae.metadata` should hold model_name and hook_name."""
    config, architecture = sae.config, ARCHITECTURES[sae.config.architecture]
    tensors, fields = architecture.to_saelens(sae.parameters, config)
    cfg: dict[str, Any] = {
        "architecture": architecture.saelens,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**sae.metadata, "sae_lens_version": SAE_LENS_VERSION},
        "raysae": {"config": config.__dict__, **(raysae or {})},
        **fields,
    }
    with whole_folder(directory) as temporary:
        whole = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary / WEIGHTS)
        write_json(temporary / "cfg.json", cfg)


def load(directory: Path) -> SAE:
    """The SAE in `directory`. Refuses pickles, and a config that does not determine the nonlinearity."""
    if not (directory / WEIGHTS).is_file():
        pickles = [p.name for p in sorted(directory.glob("*")) if p.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")]
        found = f"; {pickles[0]} is a pickle, which is never loaded: convert it to safetensors" if pickles else ""
        raise UserError(f"sae: {directory} holds no {WEIGHTS}{found}")
    if not (directory / "cfg.json").is_file():
        raise UserError(f"sae: {directory} holds no cfg.json, without which its weights are no function")
    cfg = load_json(directory / "cfg.json")
    theirs = cfg.get("architecture")
    ours, _ = trusted_block(cfg, {name for name, a in ARCHITECTURES.items() if a.saelens == theirs})
    if not ours and theirs not in list(FOREIGN):
        known = ", ".join(FOREIGN)
        raise UserError(
            f"sae: {directory} has architecture {shown(theirs)}; known: {known}, and what raysae wrote itself"
        )
    _refuse_what_is_not_folded(directory, cfg)
    return sae_of(
        directory,
        ours["architecture"] if ours else FOREIGN[str(theirs)],
        _without_idle_scale(directory, load_tensors(directory / WEIGHTS)),
        {**ours, "k": cfg.get("k", None if theirs in ("topk", "abstopk") else ours.get("k"))},
        _metadata(cfg),
        (_size(directory, cfg, "d_in"), _size(directory, cfg, "d_sae")),
    )


def _refuse_what_is_not_folded(directory: Path, cfg: dict[str, Any]) -> None:
    if cfg.get("normalize_activations") not in (None, False, "none") or not cfg.get("apply_b_dec_to_input", True):
        raise UserError(f"sae: {directory} has an unfolded normalisation or no b_dec on its input; fold it first")
    if cfg.get("rescale_acts_by_decoder_norm", False):
        raise UserError(
            f"sae: {directory} has rescale_acts_by_decoder_norm; fold W_dec's norms first (fold_W_dec_norm)"
        )
    before_6 = cfg.get("activation_fn", cfg.get("activation_fn_str"))  # where `architecture` was not the whole truth
    if before_6 not in (None, "relu", "topk" if cfg["architecture"] == "topk" else None):
        said = f"activation_fn {shown(before_6)} beside architecture {cfg['architecture']!r}"
        raise UserError(f"sae: {directory} has {said}")


def _without_idle_scale(where: Path, tensors: Parameters) -> Parameters:
    """Without the `scaling_factor` of ones that SAELens wrote for a while, and drops too."""
    scale = tensors.get("scaling_factor")
    idle = scale is not None and bool((weight(where, "scaling_factor", scale) == 1).all())
    return {name: tensor for name, tensor in tensors.items() if not (idle and name == "scaling_factor")}


def _metadata(cfg: dict[str, Any]) -> dict[str, Any]:
    """The metadata; before SAELens 6 it lay in the config itself."""
    if isinstance(cfg.get("metadata"), dict):
        return cfg["metadata"]
    return {key: cfg[key] for key in ("model_name", "hook_name", "context_size", "prepend_bos") if key in cfg}


def _size(directory: Path, cfg: dict[str, Any], name: str) -> int:
    if type(cfg.get(name)) is not int or cfg[name] < 1:
        raise UserError(f"{name}: cfg.json of {directory} says {shown(cfg.get(name))}, which is no size")
    return cfg[name]
