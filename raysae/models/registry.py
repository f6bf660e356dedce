"""Which layer of a well-known model to look at first, and what the model's licence is.

These are the defaults of the phased programme, with gemma-2b's MLP width as its config has it. A model that is not
here, or whose depth does not match, gets its middle block.
"""

from __future__ import annotations

from dataclasses import dataclass


def default_site(name: str, n_blocks: int) -> str:
    """The residual stream after the layer that the registry has for `name`, else after block `n_blocks // 2`."""
    known = find(name)
    layer = known.layers[0] if known is not None and known.n_layers == n_blocks else n_blocks // 2
    return f"blocks.{layer}.resid_post"


def find(name: str) -> KnownModel | None:
    """The entry for a hub name such as `openai-community/gpt2`, with or without its organisation; None if unknown."""
    return _BY_NAME.get(name.rsplit("/", 1)[-1].lower().removeprefix("meta-"))


@dataclass(frozen=True)
class KnownModel:
    """A model that the programme has defaults for."""

    name: str
    n_layers: int
    d_model: int
    d_mlp: int
    """Width of mlp_hidden."""
    layers: tuple[int, ...]
    """Blocks worth a look; the first is the default."""
    licence: str


MODELS = (
    KnownModel("gpt2", 12, 768, 3072, (6,), "MIT"),
    KnownModel("gpt2-medium", 24, 1024, 4096, (12,), "MIT"),
    KnownModel("pythia-160m", 12, 768, 3072, (6,), "Apache-2.0"),
    KnownModel("pythia-1.4b", 24, 2048, 8192, (12,), "Apache-2.0"),
    KnownModel("gemma-2b", 18, 2048, 16384, (9,), "Gemma"),
    KnownModel("llama-3-8b", 32, 4096, 14336, (16,), "Llama 3"),
    KnownModel("llama-3.2-1b", 16, 2048, 8192, (8, 4, 14), "Llama 3.2"),
    KnownModel("phi-2", 32, 2560, 10240, (16,), "MIT"),
    KnownModel("qwen2.5-7b", 28, 3584, 18944, (14,), "Apache-2.0"),
)

_BY_NAME = {model.name: model for model in MODELS}
