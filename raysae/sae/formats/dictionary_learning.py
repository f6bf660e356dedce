"""saprmarks/dictionary_learning (0.1): `ae.pt`, a state dict, + `config.json`, whose trainer.dict_class names the rule.

What its source says (dictionary.py, trainers/, training.py, utils.py):
- AutoEncoder subtracts `bias` before the encoder and adds it after the decoder; `load_dictionary` normalises its decoder,
  moving the norms into the encoder. Written with the norms moved, it is loaded as it is.
- JumpReluAutoEncoder does not subtract b_dec (`apply_b_dec_to_input` is False and is not in the state dict).
- AutoEncoderTopK encodes by k and ignores its threshold; BatchTopKSAE and MatryoshkaBatchTopKSAE encode by one threshold.
- AutoEncoderNew has a decoder bias and subtracts nothing.
- `norm_factor` needs no attention: before saving, `scale_biases(norm_factor)` multiplies every bias and threshold, so the
  weights read raw activations. (It is not in config.json: that is written before, and `trainer.config` is a fresh
  dictionary at each call, so `trainer.config["norm_factor"] = ...` is lost.)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from raysae.errors import UserError
from raysae.files import whole_folder, write_json
from raysae.sae.architectures import ARCHITECTURES, Parameters, SAEConfig
from raysae.sae.architectures.topk import Matryoshka
from raysae.sae.formats.assemble import (
    block_of,
    dense_integers,
    named_as,
    number_of_latents,
    renamed,
    sae_of,
    subtract_b_dec,
    trusted_block,
    unit_decoder,
)
from raysae.sae.formats.files import load_json, load_pt, shown
from raysae.sae.sae import SAE

WEIGHTS = "ae.pt"
LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
DIRECT = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
GATED = {"decoder_bias": "b_dec", "encoder.weight": "W_enc", "decoder.weight": "W_dec", "r_mag": "r_mag",
         "gate_bias": "b_gate", "mag_bias": "b_mag"}  # fmt: skip
NAMES = {
    "AutoEncoder": {"bias": "b_dec", **LINEAR},
    "AutoEncoderNew": {"decoder.bias": "b_dec", **LINEAR},
    "AutoEncoderTopK": {"b_dec": "b_dec", **LINEAR},
    "BatchTopKSAE": {"b_dec": "b_dec", **LINEAR},
    "MatryoshkaBatchTopKSAE": DIRECT,
    "JumpReluAutoEncoder": {**DIRECT, "threshold": "threshold"},
    "GatedAutoEncoder": GATED,
}
"""By dict_class: their tensors' names and ours."""
ONE_THRESHOLD = {"BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka"}
BY_RULE = {"standard": "AutoEncoder", "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder",
           "gated": "GatedAutoEncoder"}  # fmt: skip
READ_AS = {"AutoEncoder": "relu", "AutoEncoderNew": "relu", "AutoEncoderTopK": "topk", "JumpReluAutoEncoder": "jumprelu",
           "GatedAutoEncoder": "gated", **ONE_THRESHOLD}  # fmt: skip
TRAINERS = {"relu": "StandardTrainerAprilUpdate", "relu_unit_norm": "StandardTrainer", "p_anneal": "PAnnealTrainer",
            "topk": "TopKTrainer", "batchtopk": "BatchTopKTrainer", "matryoshka": "MatryoshkaBatchTopKTrainer",
            "gated": "GatedSAETrainer"}  # fmt: skip
"""Their trainer of the same loss, by which SAEBench names an architecture; JumpReluTrainer for the rest."""


def dict_class(architecture: str) -> str | None:
    """Their class that encodes by the same rule."""
    by_name = {ours: theirs for theirs, ours in ONE_THRESHOLD.items()}
    return by_name.get(architecture) or BY_RULE.get(ARCHITECTURES[architecture].saelens)


def write(sae: SAE, directory: Path) -> None:
    """Write `sae` so that `load_dictionary(directory)` computes the same; latents of a ReLU SAE become f·‖W_dec‖."""
    config, theirs = sae.config, dict_class(sae.config.architecture)
    if theirs is None:
        raise UserError(f"to: dictionary_learning has no {config.architecture}; saelens holds every architecture")
    tensors, _ = ARCHITECTURES[config.architecture].to_saelens(sae.parameters, config)
    trainer = {
        "trainer_class": TRAINERS.get(config.architecture, "JumpReluTrainer"),
        "dict_class": theirs,
        "activation_dim": config.d_in,
        "dict_size": config.d_sae,
        "seed": config.seed,
        **({"k": config.k} if config.k is not None else {}),
        **({"target_l0": config.target_l0} if config.target_l0 is not None else {}),
        **_site(sae.metadata),
    }
    buffer = {"ctx_len": sae.metadata.get("context_size"), "d_submodule": config.d_in, "io": "out"}
    with whole_folder(directory) as temporary:
        torch.save(_state_dict(theirs, tensors, config, sae.metadata), temporary / WEIGHTS)
        write_json(temporary / "config.json", {"trainer": trainer, "buffer": buffer, "raysae": block_of(sae)})


def _state_dict(theirs: str, tensors: Parameters, config: SAEConfig, metadata: dict[str, Any]) -> Parameters:
    if theirs == "AutoEncoder":
        tensors = unit_decoder(tensors)
    if theirs == "JumpReluAutoEncoder":
        tensors = subtract_b_dec(tensors, -1)
    state = named_as(tensors, NAMES[theirs])
    if theirs in ("AutoEncoderTopK", *ONE_THRESHOLD):
        threshold = tensors["threshold"][0].float() if theirs in ONE_THRESHOLD else torch.tensor(-1.0)
        state |= {"k": torch.tensor(config.k, dtype=torch.int), "threshold": threshold.cpu().clone()}
    if theirs == "MatryoshkaBatchTopKSAE":  # how it was trained; encoding does not depend on it
        ends = torch.tensor([0, *Matryoshka.ends(config.d_sae)])
        sizes = metadata.get("group_sizes")
        state["group_sizes"] = (
            torch.tensor(sizes)
            if isinstance(sizes, list) and all(type(n) is int for n in sizes) and sum(sizes) == config.d_sae
            else ends.diff()
        )
    return state


def read(directory: Path) -> SAE:
    """The SAE that `load_dictionary(directory)` gives."""
    for name in (WEIGHTS, "config.json"):
        if not (directory / name).is_file():
            raise UserError(f"sae: {directory} holds no {name}")
    cfg = load_json(directory / "config.json")
    trainer = cfg.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    theirs = trainer.get("dict_class")
    if theirs not in list(NAMES):
        raise UserError(f"sae: {directory} has dict_class {shown(theirs)}; known: {', '.join(NAMES)}")
    state = load_pt(directory / WEIGHTS)
    metadata = _metadata(cfg, trainer)
    names = NAMES[theirs] | ({"threshold": "threshold"} if theirs in ONE_THRESHOLD else {})
    tensors = renamed(directory, state, names, ("k", "threshold", "group_sizes"))
    if theirs in ONE_THRESHOLD:
        tensors["threshold"] = tensors["threshold"].expand(tensors["W_enc"].shape[1]).clone()
    sizes = state.get("group_sizes")
    if theirs == "MatryoshkaBatchTopKSAE" and isinstance(sizes, torch.Tensor) and dense_integers(sizes):
        metadata["group_sizes"] = sizes.tolist()
    if theirs in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        tensors = subtract_b_dec(tensors)
    if theirs == "AutoEncoder":
        tensors = unit_decoder(tensors)
    ours, more = trusted_block(cfg, [name for name in ARCHITECTURES if dict_class(name) == theirs])
    facts = {"target_l0": trainer.get("target_l0"), **ours, "k": _k(directory, trainer, state)}
    return sae_of(directory, ours.get("architecture", READ_AS[theirs]), tensors, facts, {**metadata, **more})


def _k(directory: Path, trainer: dict[str, Any], state: dict[str, Any]) -> int | None:
    """k of the config and of the tensors, which must agree, as in theirs."""
    stored, said = (
        number_of_latents(directory, "k", state.get("k")),
        number_of_latents(directory, "k", trainer.get("k")),
    )
    if said is not None and stored is not None and said != stored:
        raise UserError(f"sae: {directory} has k {said} in its config.json and {stored} in its {WEIGHTS}")
    return stored if said is None else said


def _site(metadata: dict[str, Any]) -> dict[str, Any]:
    """Model and layer in their words; SAEBench reads `layer` and `lm_name`."""
    hook = str(metadata.get("raysae_site") or metadata.get("hook_name") or "")
    found = re.fullmatch(r"blocks\.(\d+)\.(?:hook_)?(.+)", hook)
    return {
        "lm_name": metadata.get("model_name"),
        "layer": int(found[1]) if found else None,
        "submodule_name": f"{found[2]}_layer_{found[1]}" if found else hook or None,
    }


def _metadata(cfg: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    """Model, site and context length in SAELens' words, as far as they are stated."""
    buffer = cfg.get("buffer")
    site = re.fullmatch(r"(resid_pre|resid_post|attn_out|mlp_out)_layer_(\d+)", str(trainer.get("submodule_name")))
    found = {
        "model_name": trainer.get("lm_name"),
        "hook_name": f"blocks.{site[2]}.hook_{site[1]}" if site else None,
        "context_size": buffer.get("ctx_len") if isinstance(buffer, dict) else None,
    }
    return {key: value for key, value in found.items() if value is not None}
