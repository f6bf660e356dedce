"""Transfer: the fidelity of an SAE, and of its seeds, on a dataset that it was not trained on, against that at home.

The other dataset goes through the same model, site and code (`fidelity`). All of it is held out. Its own mean, not that of
the training rows, is what FVU is about there and what mean ablation puts in: a mean that moved adds no variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raysae.evaluate.fidelity import counted_by, exact_share, group_sums, values_of
from raysae.evaluate.statistics import Bootstrap, intervals

METRICS = ("fvu", "l0", "ce_loss_recovered", "ce_delta", "kl")


def compare(
    saes: Sequence[str], home: tuple[Path, Sequence[str], Mapping[str, Any]],
    away: tuple[Path, Sequence[str], Mapping[str, Any]], bootstrap: Bootstrap,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """By sae_id: METRICS at home and away with their intervals, and away / home with its.

    home, away: the evaluation's folder of the site, its blocks' names, and its metrics by sae_id. The two datasets' groups
    are drawn independently of each other, and in each alike for all SAEs. There is no ratio (NaN) to a metric whose
    interval at home holds 0.
    """
    sums = [group_sums(root, names) for root, names, _ in (home, away)]
    by_sae: dict[str, dict[str, Any]] = {}
    for sae_id in saes:
        at_home, elsewhere = metrics = [of_place[sae_id] for _, _, of_place in (home, away)]
        exact = [exact_share(by[sae_id], of_place["fvu"]) for by, of_place in zip(sums, metrics, strict=True)]
        by_sae[sae_id] = {key: elsewhere[key] for key in ("n_rows", "n_groups")}
        for name in METRICS:
            ratio = low = high = math.nan
            if at_home[f"{name}_low"] > 0 or at_home[f"{name}_high"] < 0:
                ratio = elsewhere[name] / at_home[name]
                parts = [by[sae_id][by[sae_id][counted_by(name)] > 0] for by in sums]
                metric = [values_of([name], e, part.columns) for e, part in zip(exact, parts, strict=True)]

                def ratios(totals: np.ndarray, metric: Any = metric, width: int = parts[0].shape[1]) -> np.ndarray:
                    return metric[1](totals[:, width:]) / metric[0](totals[:, :width])

                ends = intervals([part.to_numpy() for part in parts], ratios, bootstrap)
                low, high = float(ends.low[0]), float(ends.high[0])
            by_sae[sae_id][name] = {
                f"{place}{end}": values[f"{name}{end}"]
                for place, values in (("home", at_home), ("away", elsewhere))
                for end in ("", "_low", "_high")
            } | {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    return by_sae


def over_seeds(by_sae: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By metric: mean and standard deviation (n - 1) over the seeds of away and of the ratio; NaN for one seed, or where a
    seed has none."""
    return {
        name: {
            f"{kind}_{what}": float(
                getattr(pd.Series([entry[name][kind] for entry in by_sae.values()]), how)(skipna=False)
            )
            for kind in ("away", "ratio")
            for what, how in (("mean", "mean"), ("sd", "std"))
        }
        for name in METRICS
    }
