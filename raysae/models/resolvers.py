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
    if text_config.model_type == "opt" and (
        not text_config.do_layer_norm_before or getattr(text_config, "_remove_final_layer_norm", False)
    ):
        raise UserError(
            f"model.name: {name!r} is an OPT that normalises after its branches are added (as opt-350m does), or has no "
            "final norm; its branches' outputs are not what the residual stream gains, so it has no sites here"
        )
    return layout


def find_modules(model: Any, layout: Layout) -> Modules:
    """Blocks and final norm of `model`, a Hugging Face causal LM or a vision-language model around one."""
    stack = model.get_decoder()
    try:
        return Modules(tuple(stack.get_submodule(layout.blocks).children()), stack.get_submodule(layout.norm))
    except AttributeError:
        found = f"{type(model).__name__}, whose decoder is {type(stack).__name__}"
        raise ValueError(f"{found}, has no {layout.blocks} and {layout.norm} there") from None


@dataclass(frozen=True)
class Layout:
    """Paths of an architecture's parts. Those of branches are relative to a block."""

    blocks: str = "layers"
    """The list of blocks, in the decoder (`get_decoder()`)."""
    norm: str = "norm"
    """The final norm, in the decoder."""
    attn_out: str = "self_attn"
    """The module whose (first) output attention adds to the residual stream."""
    mlp_out: str = "mlp"
    """The module whose output the MLP adds to the residual stream."""
    mlp_down: str | None = "mlp.down_proj"
    """The down projection, whose input is mlp_hidden; None: there is no such site (a mixture of experts)."""
    d_mlp: str = "intermediate_size"
    """The config's field for the width of mlp_hidden; unset there means 4 * d_model."""


@dataclass(frozen=True)
class Modules:
    """The modules of one model that hold its sites."""

    blocks: tuple[nn.Module, ...]
    norm: nn.Module


_LLAMA = Layout()
# Gemma 2 and 3 and OLMo 2 normalise a branch's output before they add it.
_GEMMA2 = replace(_LLAMA, attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
_GPT2 = Layout("h", "ln_f", attn_out="attn", mlp_down="mlp.c_proj", d_mlp="n_inner")
_EXPERTS = replace(_LLAMA, mlp_down=None)

LAYOUTS = {
    "gpt2": _GPT2,
    "gpt_neo": replace(_GPT2, d_mlp="intermediate_size"),
    "gpt_neox": Layout("layers", "final_layer_norm", attn_out="attention", mlp_down="mlp.dense_4h_to_h"),
    "gptj": replace(_GPT2, mlp_down="mlp.fc_out"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _EXPERTS,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "olmo2": _GEMMA2,
    "opt": Layout(norm="final_layer_norm", mlp_out="fc2", mlp_down="fc2", d_mlp="ffn_dim"),
    "phi": Layout(norm="final_layernorm", mlp_down="mlp.fc2"),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _EXPERTS,
    "smollm3": _LLAMA,
}
"""By the `model_type` of the (text) config."""
