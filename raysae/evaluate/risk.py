"""Domain coverage: the same SAE's fidelity in each part of the data, and how much worse the worst part is than the mean.

From the sums by group that the evaluation keeps, so without another pass over the data. A domain is a dataset, or a stratum
of difficulty; a group counts for the domain that all its examples are of.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from raysae.data.records import Problem
from raysae.evaluate.fidelity import SCORE_SUMS, group_sums
from raysae.evaluate.rows import ROW_SUMS
from raysae.evaluate.statistics import Bootstrap, intervals

AXES = ("dataset", "stratum")
MIXED = "mixed"
ENOUGH_GROUPS = 10
"""A domain with fewer groups is named and given, without an interval and not as the worst."""
PERMUTATIONS = 200
SUMS = [*ROW_SUMS, *SCORE_SUMS]


class Metric(NamedTuple):
    """A metric of a domain."""

    sums: list[str]
    """Those that it takes."""
    of: Callable[[pd.DataFrame], pd.Series]
    """From these sums (columns of a table)."""
    less_is_better: bool
    counted: str
    """The sum that counts what it rests on: groups in which it is 0 say nothing."""
    gap: Callable[[pd.DataFrame], pd.Series] | None = None
    """What it is a share of: a domain in which this is not clearly above 0 has no such metric."""

    def of_totals(self, totals: np.ndarray) -> np.ndarray:
        """From totals [n, sums]."""
        return self.of(pd.DataFrame(totals, columns=self.sums)).to_numpy()

    def interval(
        self, part: pd.DataFrame, of: Callable[[pd.DataFrame], pd.Series], bootstrap: Bootstrap
    ) -> tuple[float, float]:
        """The ends of `of` over the groups of a domain."""
        sums = part[self.sums].to_numpy()
        ends = intervals(sums, lambda t: of(pd.DataFrame(t, columns=self.sums)).to_numpy(), bootstrap)
        return float(ends.low[0]), float(ends.high[0])


METRICS = {
    "fvu": Metric(["squared_error", "squared_shifted"], lambda t: t.squared_error / t.squared_shifted, True, "rows"),
    "l0": Metric(["active", "rows"], lambda t: t.active / t.rows, True, "rows"),
    "ce_loss_recovered": Metric(
        ["nll_zero", "nll_spliced", "nll_clean", "scored"],
        lambda t: (t.nll_zero - t.nll_spliced) / (t.nll_zero - t.nll_clean), False, "scored",
        gap=lambda t: (t.nll_zero - t.nll_clean) / t.scored,
    ),
}  # fmt: skip
"""FVU of a domain is about the mean of the training rows: its own is not kept, and about that FVU would be higher."""


def domains_of(problems: Sequence[Problem]) -> dict[str, dict[str, str]]:
    """By axis: the domain of each group; MIXED where its examples are of several. Axes of a single domain are left out."""
    found = {}
    for axis in AXES:
        of: dict[str, set[str]] = defaultdict(set)
        for p in problems:
            of[p.group].add(getattr(p, axis))
        if len(set.union(*of.values())) > 1:
            found[axis] = {group: next(iter(names)) if len(names) == 1 else MIXED for group, names in of.items()}
    return found


def coverage(
    roots: Sequence[Path], names: Sequence[str], problems: Sequence[Problem], bootstrap: Bootstrap
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Metrics by domain, and the worst domain by SAE.

    roots: the evaluation's folders, one per site.

    First, a row per sae_id, axis and domain: METRICS with intervals by group, n_rows, n_scored_tokens, n_groups, and
    n_scored_groups, on which CE rests. A metric has an interval where enough groups are behind it. Second, `axes` (domains
    by axis), `enough_groups`, and `worst`, by sae_id, axis and metric: of the domains with enough groups the worst, its
    `ratio` to their mean with its interval, and `null_95`, the 95th percentile of that ratio when groups are dealt to the
    domains at random, for even equal domains have a worst (of a metric of which more is better: the 5th).
    """
    axes = domains_of(problems)
    rows, worst = [], defaultdict[str, dict[str, Any]](dict)
    for root in roots:
        for sae_id, by_group in group_sums(root, names).items():
            if sae_id.startswith("control-"):
                continue
            for axis, domain_of in axes.items():
                domain = by_group.index.map(domain_of).to_numpy()
                parts = {name: by_group.loc[domain == name, SUMS] for name in sorted({*domain})}
                table = {name: _row(part) for name, part in parts.items()}
                worst[sae_id][axis] = {}
                for metric, m in METRICS.items():
                    behind = {name: part[part[m.counted] > 0] for name, part in parts.items()}
                    behind = {name: part for name, part in behind.items() if len(part) >= ENOUGH_GROUPS}
                    if m.gap is not None:
                        for name, part in parts.items():
                            few = name not in behind  # where there is no interval, the value must do
                            one = part.sum().to_frame().T
                            least = m.gap(one)[0] if few else m.interval(behind[name], m.gap, bootstrap)[0]
                            if not least > 0:
                                table[name][metric] = np.nan
                                behind.pop(name, None)
                    for name, row in table.items():
                        low = high = math.nan
                        if name in behind:
                            low, high = m.interval(behind[name], m.of, bootstrap)
                        row |= {f"{metric}_low": low, f"{metric}_high": high}
                    judged = [name for name in behind if name != MIXED]
                    if len({table[name][metric] for name in judged}) > 1:
                        worst[sae_id][axis][metric] = _worst(m, {n: behind[n] for n in judged}, bootstrap)
                rows += [{"sae_id": sae_id, "axis": axis, "domain": name, **row} for name, row in table.items()]
    facts = {
        "axes": {axis: sorted({*of.values()}) for axis, of in axes.items()},
        "enough_groups": ENOUGH_GROUPS,
        "worst": dict(worst),
    }
    return pd.DataFrame(rows), facts


def _row(part: pd.DataFrame) -> dict[str, Any]:
    total = part.sum()
    found = {
        "n_groups": len(part), "n_scored_groups": int((part["scored"] > 0).sum()), "n_rows": int(total.rows),
        "n_scored_tokens": int(total.scored),
    }  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        return {**found, **{name: float(m.of(total)) for name, m in METRICS.items()}}


def _worst(m: Metric, parts: Mapping[str, pd.DataFrame], bootstrap: Bootstrap) -> dict[str, Any]:
    """The worst of the domains in a metric, its ratio to their mean with its interval, and what chance makes of it."""
    values = m.of(pd.DataFrame({name: part.sum() for name, part in parts.items()}).T)
    at = str(values.idxmax() if m.less_is_better else values.idxmin())
    which = list(parts).index(at)

    def ratio(totals: np.ndarray) -> np.ndarray:
        each = m.of_totals(totals.reshape(-1, len(m.sums))).reshape(-1, len(parts))
        return each[:, which] / each.mean(1)

    ends = intervals([part[m.sums].to_numpy() for part in parts.values()], ratio, bootstrap)

    every = np.concatenate([part.to_numpy() for part in parts.values()])
    starts = np.cumsum([0, *(len(part) for part in parts.values())])
    rng = np.random.default_rng(bootstrap.seed)
    dealt = [np.add.reduceat(every[rng.permutation(len(every))], starts[:-1]) for _ in range(PERMUTATIONS)]
    chance = m.of(pd.DataFrame(np.concatenate(dealt), columns=SUMS)).to_numpy().reshape(PERMUTATIONS, -1)
    of_worst = chance.max(1) if m.less_is_better else chance.min(1)
    return {
        "domain": at, "value": float(values[at]), "mean": float(values.mean()),
        "ratio": float(values[at] / values.mean()), "ratio_low": float(ends.low[0]), "ratio_high": float(ends.high[0]),
        "null_95": float(np.percentile(of_worst / chance.mean(1), 95 if m.less_is_better else 5)),
    }  # fmt: skip
