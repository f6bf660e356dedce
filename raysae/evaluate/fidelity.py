"""How faithful an SAE is: to the activations it reconstructs, and to the model that reads the reconstruction.

Row metrics (FVU, L0, ...) use every stored row of a split. Cross-entropy and KL use the first sequences of each block, up
to a token budget: clean, with the SAE spliced in, and with the site zero- and mean-ablated, the same tokens spliced and
scored, special tokens and padding out of both. Everything is kept as sums per group and divided once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from raysae.activations.store import Store
from raysae.data.tokens import MicroBatch, TokenBlock, micro_batches
from raysae.evaluate.rows import ROW_SUMS, count, row_sums, write_sums
from raysae.evaluate.rows import done as done
from raysae.evaluate.statistics import Bootstrap, effective_groups, intervals
from raysae.models import host as edits
from raysae.models.host import ModelHost
from raysae.sae.formats import load, load_tensors
from raysae.sae.metrics import SCALARS, RowSums
from raysae.sae.sae import SAE

LOGITS_AT_ONCE = 1 << 26  # elements of [tokens, vocab] held at once: 256 MiB in float32
RECOVERED = {"ce_loss_recovered": "ce_zero_gap", "ce_recovered_mean": "ce_mean_gap"}
"""Shares of a loss, and the loss: they are nan unless its whole interval is above 0."""
SPLICED = ("nll_spliced", "kl_spliced")
SCORE_SUMS = ("scored", "nll_clean", "nll_spliced", "nll_zero", "nll_mean", "kl_spliced", "kl_zero", "kl_mean")
OF_ROWS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "fvu": lambda t: t.squared_error / t.squared_shifted,
    "explained_variance": lambda t: 1 - t.squared_error / t.squared_shifted,
    "l0": lambda t: t.active / t.rows,
    "l1": lambda t: t.l1 / t.rows,
    "l2_ratio": lambda t: t.l2_ratio / t.rows,
    "relative_reconstruction_bias": lambda t: t.squared_norm_hat / t.inner_product,
    "cosine": lambda t: t.cosine / t.rows,
    "fvu_without_top_norms": lambda t: t.usual_error / t.usual_shifted,
}
"""Metrics with an interval that rest on the rows' groups, from totals (columns ROW_SUMS and SCORE_SUMS)."""
OF_SCORES: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "ce_delta": lambda t: (t.nll_spliced - t.nll_clean) / t.scored,
    "ce_zero_gap": lambda t: (t.nll_zero - t.nll_clean) / t.scored,
    "ce_mean_gap": lambda t: (t.nll_mean - t.nll_clean) / t.scored,
    "ce_loss_recovered": lambda t: (t.nll_zero - t.nll_spliced) / (t.nll_zero - t.nll_clean),
    "ce_recovered_mean": lambda t: (t.nll_mean - t.nll_spliced) / (t.nll_mean - t.nll_clean),
    "kl": lambda t: t.kl_spliced / t.scored,
}
"""Those that rest on the scored tokens' groups."""
RANKED = OF_ROWS | OF_SCORES


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
    """Write the sums of one block below `task.root`: those of its rows, and by group those of its scored tokens."""
    store = Store(task.store)
    saes = {sae_id: load(path).to(host.device) for sae_id, path in task.saes}
    scores = _score(host, block, store, saes, task)
    sums = row_sums(saes, store, task.site, block.name)
    scored = {i: (of_rows, by.join(scores[i], how="outer").fillna(0.0)) for i, (of_rows, by) in sums.items()}
    return write_sums(task.root, block.name, block.rows, scored)


def _score(
    host: ModelHost, block: TokenBlock, store: Store, saes: Mapping[str, SAE], task: Measurement
) -> dict[str, pd.DataFrame]:
    """By sae_id: sums by group over scored tokens (index group, columns SCORE_SUMS).

    The SAEs share the clean pass and the ablations, and all passes with an edit start where the clean one reached the
    site. Several SAEs in one forward pass would save nothing more: a batch is as large as it may be already.
    """
    part = block.first(math.ceil(task.scored_fraction * len(block.input_ids)))
    names, of_example = np.unique(block.groups, return_inverse=True)
    shared = {column: np.zeros(len(names)) for column in SCORE_SUMS if column not in SPLICED}
    own = {sae_id: {column: np.zeros(len(names)) for column in SPLICED} for sae_id in saes}
    mean = store.mean(task.site).to(torch.float32)
    below = host.start_of(task.site)
    for batch in micro_batches(part, min(task.tokens_per_forward, max(1, LOGITS_AT_ONCE // host.facts.vocab_size))):
        pairs = batch.mask[:, :-1] & batch.mask[:, 1:]  # both the predicting and the predicted token are kept
        if not bool(pairs.any()):
            continue
        codes = of_example[_pair_examples(part, batch, pairs)]
        logits, start = host.run(batch.input_ids, batch.attention_mask, [below] if below else [])
        clean = _Clean(logits, pairs, batch.input_ids[:, 1:][pairs])
        run = partial(host.logits, batch.input_ids, batch.attention_mask, start=start)
        count(shared, {"scored": torch.ones(len(codes)), "nll_clean": clean.nll}, codes)
        for name, edit in (("zero", edits.zero(batch.mask)), ("mean", edits.mean(mean, batch.mask))):
            count(shared, clean.compare(name, run({task.site: edit})), codes)
        for sae_id, sae in saes.items():
            splice = edits.splice(sae, batch.mask)
            count(own[sae_id], clean.compare("spliced", run({task.site: splice})), codes)
    return {sae_id: pd.DataFrame({**shared, **own[sae_id]}, index=pd.Index(names)) for sae_id in saes}


class _Clean:
    """The scored tokens [n] of a batch as the unedited model predicts them. `logits` [batch, pos, vocab]."""

    def __init__(self, logits: Tensor, pairs: Tensor, target: Tensor) -> None:
        self._pairs = torch.nn.functional.pad(pairs, (0, 1)).flatten().nonzero().squeeze(1).to(logits.device)
        self._target = target.to(logits.device)[:, None]
        self._log_p = self._of(logits)
        self._p = self._log_p.exp()
        self.nll = self._nll(self._log_p)

    def compare(self, name: str, logits: Tensor) -> dict[str, Tensor]:
        """nll_<name> and KL(clean ‖ these) as kl_<name> [n], in nats, of an edited pass."""
        log_q = self._of(logits)
        nll = self._nll(log_q)
        # In place: to ask for [n, vocab] of new memory takes as long as to fill it.
        return {f"nll_{name}": nll, f"kl_{name}": -log_q.sub_(self._log_p).mul_(self._p).sum(1)}

    def _of(self, logits: Tensor) -> Tensor:
        """Log-probabilities [n, vocab] of the next token, in float32."""
        return logits.flatten(0, 1).index_select(0, self._pairs).float().log_softmax(-1)

    def _nll(self, log_p: Tensor) -> Tensor:
        return -log_p.gather(1, self._target).squeeze(1)


def _pair_examples(block: TokenBlock, batch: MicroBatch, pairs: Tensor) -> np.ndarray:
    """Example index of each scored pair, in the order of a masked read."""
    chosen = pairs.numpy()
    return np.concatenate(
        [block.example[s][:-1][chosen[i, : len(block.example[s]) - 1]] for i, s in enumerate(batch.index)]
    )


def collect(root: Path, names: Sequence[str], shift: Tensor, bootstrap: Bootstrap) -> dict[str, dict[str, float]]:
    """Metrics by sae_id from the blocks' sums, with `<metric>_low`/`_high` for those that rank or gate.

    `shift` is the vector about which `squared_shifted` was taken (the store's mean). dense_fraction, never_fired_fraction
    and effective_latents have no interval: they would need each latent's firings by group. Shares of a loss (RECOVERED)
    are nan where the loss is not clearly one.
    """
    vectors: dict[str, list[Tensor]] = {}
    for name in names:
        for key, value in load_tensors(root / f"{name}.safetensors").items():
            vectors.setdefault(key, []).append(value)
    by_sae = {}
    for sae_id, by_group in group_sums(root, names).items():
        total = by_group.sum()
        sums = RowSums(shift, rows=int(total["rows"]))
        for column in SCALARS:
            setattr(sums, column, float(total[column]))
        for name in ("shifted", "residual", "firings"):
            setattr(sums, name, torch.stack(vectors[f"{sae_id}.{name}"]).sum(0))
        metrics = {**sums.metrics(), **_top_norms(total), **(_score_metrics(total) if "scored" in total else {})}
        metrics |= {"effective_latents": effective_latents(sums.firings), "n_rows": sums.rows}
        exact = sums.total_variance / sums.squared_shifted if sums.squared_shifted > 0 else float("nan")
        metrics |= _by_group(by_group, exact, bootstrap)
        for recovered, gap in RECOVERED.items():
            if recovered in metrics and not metrics[f"{gap}_low"] > 0:
                metrics |= dict.fromkeys((recovered, f"{recovered}_low", f"{recovered}_high"), math.nan)
        by_sae[sae_id] = metrics
    return by_sae


def effective_latents(firings: Tensor | None) -> float:
    """How many latents that fire equally often would be as concentrated as these [d_sae] counts: (Σ n)² / Σ n², the inverse
    participation ratio. Dead latents add nothing to it, and rare ones next to nothing, however many. L0 over it is the
    share of rows on which the latent behind an average firing is on."""
    counts = (torch.zeros(1) if firings is None else firings).double()
    return float(counts.sum().square() / counts.square().sum().clamp_min(1e-30))


def group_sums(
    root: Path, names: Sequence[str], columns: Sequence[str] = (*ROW_SUMS, *SCORE_SUMS)
) -> dict[str, pd.DataFrame]:
    """By sae_id: sums over the blocks (index group, those of these columns that were summed: SCORE_SUMS need a model)."""
    table = pd.concat([pd.read_parquet(root / f"{name}.parquet") for name in names])
    summed = [name for name in columns if name in table]
    return {
        str(sae_id): rows.groupby("group", sort=True)[summed].sum()
        for sae_id, rows in table.groupby("sae_id", sort=False)
    }


def _by_group(by_group: pd.DataFrame, exact: float, bootstrap: Bootstrap) -> dict[str, float]:
    """How many groups row metrics and those of the model rest on, as how many of equal size these count, and the ends of
    the intervals over them, from an SAE's `group_sums`; exact as in `values_of`."""
    counts: dict[str, float] = {}
    ends: dict[str, float] = {}
    for counted, groups, names in (("rows", "groups", OF_ROWS), ("scored", "scored_groups", OF_SCORES)):
        if counted not in by_group:  # no model scored
            continue
        behind = by_group[by_group[counted] > 0]
        counts |= {f"n_{groups}": len(behind), f"effective_{groups}": effective_groups(behind[counted].to_numpy())}
        of_names = intervals(behind.to_numpy(), values_of([*names], exact, by_group.columns), bootstrap)
        for name, low, high in zip(names, of_names.low, of_names.high, strict=True):
            ends |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return counts | ends


def counted_by(name: str) -> str:
    """The sum that counts what a metric of RANKED rests on: groups in which it is 0 say nothing of it."""
    return "scored" if name in OF_SCORES else "rows"


def values_of(names: Sequence[str], exact: float, columns: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
    """Metrics [n, names] of RANKED as a function of totals [n, columns].

    `exact` is Σ‖x-μ‖² / Σ‖x-shift‖². The mean of the rows is taken as known in each resample; it moves FVU by far less
    than the groups do.
    """

    def values(totals: np.ndarray) -> np.ndarray:
        frame = pd.DataFrame(totals, columns=columns)
        if "squared_shifted" in frame:
            frame = frame.assign(squared_shifted=frame.squared_shifted * exact)
        return np.stack([RANKED[name](frame) for name in names], axis=1)

    return values


@dataclass(frozen=True)
class Paired:
    """SAEs that were measured on the same groups, so that the interval of a difference of any two is paired."""

    sums: Mapping[str, pd.DataFrame]
    """`group_sums` by sae_id."""
    exact: Mapping[str, float]
    """Σ‖x-μ‖² / Σ‖x-shift‖² of the rows of each."""
    bootstrap: Bootstrap

    @classmethod
    def read(
        cls, roots: Sequence[Path], names: Sequence[str], metrics: Mapping[str, Mapping[str, float]],
        bootstrap: Bootstrap,
    ) -> Paired:  # fmt: skip
        """From the blocks' sums below `roots`, of the SAEs in `metrics` (by sae_id, with their fvu)."""
        sums = {i: by for root in roots for i, by in group_sums(root, names).items() if i in metrics}
        exact = {i: exact_share(by, metrics[i]["fvu"]) for i, by in sums.items()}
        return cls(sums, exact, bootstrap)

    def difference(
        self, a: str, b: str, score: Callable[[pd.DataFrame], pd.Series]
    ) -> tuple[float, float, float] | None:
        """score(a) - score(b) with its interval; None where one of them has no such sums, or they are of other groups.

        score: a number from a table of the metrics with an interval, such as `lambda m: m.fvu` or `lambda m: np.log(m.l0)`.
        """
        if a not in self.sums or b not in self.sums or not self.sums[a].index.equals(self.sums[b].index):
            return None
        both = [self.sums[i].to_numpy() for i in (a, b)]
        names = [name for name in RANKED if counted_by(name) in self.sums[a]]
        metrics = [values_of(names, self.exact[i], self.sums[i].columns) for i in (a, b)]

        def values(totals: np.ndarray) -> np.ndarray:
            halves = np.split(totals, [both[0].shape[1]], axis=1)
            one, other = (score(pd.DataFrame(m(t), columns=names)) for m, t in zip(metrics, halves, strict=True))
            return (one - other).to_numpy()

        ends = intervals(np.concatenate(both, axis=1), values, self.bootstrap)
        value, low, high = (float(part[0]) for part in ends)
        return (value, low, high) if np.isfinite([value, low, high]).all() else None


def exact_share(by_group: pd.DataFrame, fvu: float) -> float:
    """Σ‖x-μ‖² / Σ‖x-shift‖² from an SAE's `group_sums` and its FVU, which is about μ; nan for an FVU of 0."""
    total = by_group.sum()
    shifted = fvu * total.squared_shifted
    return float(total.squared_error / shifted) if shifted > 0 else float("nan")


def _top_norms(total: pd.Series) -> dict[str, float]:
    """FVU with and without the rows of outlying norm, which may carry most of the variance, and what share they are of it.

    total: sums of ROW_SUMS. Variance is about the mean of the training rows, without them about that of the others.
    Special tokens are in none of it: they never become rows of a store.
    """
    n, rest = total["rows"] - total["usual"], total["squared_shifted"] - total["usual_shifted"]
    error = total["squared_error"] - total["usual_error"]
    return {
        "top_norms_rows": n / total["rows"] if total["rows"] > 0 else float("nan"),
        "top_norms_variance": rest / total["squared_shifted"] if n > 0 else 0.0,
        "fvu_top_norms": error / rest if n > 0 and rest > 0 else float("nan"),
        "fvu_without_top_norms": total["usual_error"] / total["usual_shifted"]
        if total["usual_shifted"] > 0
        else float("nan"),
    }


def _score_metrics(total: pd.Series) -> dict[str, float]:
    """CE in nats per token; recovered = (CE_ablated - CE_spliced) / (CE_ablated - CE_clean), for zero and mean ablation.

    ce_zero_gap, ce_mean_gap: CE_ablated - CE_clean. Where the model loses nothing by the ablation there is nothing to
    recover, and the ratio means nothing, whatever its sign.
    """
    n = total["scored"] or float("nan")
    clean, spliced, zero, mean = (total[f"nll_{name}"] / n for name in ("clean", "spliced", "zero", "mean"))
    return {
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_zero": zero,
        "ce_mean": mean,
        "ce_delta": spliced - clean,
        "ce_zero_gap": zero - clean,
        "ce_mean_gap": mean - clean,
        "ce_loss_recovered": (zero - spliced) / (zero - clean) if zero != clean else float("nan"),
        "ce_recovered_mean": (mean - spliced) / (mean - clean) if mean != clean else float("nan"),
        "kl": total["kl_spliced"] / n,
        "kl_zero": total["kl_zero"] / n,
        "kl_mean": total["kl_mean"] / n,
        "n_scored_tokens": int(total["scored"]),
    }
