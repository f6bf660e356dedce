"""Two nn.Linear as the origin studies saved them: encoder.weight [F, D], encoder.bias, decoder.weight [D, F], decoder.bias.

f = σ(x encoder.weightᵀ + encoder.bias), x̂ = f decoder.weightᵀ + decoder.bias: nothing is subtracted from x. The file is the
state dict itself, or holds it as model_state_dict, state_dict or model_state beside a config, which may say σ:
`use_topk` with `topk_k`, or `use_relu`. Loaders that ignored these ran linear maps as SAEs; here they are refused.
(An SAE of the phased programme was trained on rows z-scored per dimension, with statistics that its file does not hold.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raysae.errors import UserError
from raysae.sae.formats.assemble import Activation, renamed, sae_of, settled, subtract_b_dec
from raysae.sae.sae import SAE

NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
WRAPPERS = ("model_state_dict", "state_dict", "model_state")


def read(file: Path, data: dict[str, Any], user: Activation | None = None) -> SAE:
    """The SAE of a checkpoint; `user` is the nonlinearity where its config says none."""
    state = next((data[name] for name in WRAPPERS if isinstance(data.get(name), dict)), data)
    tensors = renamed(file, state, NAMES)
    config = data.get("config")
    stated = _activation(file, config if isinstance(config, dict) else {}, tensors["W_enc"].shape[1])
    activation = settled(file, stated, user)
    summary = data.get("summary")
    model = summary.get("model_name") if isinstance(summary, dict) else None
    metadata = {"model_name": model} if model else {}
    return sae_of(file, activation.architecture, subtract_b_dec(tensors), {"k": activation.k}, metadata)


def _activation(file: Path, config: dict[str, Any], d_sae: int) -> Activation | None:
    if config.get("use_topk"):
        if type(config.get("topk_k")) is not int:
            raise UserError(f"sae: {file} says use_topk without topk_k")
        # 0 is 30 % of the latents (phase2/train_multilayer_saes.py). `use_relu` is False beside use_topk; the k largest
        # of so many are positive, and where they were not, ours drops them
        return Activation("topk", config["topk_k"] or int(0.30 * d_sae))
    if "use_relu" not in config:
        return None
    if not config["use_relu"]:
        raise UserError(f"sae: {file} says use_relu: false and no TopK: a linear map is no SAE")
    return Activation("relu")
