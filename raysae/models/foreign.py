"""What other libraries call a site, so that SAELens can run the model of an SAE by the SAE's file alone.

SAELens loads a model by a class and reads a hook by its name. `HookedTransformer` (TransformerLens) has names of its own,
for published models only. `AutoModelForCausalLM` takes any Hugging Face model, and its hooks are modules: what a module
returns, the first of it where it returns several, which SAELens' HookedProxyLM reads and replaces.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from raysae.models.resolvers import Layout, Modules, find_layout, find_modules
from raysae.models.sites import Site, order_sites


class Hook(NamedTuple):
    """Where SAELens finds a site."""

    model_class_name: str
    hook_name: str | None
    """None where no module returns what is read there: the product inside a gated MLP, the sum of two embeddings."""


def saelens_hooks(
    name: str, sites: tuple[str, ...], revision: str | None = None, trust_remote_code: bool = False
) -> dict[str, Hook]:
    """SAELens' class and hook for each site of a model, a hub name or a local folder.

    `revision` is what the user asked for: TransformerLens has the main one only. No weights are read: the modules are
    those of the model built from its config.
    """
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    layout = find_layout(config.get_text_config(), name)
    n_blocks = config.get_text_config().num_hidden_layers
    known = name in TRANSFORMER_LENS and revision is None
    found = {}
    for site in order_sites(sites, n_blocks):
        theirs = transformer_lens_hook(site) if known else None
        in_model = Hook("AutoModelForCausalLM", module_of(model, layout, site))
        found[site.name] = Hook("HookedTransformer", theirs) if theirs else in_model
    return found


def transformer_lens_hook(site: Site) -> str | None:
    """The hook point of TransformerLens' HookedTransformer that holds what `site` does.

    None for final_norm: its `ln_final.hook_normalized` comes before the norm's weights. Its `hook_embed` comes before the
    positions are added; what enters the first block is `blocks.0.hook_resid_pre`.
    """
    if site.kind == "final_norm":
        return None
    kind = {"embed": "hook_resid_pre", "mlp_hidden": "mlp.hook_post"}.get(site.kind, f"hook_{site.kind}")
    return f"blocks.{site.block or 0}.{kind}"


def module_of(model: nn.Module, layout: Layout, site: Site) -> str | None:
    """The name in `model` of the module whose output is `site`; None if there is none."""
    modules = find_modules(model, layout)
    try:
        module = _module(model, modules, layout, site)
    except AttributeError:
        return None
    return next((name for name, candidate in model.named_modules() if candidate is module), None)


def _module(model: Any, modules: Modules, layout: Layout, site: Site) -> nn.Module | None:
    if site.kind == "final_norm":
        return modules.norm
    block = site.block or 0
    if site.kind == "resid_post":
        return modules.blocks[block]
    if site.kind == "resid_pre" and block > 0:
        return modules.blocks[block - 1]
    if site.kind in ("embed", "resid_pre"):
        path = EMBEDDED.get(model.config.get_text_config().model_type)
        return model.get_decoder().get_submodule(path) if path else None
    if layout.mlp_out == layout.mlp_down and site.kind in ("mlp_hidden", "mlp_out"):
        return None  # OPT's MLP has no module of its own, and returns rows without their sequence
    activated = ACTIVATED.get(model.config.get_text_config().model_type)
    path = activated if site.kind == "mlp_hidden" else getattr(layout, site.kind)
    return modules.blocks[block].get_submodule(path) if path else None


EMBEDDED = {"gpt2": "drop", "gpt_neo": "drop", "gptj": "drop", "gpt_neox": "emb_dropout", "phi": "embed_dropout"}
_TOKENS = "llama mistral mixtral gemma gemma2 gemma3_text olmo2 phi3 qwen2 qwen3 qwen3_moe smollm3"
EMBEDDED |= dict.fromkeys(_TOKENS.split(), "embed_tokens")
"""By model_type: the module in the stack whose output enters the first block, positions added."""

ACTIVATED = dict.fromkeys(("gpt2", "gpt_neo", "gptj", "gpt_neox"), "mlp.act") | {"phi": "mlp.activation_fn"}
"""By model_type: the module in a block whose output is mlp_hidden. A gated MLP's is a product, which no module returns."""


def _named(prefix: str, names: str) -> set[str]:
    return {prefix + name for name in names.split()}


TRANSFORMER_LENS = frozenset(
    _named("", "gpt2 gpt2-medium gpt2-large gpt2-xl distilgpt2")
    | _named(
        "EleutherAI/",
        "pythia-14m pythia-31m pythia-70m pythia-70m-deduped pythia-160m pythia-160m-deduped pythia-410m "
        "pythia-410m-deduped pythia-1b pythia-1b-deduped pythia-1.4b pythia-1.4b-deduped pythia-2.8b pythia-2.8b-deduped "
        "pythia-6.9b pythia-6.9b-deduped pythia-12b pythia-12b-deduped",
    )
    | _named(
        "meta-llama/",
        "Llama-2-7b-hf Llama-2-7b-chat-hf Llama-2-13b-hf Llama-2-13b-chat-hf Meta-Llama-3-8B Meta-Llama-3-8B-Instruct "
        "Llama-3.1-8B Llama-3.1-8B-Instruct Llama-3.2-1B Llama-3.2-1B-Instruct Llama-3.2-3B Llama-3.2-3B-Instruct",
    )
    | _named("mistralai/", "Mistral-7B-v0.1 Mistral-7B-Instruct-v0.1")
    | _named(
        "Qwen/",
        "Qwen2-0.5B Qwen2-0.5B-Instruct Qwen2-1.5B Qwen2-1.5B-Instruct Qwen2-7B Qwen2-7B-Instruct Qwen2.5-0.5B "
        "Qwen2.5-0.5B-Instruct Qwen2.5-1.5B Qwen2.5-1.5B-Instruct Qwen2.5-3B Qwen2.5-3B-Instruct Qwen2.5-7B "
        "Qwen2.5-7B-Instruct Qwen2.5-14B Qwen2.5-14B-Instruct Qwen3-0.6B Qwen3-1.7B Qwen3-4B Qwen3-8B Qwen3-14B",
    )
)
"""Hub names that TransformerLens' HookedTransformer loads (3.9, supported_models.py), of the architectures whose sites are
tested against it: GPT-2, GPT-NeoX, Llama, Mistral, Qwen 2 and 3. (With transformers 5 it cannot convert Phi; its Gemma has
sizes of its own, which no small model tests.)"""
