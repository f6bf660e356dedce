"""Domain coverage: the same SAE's fidelity in each part of the data, and how much worse the worst part is than the mean.

From the sums by group that the evaluation keeps, so without another pass over the data. A domain is a dataset, or a stratum
of difficulty; a group counts for the domain that all its examples are of.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raysae.data.records import Problem
from raysae.evaluate.fidelity import RANKED, RECOVERED, SCORE_SUMS, counted_by, group_sums, values_of
from raysae.evaluate.rows import ROW_SUMS
from raysae.evaluate.statistics import Bootstrap, intervals

AXES = ("dataset", "stratum")
MIXED = "mixed"
ENOUGH_GROUPS = 10
"""A domain with fewer groups is named and given, without an interval and not as the worst."""
PERMUTATIONS = 200
SUMS = [*ROW_SUMS, *SCORE_SUMS]


METRICS = {
    "fvu": ["squared_error", "squared_shifted"],
    "l0": ["active", "rows"],
    "ce_loss_recovered": ["nll_zero", "nll_spliced", "nll_clean", "scored"],
}
"""Those of `fidelity.RANKED` that a domain has, and the sums that each takes. FVU of a domain is about the mean of the
training rows: its own is not kept, and about that FVU would be higher."""
MORE_IS_BETTER = {"ce_loss_recovered"}


def domains_of(problems: Sequence[Problem]) -> dict[str, dict[str, str]]:
    """By axis: the domain of each group; MIXED where its examples are of several. Axes of a single domain are left out."""
    axes = {}
    for axis in AXES:
        names_of: dict[str, set[str]] = defaultdict(set)
        for p in problems:
            names_of[p.group].add(getattr(p, axis))
        if len(set.union(*names_of.values())) > 1:
            axes[axis] = {group: next(iter(names)) if len(names) == 1 else MIXED for group, names in names_of.items()}
    return axes


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
                judged = {metric: _judge(metric, parts, table, bootstrap) for metric in METRICS}
                worst[sae_id][axis] = {metric: facts for metric, facts in judged.items() if facts}
                rows += [{"sae_id": sae_id, "axis": axis, "domain": name, **row} for name, row in table.items()]
    facts = {
        "axes": {axis: sorted({*domain_of.values()}) for axis, domain_of in axes.items()},
        "enough_groups": ENOUGH_GROUPS,
        "worst": dict(worst),
    }
    return pd.DataFrame(rows), facts


def _row(part: pd.DataFrame) -> dict[str, Any]:
    """A domain's counts and metrics, from its groups' sums."""
    total = part.sum()
    counts = {
        "n_groups": len(part), "n_scored_groups": int((part["scored"] > 0).sum()), "n_rows": int(total.rows),
        "n_scored_tokens": int(total.scored),
    }  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        return {**counts, **{name: float(RANKED[name](total)) for name in METRICS}}


def _judge(
    metric: str, parts: Mapping[str, pd.DataFrame], table: Mapping[str, dict[str, Any]], bootstrap: Bootstrap
) -> dict[str, Any] | None:
    """Give the rows of `table`, by domain, the ends of a metric; `_worst` of the domains, None where they do not differ.

    A share of a loss is no metric of a domain where the loss is not clearly one.
    """
    behind = {name: part[part[counted_by(metric)] > 0] for name, part in parts.items()}
    behind = {name: part for name, part in behind.items() if len(part) >= ENOUGH_GROUPS}
    if metric in RECOVERED:
        gap = RECOVERED[metric]
        for name, part in parts.items():
            if name in behind:
                least = _ends(gap, METRICS[metric], behind[name], bootstrap)[0]
            else:  # where there is no interval, the value must do
                least = RANKED[gap](part.sum().to_frame().T)[0]
            if not least > 0:
                table[name][metric] = np.nan
                behind.pop(name, None)
    for name, row in table.items():
        low, high = _ends(metric, METRICS[metric], behind[name], bootstrap) if name in behind else (math.nan, math.nan)
        row |= {f"{metric}_low": low, f"{metric}_high": high}
    judged = {name: part for name, part in behind.items() if name != MIXED}
    differ = len({table[name][metric] for name in judged}) > 1
    return _worst(metric, judged, bootstrap) if differ else None


def _ends(metric: str, sums: list[str], part: pd.DataFrame, bootstrap: Bootstrap) -> tuple[float, float]:
    """The interval of a metric of these sums over the groups of a domain."""
    ends = intervals(part[sums].to_numpy(), values_of([metric], 1.0, sums), bootstrap)
    return float(ends.low[0]), float(ends.high[0])


def _worst(metric: str, parts: Mapping[str, pd.DataFrame], bootstrap: Bootstrap) -> dict[str, Any]:
    """The worst of the domains in a metric, its ratio to their mean with its interval, and what chance makes of it."""
    sums, less_is_better = METRICS[metric], metric not in MORE_IS_BETTER
    values = RANKED[metric](pd.DataFrame({name: part.sum() for name, part in parts.items()}).T)
    at = str(values.idxmax() if less_is_better else values.idxmin())
    which, of_totals = list(parts).index(at), values_of([metric], 1.0, sums)

    def ratio(totals: np.ndarray) -> np.ndarray:
        each = of_totals(totals.reshape(-1, len(sums))).reshape(-1, len(parts))
        return each[:, which] / each.mean(1)

    ends = intervals([part[sums].to_numpy() for part in parts.values()], ratio, bootstrap)

    every = np.concatenate([part.to_numpy() for part in parts.values()])
    starts = np.cumsum([0, *(len(part) for part in parts.values())])
    rng = np.random.default_rng(bootstrap.seed)
    dealt = [np.add.reduceat(every[rng.permutation(len(every))], starts[:-1]) for _ in range(PERMUTATIONS)]
    chance = values_of([metric], 1.0, SUMS)(np.concatenate(dealt)).reshape(PERMUTATIONS, -1)
    of_worst = chance.max(1) if less_is_better else chance.min(1)
    return {
        "domain": at, "value": float(values[at]), "mean": float(values.mean()),
        "ratio": float(values[at] / values.mean()), "ratio_low": float(ends.low[0]), "ratio_high": float(ends.high[0]),
        "null_95": float(np.percentile(of_worst / chance.mean(1), 95 if less_is_better else 5)),
    }  # fmt: skip
