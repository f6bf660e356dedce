"""How faithful an SAE is: to the activations it reconstructs, and to the model that reads the reconstruction.

Row metrics (FVU, L0, ...) use every stored row of a split. Cross-entropy and KL use the first sequences of each block, up
to a token budget: clean, with the SAE spliced in, and with the site zero- and mean-ablated, the same tokens spliced and
scored, special tokens and padding out of both. Everything is kept as sums per group and divided once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from raysae.activations.store import Store
from raysae.artifacts import write_atomic, write_json
from raysae.data.tokens import MicroBatch, TokenBlock, micro_batches
from raysae.evaluate.statistics import bootstrap_totals, percentile_interval
from raysae.models import host as edits
from raysae.models.host import ModelHost
from raysae.sae.formats import load, load_tensors
from raysae.sae.metrics import SCALARS, RowSums
from raysae.sae.sae import SAE

ROWS_AT_ONCE = 8192
LOGITS_AT_ONCE = 1 << 26  # elements of [tokens, vocab] held at once: 256 MiB in float32
TOP_NORMS = 0.001
"""The share of rows, those with the largest ‖x‖, whose reconstruction is also reported apart."""
TOP_NORMS_KEPT = 0.01
"""The share of each block's rows that is kept for it: a block may have ten times its share of a split's largest."""
ROW_SUMS = ("rows", *SCALARS)
SCORE_SUMS = ("scored", "nll_clean", "nll_spliced", "nll_zero", "nll_mean", "kl_spliced", "kl_zero", "kl_mean")


@dataclass(frozen=True)
class Measurement:
    """What to measure: SAEs by id and directory, all at one site of one store; and how much to score with the model."""

    store: Path
    site: str
    saes: tuple[tuple[str, Path], ...]
    root: Path
    tokens_per_forward: int
    scored_fraction: float
    """Share of each block's sequences that is scored with the model."""

    def __call__(self, host: ModelHost, block: TokenBlock) -> dict[str, Any]:
        return measure_block(host, block, self)


def measure_block(host: ModelHost, block: TokenBlock, task: Measurement) -> dict[str, Any]:
    """Write the sums of one block below `task.root`: `<block>.parquet` by (sae_id, group), and `<block>.safetensors`.

    Facts last, in `<block>.json`: a block that has them is done.
    """
    store = Store(task.store)
    saes = [(sae_id, load(path).to(host.device)) for sae_id, path in task.saes]
    scores = _score(host, block, store, saes, task)
    frames: list[pd.DataFrame] = []
    vectors: dict[str, Tensor] = {}
    for sae_id, sae in saes:
        sums, by_group, top = row_sums(sae, store, task.site, block.name)
        frame = by_group.join(scores[sae_id], how="outer").fillna(0.0)
        frames.append(frame.rename_axis("group").reset_index().assign(sae_id=sae_id))
        vectors |= {f"{sae_id}.shifted": sums.shifted, f"{sae_id}.residual": sums.residual, f"{sae_id}.top": top}
        if sums.firings is not None:
            vectors[f"{sae_id}.firings"] = sums.firings
    task.root.mkdir(parents=True, exist_ok=True)
    table = pd.concat(frames, ignore_index=True)
    write_atomic(task.root / f"{block.name}.parquet", lambda path: table.to_parquet(path, index=False))
    write_atomic(task.root / f"{block.name}.safetensors", lambda path: save_file(vectors, path))
    facts = {"name": block.name, "rows": block.rows}
    write_json(task.root / f"{block.name}.json", facts)
    return facts


def done(root: Path, name: str) -> bool:
    """Whether the block of this name has been measured below `root`."""
    return (root / f"{name}.json").exists()


def row_sums(sae: SAE, store: Store, site: str, name: str) -> tuple[RowSums, pd.DataFrame, Tensor]:
    """Sums of an SAE over one shard's rows: in all, and by group (index group, columns ROW_SUMS).

    Third, of the rows with the largest norms, ‖x‖, ‖x - x̂‖² and ‖x - shift‖² [TOP_NORMS_KEPT · rows, 3].
    """
    x = store.shard(site, name)
    groups = store.row_columns(name, ("group",))["group"].to_pandas()
    codes, names = pd.factorize(groups, sort=True)
    device = next(iter(sae.parameters.values())).device
    sums = RowSums(store.mean(site))
    totals = {column: np.zeros(len(names)) for column in ROW_SUMS}
    totals["rows"] += np.bincount(codes, minlength=len(names))
    kept = math.ceil(TOP_NORMS_KEPT * x.shape[0])
    top = torch.empty(0, 3, dtype=torch.float64)
    for start in range(0, x.shape[0], ROWS_AT_ONCE):
        rows = x[start : start + ROWS_AT_ONCE].to(device, torch.float32)
        f = sae.encode(rows)
        terms = sums.add(rows, sae.decode(f), f)
        part = codes[start : start + ROWS_AT_ONCE]
        for column, values in terms.items():
            totals[column] += np.bincount(part, weights=values.cpu().numpy(), minlength=len(names))
        candidates = [rows.double().norm(dim=1), terms["squared_error"], terms["squared_shifted"]]
        top = _largest(torch.cat([top, torch.stack(candidates, 1).cpu()]), kept)
    return sums, pd.DataFrame(totals, index=pd.Index(names)), top


def _largest(rows: Tensor, count: int) -> Tensor:
    """The `count` rows with the largest first column."""
    return rows[rows[:, 0].argsort(descending=True, stable=True)[:count]]


def _score(
    host: ModelHost, block: TokenBlock, store: Store, saes: Sequence[tuple[str, SAE]], task: Measurement
) -> dict[str, pd.DataFrame]:
    """Per SAE, sums by group over scored tokens (index group, columns SCORE_SUMS).

    The SAEs share the clean pass and the ablations, and all passes with an edit start where the clean one reached the
    site. Several SAEs in one forward pass would save nothing more: a batch is as large as it may be already.
    """
    count = math.ceil(task.scored_fraction * len(block.input_ids))
    part = block.first(count)
    names = sorted(set(block.groups))
    number = {name: i for i, name in enumerate(names)}
    group_of = np.array([number[name] for name in block.groups])
    totals = {sae_id: {column: np.zeros(len(names)) for column in SCORE_SUMS} for sae_id, _ in saes}
    mean = store.mean(task.site).to(torch.float32)
    below = host.start_of(task.site)
    for batch in micro_batches(part, min(task.tokens_per_forward, max(1, LOGITS_AT_ONCE // host.facts.vocab_size))):
        pairs = batch.mask[:, :-1] & batch.mask[:, 1:]  # both the predicting and the predicted token are kept
        if not bool(pairs.any()):
            continue
        codes = group_of[_pair_examples(part, batch, pairs)]
        logits, start = host.run(batch.input_ids, batch.attention_mask, [below] if below else [])
        clean = _log_probabilities(logits, pairs)
        p = clean.exp()

        def add(
            ids: Sequence[str], name: str, log_q: Tensor, batch: MicroBatch = batch, pairs: Tensor = pairs,
            codes: np.ndarray = codes, clean: Tensor = clean, p: Tensor = p,
        ) -> None:  # fmt: skip
            target = batch.input_ids[:, 1:][pairs].to(log_q.device)
            values = {f"nll_{name}": -log_q.gather(1, target[:, None]).squeeze(1)}
            if name != "clean":
                values[f"kl_{name}"] = (p * (clean - log_q)).sum(1)
            for column, value in values.items():
                summed = np.bincount(codes, weights=value.double().cpu().numpy(), minlength=len(names))
                for sae_id in ids:
                    totals[sae_id][column] += summed

        everyone = [sae_id for sae_id, _ in saes]
        add(everyone, "clean", clean)
        for sae_id in everyone:
            totals[sae_id]["scored"] += np.bincount(codes, minlength=len(names))
        for name, edit in (("zero", edits.zero(batch.mask)), ("mean", edits.mean(mean, batch.mask))):
            logits = host.logits(batch.input_ids, batch.attention_mask, {task.site: edit}, start)
            add(everyone, name, _log_probabilities(logits, pairs))
        for sae_id, sae in saes:
            splice = {task.site: edits.splice(sae, batch.mask)}
            logits = host.logits(batch.input_ids, batch.attention_mask, splice, start)
            add([sae_id], "spliced", _log_probabilities(logits, pairs))
    return {sae_id: pd.DataFrame(columns, index=pd.Index(names)) for sae_id, columns in totals.items()}


def _pair_examples(block: TokenBlock, batch: MicroBatch, pairs: Tensor) -> np.ndarray:
    """Example index of each scored pair, in the order of a masked read."""
    chosen = pairs.numpy()
    return np.concatenate(
        [block.example[s][:-1][chosen[i, : len(block.example[s]) - 1]] for i, s in enumerate(batch.index)]
    )


def _log_probabilities(logits: Tensor, pairs: Tensor) -> Tensor:
    """Log-probabilities [pairs, vocab] of the next token, in float32, of logits [batch, pos, vocab]."""
    return logits[:, :-1][pairs.to(logits.device)].float().log_softmax(-1)


def collect(
    root: Path, names: Sequence[str], shift: Tensor, resamples: int, confidence: float, seed: int
) -> dict[str, dict[str, float]]:
    """Metrics by sae_id from the blocks' sums, with `<metric>_low`/`_high` for those that rank or gate.

    `shift` is the vector about which `squared_shifted` was taken (the store's mean). dense_fraction and
    never_fired_fraction have no interval: they would need each latent's firings by group.
    """
    vectors: dict[str, list[Tensor]] = {}
    for name in names:
        for key, value in load_tensors(root / f"{name}.safetensors").items():
            vectors.setdefault(key, []).append(value)
    found = {}
    for sae_id, by_group in group_sums(root, names).items():
        total = by_group.sum()
        sums = RowSums(shift, rows=int(total["rows"]))
        for column in SCALARS:
            setattr(sums, column, float(total[column]))
        for name in ("shifted", "residual", "firings"):
            setattr(sums, name, torch.stack(vectors[f"{sae_id}.{name}"]).sum(0))
        top = torch.cat(vectors[f"{sae_id}.top"])
        metrics = {**sums.metrics(), **_top_norms(sums, top), **_score_metrics(total)}
        metrics |= {"n_rows": sums.rows, "n_groups": len(by_group)}
        exact = sums.total_variance / sums.squared_shifted if sums.squared_shifted > 0 else float("nan")
        for name, values in resampled(by_group, exact, resamples, seed).items():
            low, high = percentile_interval(values.to_numpy(), confidence)
            metrics |= {f"{name}_low": low, f"{name}_high": high}
        found[sae_id] = metrics
    return found


def group_sums(root: Path, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """By sae_id: sums over the blocks (index group, columns ROW_SUMS and SCORE_SUMS)."""
    table = pd.concat([pd.read_parquet(root / f"{name}.parquet") for name in names])
    return {
        str(sae_id): rows.groupby("group", sort=True)[[*ROW_SUMS, *SCORE_SUMS]].sum()
        for sae_id, rows in table.groupby("sae_id", sort=False)
    }


def resampled(by_group: pd.DataFrame, exact: float, resamples: int, seed: int) -> pd.DataFrame:
    """Each metric of `_ranked` [resamples] over groups drawn with replacement, from an SAE's `group_sums`.

    exact: Σ‖x-μ‖² / Σ‖x-shift‖². The mean of the rows is taken as known in each resample; it moves FVU by far less than the
    groups do.
    """
    totals = pd.DataFrame(bootstrap_totals(by_group.to_numpy(), resamples, seed), columns=by_group.columns)
    return pd.DataFrame({name: statistic(totals) for name, statistic in _ranked(exact).items()})


def exact_share(by_group: pd.DataFrame, fvu: float) -> float:
    """Σ‖x-μ‖² / Σ‖x-shift‖² from an SAE's `group_sums` and its FVU, which is about μ; nan for an FVU of 0."""
    total = by_group.sum()
    shifted = fvu * total.squared_shifted
    return float(total.squared_error / shifted) if shifted > 0 else float("nan")


def _top_norms(sums: RowSums, top: Tensor) -> dict[str, float]:
    """The part of the TOP_NORMS of rows with the largest ‖x‖, which may carry most of the variance.

    `top` [n, 3] as of `row_sums`. Variance is about the mean of the store's training rows. Special tokens are in none of
    it: they never become rows of a store.
    """
    _, error, variance = _largest(top, math.ceil(TOP_NORMS * sums.rows)).sum(0).tolist()
    rest = sums.squared_shifted - variance
    return {
        "top_norms_variance": variance / sums.squared_shifted if sums.squared_shifted > 0 else float("nan"),
        "fvu_top_norms": error / variance if variance > 0 else float("nan"),
        "fvu_without_top_norms": (sums.squared_error - error) / rest if rest > 0 else float("nan"),
    }


def _score_metrics(total: pd.Series) -> dict[str, float]:
    """CE in nats per token; recovered = (CE_ablated - CE_spliced) / (CE_ablated - CE_clean), for zero and mean ablation."""
    n = total["scored"] or float("nan")
    clean, spliced, zero, mean = (total[f"nll_{name}"] / n for name in ("clean", "spliced", "zero", "mean"))
    return {
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_zero": zero,
        "ce_mean": mean,
        "ce_delta": spliced - clean,
        "ce_loss_recovered": (zero - spliced) / (zero - clean) if zero != clean else float("nan"),
        "ce_recovered_mean": (mean - spliced) / (mean - clean) if mean != clean else float("nan"),
        "kl": total["kl_spliced"] / n,
        "kl_zero": total["kl_zero"] / n,
        "kl_mean": total["kl_mean"] / n,
        "n_scored_tokens": int(total["scored"]),
    }


def _ranked(exact: float) -> dict[str, Callable[[pd.DataFrame], pd.Series]]:
    """Each metric that has an interval, as a function of totals (columns ROW_SUMS and SCORE_SUMS).

    `exact` is Σ‖x-μ‖² / Σ‖x-shift‖².
    """
    return {
        "fvu": lambda t: t.squared_error / (t.squared_shifted * exact),
        "explained_variance": lambda t: 1 - t.squared_error / (t.squared_shifted * exact),
        "l0": lambda t: t.active / t.rows,
        "l1": lambda t: t.l1 / t.rows,
        "l2_ratio": lambda t: t.l2_ratio / t.rows,
        "relative_reconstruction_bias": lambda t: t.squared_norm_hat / t.inner_product,
        "cosine": lambda t: t.cosine / t.rows,
        "ce_delta": lambda t: (t.nll_spliced - t.nll_clean) / t.scored,
        "ce_loss_recovered": lambda t: (t.nll_zero - t.nll_spliced) / (t.nll_zero - t.nll_clean),
        "ce_recovered_mean": lambda t: (t.nll_mean - t.nll_spliced) / (t.nll_mean - t.nll_clean),
        "kl": lambda t: t.kl_spliced / t.scored,
    }
