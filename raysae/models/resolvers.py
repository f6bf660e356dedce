"""Where the sites are in each model architecture.

Hugging Face models differ in what they call their parts, and in where a branch's output is what it adds to the residual
stream. `LAYOUTS` says so for each `model_type`, as data; `find_modules` turns it into modules of a given model. Adding
an architecture means adding a row here and one to the tests, which check every site against an independent computation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from raysae.errors import UserError


def find_layout(text_config: Any, name: str) -> Layout:
    """The layout for a model's (text) config; UserError naming `model.name` if the architecture is not supported."""
    layout = LAYOUTS.get(text_config.model_type)
    if layout is None:
        raise UserError(
            f"model.name: {name!r} has the architecture {text_config.model_type!r}, which raysae does not know; "
            f"supported: {', '.join(sorted(LAYOUTS))}"
        )
    return layout


def find_modules(model: nn.Module, layout: Layout) -> Modules:
    """Blocks and final norm of `model`, a causal LM or a vision-language model around one."""
    for path in (*NESTED_STACKS, layout.stack):
        try:
            stack = model.get_submodule(path)
            return Modules(tuple(stack.get_submodule(layout.blocks).children()), stack.get_submodule(layout.norm))
        except AttributeError:
            continue
    raise ValueError(f"{type(model).__name__} has no {layout.blocks} and {layout.norm} in {layout.stack}")


@dataclass(frozen=True)
class Layout:
    """Paths of an architecture's parts. Those of branches are relative to a block."""

    stack: str = "model"
    """The decoder stack, in the causal LM."""
    blocks: str = "layers"
    """The list of blocks, in the stack."""
    norm: str = "norm"
    """The final norm, in the stack."""
    attn_out: str = "self_attn"
    """The module whose (first) output attention adds to the residual stream."""
    mlp_out: str = "mlp"
    """The module whose output the MLP adds to the residual stream."""
    mlp_down: str = "mlp.down_proj"
    """The down projection, whose input is mlp_hidden."""
    d_mlp: str = "intermediate_size"
    """The config's field for the width of mlp_hidden; unset there means 4 * d_model."""


@dataclass(frozen=True)
class Modules:
    """The modules of one model that hold its sites."""

    blocks: tuple[nn.Module, ...]
    norm: nn.Module


# Vision-language classes keep the text model's stack under one of these.
NESTED_STACKS = ("model.language_model", "language_model.model", "language_model")

_LLAMA = Layout()
# Gemma 2 and 3 normalise a branch's output before they add it.
_GEMMA2 = replace(_LLAMA, attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")

LAYOUTS = {
    "gpt2": Layout("transformer", "h", "ln_f", attn_out="attn", mlp_down="mlp.c_proj", d_mlp="n_inner"),
    "gpt_neox": Layout("gpt_neox", "layers", "final_layer_norm", attn_out="attention", mlp_down="mlp.dense_4h_to_h"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi": Layout(norm="final_layernorm", mlp_down="mlp.fc2"),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
"""By the `model_type` of the (text) config."""
