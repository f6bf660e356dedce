"""Names for the places in a model where activations are read and edited.

A site is named by what it is (`blocks.3.resid_post`), never by an index into `hidden_states`: that index counts the
embedding as 0, so one and the same number has meant a block's input to some and its output to others. It is kept beside
the name as an alias, for those who have data under it.

    embed                 what enters the first block: token embeddings (GPT-2: plus positions; Gemma: scaled)
    blocks.{i}.resid_pre  the residual stream that enters block i
    blocks.{i}.attn_out   what attention adds to the residual stream (Gemma 2 and 3, OLMo 2: after its post-norm)
    blocks.{i}.mlp_hidden the MLP after its nonlinearity: the input of the down projection (gated: act(gate) * up); a
                          mixture of experts has none
    blocks.{i}.mlp_out    what the MLP adds to the residual stream (Gemma 2 and 3, OLMo 2: after its post-norm)
    blocks.{i}.resid_post the output of block i
    final_norm            the last residual stream after the final norm: the input of the language-model head

Everywhere, including parallel blocks (Pythia, Phi, GPT-J), resid_pre + attn_out + mlp_out = resid_post.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from raysae.errors import UserError

BLOCK_KINDS = ("resid_pre", "attn_out", "mlp_hidden", "mlp_out", "resid_post")  # in the order they are computed

_BLOCK_SITE = re.compile(rf"blocks\.(0|[1-9][0-9]*)\.({'|'.join(BLOCK_KINDS)})")


def all_sites(n_blocks: int) -> tuple[str, ...]:
    """Every site of a model with `n_blocks` blocks, in the order of computation."""
    blocks = (f"blocks.{i}.{kind}" for i in range(n_blocks) for kind in BLOCK_KINDS)
    return ("embed", *blocks, "final_norm")


def parse_site(name: str, n_blocks: int) -> Site:
    """The site called `name` in a model with `n_blocks` blocks; UserError if there is none."""
    if name in ("embed", "final_norm"):
        return Site(name, name, None)
    match = _BLOCK_SITE.fullmatch(name)
    if match is None or int(match[1]) >= n_blocks:
        raise UserError(
            f"capture.sites: {name!r} is not a site of this model of {n_blocks} blocks; allowed: embed, "
            f"blocks.{{0..{n_blocks - 1}}}.{{{'|'.join(BLOCK_KINDS)}}}, final_norm"
        )
    return Site(name, match[2], int(match[1]))


def order_sites(names: Iterable[str], n_blocks: int) -> tuple[Site, ...]:
    """Parse `names`, drop repeats, and sort by the order of computation. UserError for an unknown one."""

    def depth(site: Site) -> tuple[int, int]:
        if site.block is None:
            return (-1, 0) if site.kind == "embed" else (n_blocks, 0)
        return site.block, BLOCK_KINDS.index(site.kind)

    return tuple(sorted({parse_site(name, n_blocks) for name in names}, key=depth))


def hf_hidden_states_index(site: Site, n_blocks: int) -> int | None:
    """Index of `site` in the `hidden_states` that Hugging Face models return, or None if it is not among them.

    The last entry is taken after the final norm, so the last block's resid_post has no index.
    """
    if site.kind == "embed":
        return 0
    if site.kind == "final_norm":
        return n_blocks
    if site.block is not None and site.kind == "resid_pre":
        return site.block
    if site.block is not None and site.kind == "resid_post" and site.block < n_blocks - 1:
        return site.block + 1
    return None


@dataclass(frozen=True)
class Site:
    """A named place in a model."""

    name: str
    kind: str
    """embed, final_norm, or one of BLOCK_KINDS."""
    block: int | None
    """Block number, None for embed and final_norm."""
