"""Invariance: do the same latents fire when an example is worded differently, with other spaces, names or numbers?

Each example of a sample is read as it is and reworded (`data.perturb`), through the model and the SAE. The overlap of the
latents before and after stands beside the overlap with another example of the same stratum: latents that fire on everything
overlap whatever one does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from raysae.data.perturb import ORIGINAL, kinds_for, name_pools, plain, reword
from raysae.data.records import Problem
from raysae.data.tokens import TokenBlock, micro_batches, read_block, tokenize
from raysae.evaluate.statistics import Bootstrap, intervals
from raysae.files import read_json, write_atomic, write_json
from raysae.models.host import ModelHost
from raysae.sae.formats import load, load_tensors

ROWS_AT_ONCE = 2048
MEASURES = ("jaccard", "jaccard_null", "jaccard_above", "cosine", "cosine_null", "cosine_above")


@dataclass(frozen=True)
class Reading:
    """What fires on each example of a block: `<block>.safetensors` below `root`, in the order of its example_ids."""

    site: str
    sae: Path
    root: Path
    tokens_per_forward: int

    def __call__(self, host: ModelHost, block: TokenBlock) -> dict[str, Any]:
        return read_latents(host, block, self)


def read_latents(host: ModelHost, block: TokenBlock, task: Reading) -> dict[str, Any]:
    """Write `active` (bool: on any kept token) and `mean` (over kept tokens), each [examples, d_sae], of a block."""
    sae = load(task.sae).to(host.device)
    shape = (len(block.example_ids), sae.config.d_sae)
    total, firings = (torch.zeros(shape, device=host.device) for _ in range(2))
    count = torch.zeros(shape[0], device=host.device)
    for batch in micro_batches(block, task.tokens_per_forward):
        x = host.read(batch.input_ids, batch.attention_mask, (task.site,))[task.site]
        rows = x[batch.mask.to(x.device)].float()
        codes = torch.from_numpy(np.concatenate([block.example[i][block.loss_mask[i]] for i in batch.index])).to(
            x.device
        )
        for start in range(0, len(rows), ROWS_AT_ONCE):
            f, example = sae.encode(rows[start : start + ROWS_AT_ONCE]), codes[start : start + ROWS_AT_ONCE]
            total.index_add_(0, example, f)
            firings.index_add_(0, example, (f != 0).float())
            count.index_add_(0, example, torch.ones(len(f), device=x.device))
    tensors = {"active": (firings > 0).cpu(), "mean": (total / count.clamp_min(1)[:, None]).cpu()}
    task.root.mkdir(parents=True, exist_ok=True)
    write_atomic(task.root / f"{block.name}.safetensors", lambda path: save_file(tensors, path))
    return {"name": block.name, "rows": int(count.sum())}


def done(root: Path, name: str) -> bool:
    """Whether the block of this name has been read below `root`."""
    return (root / f"{name}.safetensors").exists()


def sample(problems: Sequence[Problem], count: int, seed: int) -> list[Problem]:
    """Up to `count` of the problems, no two of one group, so that they are independent of each other."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.group, problem)
    each = list(first.values())
    chosen = np.random.default_rng(seed).permutation(len(each))[:count]
    return [each[i] for i in sorted(chosen)]


def write_variants(
    root: Path, problems: Sequence[Problem], count: int, tokenizer: Any, context_length: int, rows_per_block: int,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Tokens of `sample`, each question as it is and in each other wording there is; names come from all `problems`.

    Below `root`: the files of `tokenize`, whose facts are returned, and `sample.json`, which `collect` reads.
    """
    sampled = sample([p for p in problems if p.split == "validation"], count, seed)
    pools, kinds = name_pools(problems), kinds_for(problems)
    wordings = [plain(p, ORIGINAL, p.question) for p in sampled]
    wordings += [v for kind in kinds for p in sampled if (v := reword(p, kind, pools, seed)) is not None]
    facts = tokenize(wordings, tokenizer, context_length, "problems", rows_per_block, seed, root)
    strata = {p.example_id: p.stratum for p in sampled}
    write_json(root / "sample.json", {"strata": strata, "kinds": kinds, "blocks": facts["blocks"]})
    return facts


def collect(latents: Path, tokens: Path, bootstrap: Bootstrap) -> dict[str, Any]:
    """The content of invariance.json: by kind, how many examples it changed, and MEASURES with intervals over these.

    jaccard: |A ∩ B| / |A ∪ B| of the sets of latents active anywhere in the example; cosine: of the latents' means over its
    tokens; null: the same of the example and another one, drawn from its stratum; above: less the null. Examples that hold
    nothing of the kind, or whose token ids stay the same, are counted and averaged in nowhere; so are those too long.

    latents: what `Reading` left of the blocks that `write_variants` left in `tokens`.
    """
    sampled = read_json(tokens / "sample.json")
    ids: dict[str, tuple[int, ...]] = {}
    active: dict[str, np.ndarray] = {}
    mean: dict[str, np.ndarray] = {}
    for entry in sampled["blocks"]:
        block, of_block = read_block(tokens / entry["file"]), load_tensors(latents / f"{entry['name']}.safetensors")
        for sequence, example in zip(block.input_ids, block.example, strict=True):
            ids[block.example_ids[example[0]]] = tuple(sequence.tolist())
        active |= dict(zip(block.example_ids, of_block["active"].numpy(), strict=True))
        mean |= dict(zip(block.example_ids, of_block["mean"].double().numpy(), strict=True))

    kept = {name: stratum for name, stratum in sampled["strata"].items() if f"{name}#{ORIGINAL}" in ids}
    other = _partners(kept, bootstrap.seed)
    entries = []
    for kind in sampled["kinds"]:
        counts = {"affected": 0, "not_found": 0, "same_tokens": 0}
        values = []
        for example in kept:
            before, after = (f"{example}#{what}" for what in (ORIGINAL, kind))
            state = "not_found" if after not in ids else "same_tokens" if ids[after] == ids[before] else "affected"
            counts[state] += 1
            partner = f"{other[example]}#{ORIGINAL}"
            if state == "affected" and partner in ids:
                jaccard, null = (_jaccard(active[before], active[i]) for i in (after, partner))
                cosine, cosine_null = (_cosine(mean[before], mean[i]) for i in (after, partner))
                values.append([jaccard, null, jaccard - null, cosine, cosine_null, cosine - cosine_null])
        entries.append({"kind": kind, "examples": len(kept), "compared": len(values), **counts})
        entries[-1] |= _means(np.array(values).reshape(-1, len(MEASURES)), bootstrap)
    too_long = len(sampled["strata"]) - len(kept)
    return {"examples": len(kept) + too_long, "too_long": too_long, "kinds": entries}


def _partners(strata: Mapping[str, str], seed: int) -> dict[str, str | None]:
    """By example_id, as `strata`: another example of the same stratum, drawn at random; None where there is none."""
    of_stratum: dict[str, list[str]] = defaultdict(list)
    for example, stratum in strata.items():
        of_stratum[stratum].append(example)
    rng = np.random.default_rng(seed)
    partner: dict[str, str | None] = {}
    for members in of_stratum.values():
        for i, member in enumerate(members):
            step = int(rng.integers(1, len(members))) if len(members) > 1 else 0
            partner[member] = members[(i + step) % len(members)] if step else None
    return partner


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def _means(values: np.ndarray, bootstrap: Bootstrap) -> dict[str, float | None]:
    """Mean of each of MEASURES [n, 6] over examples, with its bootstrap interval; None where there is none."""
    n = len(values)
    ends = intervals(values, lambda totals: totals / n, bootstrap) if n > 1 else None
    means: dict[str, float | None] = {}
    for k, name in enumerate(MEASURES):
        low, high = (float(ends.low[k]), float(ends.high[k])) if ends else (None, None)
        means |= {name: float(values[:, k].mean()) if n else None, f"{name}_low": low, f"{name}_high": high}
    return means
