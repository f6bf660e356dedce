"""Small stores, token blocks and models for tests, built without Ray, files from outside, or the code under test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from raysae.activations.store import SCHEMA_VERSION, Store
from raysae.data.tokens import TokenBlock
from raysae.files import sha256_of, write_json
from raysae.models.host import ModelHost

VOCAB, D_MODEL, BLOCKS = 23, 8, 2
BOS = 0


def tiny_host(seed: int = 0) -> ModelHost:
    """A random GPT-2 with weights large enough that every position and edit changes the logits."""
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=D_MODEL, n_layer=BLOCKS, n_head=2, n_positions=32, initializer_range=0.5,
        bos_token_id=BOS, eos_token_id=BOS, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ModelHost(GPT2LMHeadModel(config))


def tiny_block(
    split: str = "train", index: int = 0, examples: int = 6, seed: int = 0, longest: int = 9, groups: int = 4
) -> TokenBlock:
    """Sequences of one example each and of unequal lengths: a separator, then tokens, one of them special too."""
    rng = np.random.default_rng([seed, index])
    lengths = rng.integers(3, longest + 1, size=examples)
    lengths[0] = longest
    ids = [np.concatenate([[BOS], rng.integers(1, VOCAB, size=n - 1)]).astype(np.int64) for n in lengths]
    ids[0][longest // 2] = BOS  # a special token inside a sequence, not only in front
    names = [f"toy/{split}/{index}/{i}" for i in range(examples)]
    return TokenBlock(
        name=f"{split}-{index:05d}-{hashlib.sha256(repr((split, index, seed)).encode()).hexdigest()[:8]}",
        split=split,
        sequence_id=np.arange(examples, dtype=np.int32) + 100 * index,
        input_ids=ids,
        positions=[np.arange(n, dtype=np.int32) for n in lengths],
        step=[np.full(n, -1, dtype=np.int16) for n in lengths],
        loss_mask=[i != BOS for i in ids],
        example=[np.full(n, i, dtype=np.int32) for i, n in enumerate(lengths)],
        example_ids=names,
        groups=[f"group-{i % groups}" for i in range(examples)],
    )


def block_entry(block: TokenBlock) -> dict[str, object]:
    """What the token manifest says of a block, as far as capture reads it."""
    return {"name": block.name, "split": block.split, "rows": sum(int(m.sum()) for m in block.loss_mask)}


def tiny_store(
    root: Path,
    shards: Sequence[tuple[str, Tensor]],
    site: str = "blocks.0.resid_post",
    columns: Mapping[int, Mapping[str, Sequence]] | None = None,
) -> Store:
    """A store of one site with these (split, x [rows, d]) shards, written by hand.

    columns: example_id, group, position, token_id and step of a shard's rows by shard number; else every row is an
    example of its own.
    """
    listed = []
    for number, (split, x) in enumerate(shards):
        name = f"{split}-{number:05d}-{number:08x}"
        given = (columns or {}).get(number, {})
        n = x.shape[0]
        ids = list(given.get("example_id", [f"{split}/{number}/{i}" for i in range(n)]))
        table = pa.table(
            {
                "example_id": pa.array(ids, pa.string()).dictionary_encode(),
                "group": pa.array(list(given.get("group", ids)), pa.string()).dictionary_encode(),
                "sequence_id": pa.array(np.zeros(n, np.int32)),
                "position": pa.array(np.array(given.get("position", np.arange(n)), np.int32)),
                "token_id": pa.array(np.array(given.get("token_id", np.zeros(n)), np.int32)),
                "step": pa.array(np.array(given.get("step", np.zeros(n)), np.int16)),
                "split": pa.array([split] * n).dictionary_encode(),
            }
        )
        files = {site: root / site / f"{name}.safetensors", "rows": root / "rows" / f"{name}.parquet"}
        for file in files.values():
            file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": x.contiguous()}, files[site])
        pq.write_table(table, files["rows"])
        sha256 = {str(file.relative_to(root)): sha256_of(file) for file in files.values()}
        listed.append({"name": name, "split": split, "rows": n, "sha256": sha256})
    train = torch.cat([x for split, x in shards if split == "train"] or [x for _, x in shards]).double()
    facts = {
        "d_model": train.shape[1],
        "mean": train.mean(0).tolist(),
        "mean_square_norm": train.square().sum(1).mean().item(),
        "non_finite": 0,
    }
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": "toy", "class": "Toy", "revision": None, "weights": "abc"},
        "sites": {site: facts},
        "dtype": str(shards[0][1].dtype).removeprefix("torch."),
        "rows": {s: sum(x.shape[0] for split, x in shards if split == s) for s in ("train", "validation", "test")},
        "shards": listed,
    }
    write_json(root / "manifest.json", manifest)
    return Store(root)


def sparse_rows(rows: int, d_in: int, seed: int = 0, features: int = 24, active: int = 3, mean: float = 0.5) -> Tensor:
    """Rows made of a few of `features` random directions, off the origin: something an SAE can learn. float32."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(features, d_in, generator=torch.Generator().manual_seed(7))
    chosen = torch.rand(rows, features, generator=generator).argsort(1)[:, :active]
    weights = torch.zeros(rows, features).scatter_(1, chosen, torch.rand(rows, active, generator=generator) + 0.5)
    return weights @ directions + mean
