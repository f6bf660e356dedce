"""State dicts of openai/sparse_autoencoder: pre_bias, latent_bias, encoder.weight [N, d], decoder.weight [d, N] and the
activation's name and settings.

Encode: activation((x - pre_bias) encoder.weightᵀ + latent_bias) (its model.py). Its loader takes ReLU for an activation
that is missing or unknown, and layer-norms the input of every TopK (its released v5); both are refused here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raysae.errors import UserError
from raysae.sae.formats.assemble import Activation, Stated, reading_raw, renamed, sae_of, settled
from raysae.sae.formats.files import shown
from raysae.sae.sae import SAE

NAMES = {"pre_bias": "b_dec", "latent_bias": "b_enc", "encoder.weight": "W_enc", "decoder.weight": "W_dec"}
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def read(file: Path, data: dict[str, Any], user: Stated) -> SAE:
    """The SAE of a state dict; `user` states the nonlinearity where the file has none.

    A `normalize` entry says whether inputs are layer-normed, which depends on the row and folds into no weights; without
    one, TopK is, as in their loader.
    """
    activation = settled(file, _activation(file, data), user.activation)
    if user.apply_b_dec_to_input is False:
        raise UserError(f"apply_b_dec_to_input: {file} is in openai format, which subtracts pre_bias")
    if data.get("normalize", activation.architecture == "topk"):
        raise UserError(
            f"sae: {file} layer-norms each row, as openai's loader does for TopK, which no SAE here does; "
            "if it was trained without, add normalize=False to the file"
        )
    named = [key for key in (user.mean, user.std, user.scale) if key]
    tensors = reading_raw(file, data, user, renamed(file, data, NAMES, (*STATISTICS, *named)))
    return sae_of(file, activation.architecture, tensors, {"k": activation.k}, {})


def _activation(file: Path, data: dict[str, Any]) -> list[Activation]:
    name, settings = data.get("activation"), data.get("activation_state_dict")
    settings = dict(settings) if isinstance(settings, dict) else {}
    if name is None:
        return []
    if name == "ReLU":
        return [Activation("relu")]
    if name == "TopK" and settings.get("postact_fn") == "ReLU" and type(settings.get("k")) is int:
        return [Activation("topk", settings["k"])]
    if name == "Identity":
        raise UserError(f"sae: {file} has no nonlinearity (Identity): a linear map is no SAE")
    said = f"activation {shown(name)} with {shown(settings)}"
    raise UserError(f"sae: {file} has {said}; known: ReLU, and TopK with k and ReLU")
