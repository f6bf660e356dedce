"""Two nn.Linear as the origin studies saved them: encoder.weight [F, D], encoder.bias, decoder.weight [D, F], decoder.bias.

f = σ(x encoder.weightᵀ + encoder.bias), x̂ = f decoder.weightᵀ + decoder.bias; x - decoder.bias in place of x where the
file or the user says so. The file is the state dict itself, or holds it as model_state_dict, state_dict or model_state
beside a config, which may say σ: `use_topk` with `topk_k`, `use_relu`, `activation`, `k` or `top_k`. Loaders that ignored
these ran linear maps as SAEs, and those that ignored what stands beside the state dict ran SAEs on inputs that they were
not trained on; here both are refused.
(An SAE of the phased programme was trained on rows z-scored per dimension, with statistics that its file does not hold.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raysae.errors import UserError
from raysae.sae.formats import dictionary_learning, sparsify
from raysae.sae.formats.assemble import (
    Activation,
    Stated,
    number_of_latents,
    reading_raw,
    renamed,
    sae_of,
    settled,
    subtract_b_dec,
)
from raysae.sae.formats.files import shown
from raysae.sae.sae import SAE

NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
WRAPPERS = ("model_state_dict", "state_dict", "model_state")
K = ("k", "top_k", "topk")
SIGMA = ("activation", "activation_fn", "act_fn", "nonlinearity")
SUBTRACTS = ("apply_b_dec_to_input", "subtract_b_dec", "use_pre_bias", "pre_bias")

ASSUMED = "the encoder reads x, not x - decoder.bias (--apply_b_dec_to_input true, if it was trained on that)"
"""What is taken of a file that says neither; the SAE's metadata and the command's line say so."""

NORMALISES = re.compile(
    "means?|mu|stds?|sigma|var|variance|scal(e|es|ed|er|ing)|norm|normali[sz](e|ed|er|ation)|cent(er|re|ered|red|ering)|"
    "whiten(ed|ing)?|standardi[sz](e|ed|ation)|zscore"
)
OF_OTHERS = re.compile(
    "dec|decoder|grad|gradient|clip|weights?|loss|losses|lr|l0|l1|mse|fvu|ev|explained|best|val|metrics?|aux|init"
)
"""Words of a name which, beside one of NORMALISES, make it something else: clip_grad_norm, normalize_decoder, mean_l0."""


def read(file: Path, data: dict[str, Any], user: Stated) -> SAE:
    """The SAE of a checkpoint; `user` states what it leaves open. UserError for what it holds and no weight can hold."""
    state = next((data[name] for name in WRAPPERS if isinstance(data.get(name), dict)), data)
    beside = {} if state is data else {name: value for name, value in data.items() if value is not state}
    config = data.get("config")
    config = config if isinstance(config, dict) else {}
    _refuse_other_layouts(file, state, beside)
    named = [key for key in (user.mean, user.std, user.scale) if key]
    _refuse_without_place(file, {**config, **beside}, named)
    tensors = renamed(file, state, NAMES, [*named, *K])
    said = {**config, **{name: value for name, value in {**state, **data}.items() if name in (*K, *SIGMA, *SUBTRACTS)}}
    activation = settled(file, _activations(file, said, tensors["W_enc"].shape[1]), user.activation)
    subtracts = _subtracts(file, said, user)
    tensors = tensors if subtracts else subtract_b_dec(tensors)
    tensors = reading_raw(file, {**config, **beside, **state}, user, tensors)
    summary = data.get("summary")
    model = summary.get("model_name") if isinstance(summary, dict) else None
    metadata = {"model_name": model} if isinstance(model, str) else {}
    assumed = {"raysae_assumed": ASSUMED} if subtracts is None else {}
    return sae_of(file, activation.architecture, tensors, {"k": activation.k}, metadata | assumed)


def _activations(file: Path, said: Mapping[str, Any], d_sae: int) -> list[Activation]:
    """Every nonlinearity that the config states; a linear map is refused."""
    found: list[Activation] = []
    if said.get("use_topk"):
        k = number_of_latents(file, "topk_k", said.get("topk_k"))
        if k is None:
            raise UserError(f"sae: {file} says use_topk without topk_k")
        # 0 is 30 % of the latents (phase2/train_multilayer_saes.py). `use_relu` is False beside use_topk; the k largest
        # of so many are positive, and where they were not, ours drops them
        found.append(Activation("topk", k or int(0.30 * d_sae)))
    elif "use_relu" in said:
        if not said["use_relu"]:
            raise UserError(f"sae: {file} says use_relu: false and no TopK: a linear map is no SAE")
        found.append(Activation("relu"))
    ks = [number_of_latents(file, name, said.get(name)) for name in K] if said.get("use_topk") is not False else []
    ks = [k for k in ks if k]
    found += [Activation("topk", k) for k in ks]
    for name in SIGMA:
        sigma = re.sub("[^a-z]", "", str(said.get(name) or "").lower()) if name in said else ""
        if sigma == "relu":
            found.append(Activation("relu"))
        elif sigma in ("identity", "linear"):
            raise UserError(f"sae: {file} says {name} {shown(said[name])}: a linear map is no SAE")
        elif sigma and sigma not in ("topk", "none"):
            raise UserError(f"sae: {file} says {name} {shown(said[name])}; known: relu, and topk with k")
        elif sigma == "topk" and not any(a.architecture == "topk" for a in found):
            raise UserError(f"sae: {file} says {name} {shown(said[name])} without k")
    return list(dict.fromkeys(found))


def _subtracts(file: Path, said: Mapping[str, Any], user: Stated) -> bool | None:
    """Whether the encoder reads x - decoder.bias; None where neither the file nor the user says."""
    stated = {name: said[name] for name in SUBTRACTS if isinstance(said.get(name), bool)}
    if user.apply_b_dec_to_input is not None:
        stated["apply_b_dec_to_input of the command"] = user.apply_b_dec_to_input
    if len(set(stated.values())) > 1:
        raise UserError(
            f"apply_b_dec_to_input: {file} is said to be {' and '.join(f'{n} {v}' for n, v in stated.items())}"
        )
    return next(iter(stated.values()), None)


def _refuse_without_place(file: Path, beside: Mapping[str, Any], named: list[str]) -> None:
    """A tensor beside the state dict, and a setting that normalises x, change what the SAE computes."""
    odd = [
        str(name)
        for name, value in beside.items()
        if name not in (*named, *K) and (isinstance(value, torch.Tensor) or (_normalises(str(name)) and _acts(value)))
    ]
    if odd:
        raise UserError(
            f"sae: {file} has {', '.join(odd)} beside its weights, which have no place for it; name what is done to x "
            "(--mean KEY is subtracted, --std KEY divides, --scale KEY multiplies) and remove from the file what is not"
        )


def _normalises(name: str) -> bool:
    words = re.findall("[a-z0-9]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return any(map(NORMALISES.fullmatch, words)) and not any(map(OF_OTHERS.fullmatch, words))


def _acts(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower() not in ("", "none", "false", "no")
    return value is not None and value is not False and not (type(value) in (int, float) and value in (0, 1))


def _refuse_other_layouts(file: Path, state: Mapping[str, Any], beside: Mapping[str, Any]) -> None:
    """A state dict of another library is read by its rule, not by that of two nn.Linear with names exchanged."""
    tensors = {name for name, value in {**state, **beside}.items() if isinstance(value, torch.Tensor)}
    if tensors >= set(NAMES):
        return
    if tensors >= set(sparsify.NAMES):
        raise UserError(f"sae: {file} has sparsify's tensors; save them as {sparsify.WEIGHTS} beside a cfg.json with k")
    classes = [name for name, names in dictionary_learning.NAMES.items() if tensors >= set(names)]
    if not classes:
        return
    as_theirs = f'ae.pt beside a config.json that says {{"trainer": {{"dict_class": "{classes[0]}"}}}}'
    names = dictionary_learning.NAMES[classes[0]]
    if "W_enc" in names:
        raise UserError(
            f"sae: {file} has SAELens' tensor names, which leave the rule open; save them as sae_weights.safetensors "
            "beside a cfg.json with architecture, d_in, d_sae, dtype, apply_b_dec_to_input and metadata.sae_lens_version, "
            f"or, if dictionary_learning wrote them, as {as_theirs}"
        )
    bias = next(theirs for theirs, ours in names.items() if ours == "b_dec")
    more = sorted(tensors - {*names, "k", "threshold", "group_sizes"})
    first = (
        f", once {', '.join(more)}, which it has no place for, is folded: a mean of x is added to {bias}"
        if more
        else ""
    )
    raise UserError(
        f"sae: {file} has the tensors of dictionary_learning's {' or '.join(classes)}, whose encoder reads x - {bias}; "
        f"save its state dict as {as_theirs}{first}"
    )
