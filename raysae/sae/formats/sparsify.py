"""EleutherAI's sparsify (1.3): `cfg.json` + `sae.safetensors`. It knows TopK alone, so TopK alone is written.

Encode: topk(relu((x - b_dec) encoder.weightᵀ + encoder.bias)). (sparsify 1.3.3, sparse_coder.py; SAELens 6.54's loader of
this format transposes W_dec and fails.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from raysae.errors import UserError
from raysae.files import whole_folder, write_json
from raysae.sae.architectures import ARCHITECTURES
from raysae.sae.formats.assemble import block_of, named_as, renamed, sae_of, trusted_block
from raysae.sae.formats.files import load_json, load_tensors, shown
from raysae.sae.sae import SAE

WEIGHTS = "sae.safetensors"
NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
TOPK = frozenset(name for name, architecture in ARCHITECTURES.items() if architecture.saelens == "topk")


def write(sae: SAE, directory: Path) -> None:
    """Write a TopK SAE; any other is refused."""
    config = sae.config
    if config.architecture not in TOPK:
        raise UserError(f"to: sparsify has no {config.architecture}, only topk; saelens holds every architecture")
    cfg: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": max(1, config.d_sae // config.d_in),  # num_latents decides
        # asks their trainer to renormalise W_dec, which a folded SAE does not survive; nothing at inference
        "normalize_decoder": False,
        "num_latents": config.d_sae,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config.d_in,
        "raysae": block_of(sae),
    }
    tensors, _ = ARCHITECTURES[config.architecture].to_saelens(sae.parameters, config)
    with whole_folder(directory) as temporary:
        save_file(named_as(tensors, NAMES), temporary / WEIGHTS)
        write_json(temporary / "cfg.json", cfg)


def read(directory: Path) -> SAE:
    """The SAE in `directory`. Transcoders, skip connections and activations other than topk are refused."""
    for name in (WEIGHTS, "cfg.json"):
        if not (directory / name).is_file():
            raise UserError(f"sae: {directory} holds no {name}")
    cfg = load_json(directory / "cfg.json")
    # `activation` came in 2025; before, there was topk alone, `signed` (largest magnitudes, sign kept) or not
    if cfg.get("activation", "topk") != "topk":
        raise UserError(f"sae: {directory} has activation {shown(cfg['activation'])}; only topk is read")
    for name in ("transcode", "skip_connection", "embed_skip", "gram_lookup"):
        if cfg.get(name):
            raise UserError(f"sae: {directory} has {name}, which is no SAE")
    block, metadata = trusted_block(cfg, TOPK)
    tensors = renamed(directory, load_tensors(directory / WEIGHTS), NAMES)
    facts = {**block, "k": cfg.get("k")}  # theirs takes 32 where it is missing
    architecture = "abstopk" if cfg.get("signed") else block.get("architecture", "topk")
    return sae_of(directory, architecture, tensors, facts, metadata)
