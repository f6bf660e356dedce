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
    found: dict[str, dict[str, Any]] = {}
    for sae_id in saes:
        exact = [exact_share(by[sae_id], place[2][sae_id]["fvu"]) for by, place in zip(sums, (home, away), strict=True)]
        found[sae_id] = {"n_rows": away[2][sae_id]["n_rows"], "n_groups": away[2][sae_id]["n_groups"]}
        for name in METRICS:
            here, there = (place[2][sae_id] for place in (home, away))
            ratio = low = high = math.nan
            if here[f"{name}_low"] > 0 or here[f"{name}_high"] < 0:
                ratio = there[name] / here[name]
                both = [by[sae_id][by[sae_id][counted_by(name)] > 0] for by in sums]
                of = [values_of([name], e, part.columns) for e, part in zip(exact, both, strict=True)]

                def values(totals: np.ndarray, of: Any = of, width: int = both[0].shape[1]) -> np.ndarray:
                    return of[1](totals[:, width:]) / of[0](totals[:, :width])

                found_ends = intervals([part.to_numpy() for part in both], values, bootstrap)
                low, high = float(found_ends.low[0]), float(found_ends.high[0])
            found[sae_id][name] = {
                "home": here[name], "home_low": here[f"{name}_low"], "home_high": here[f"{name}_high"],
                "away": there[name], "away_low": there[f"{name}_low"], "away_high": there[f"{name}_high"],
                "ratio": ratio, "ratio_low": low, "ratio_high": high,
            }  # fmt: skip
    return found


def over_seeds(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By metric: mean and standard deviation (n - 1) over the seeds of away and of the ratio; NaN for one seed, or where a
    seed has none."""
    return {
        name: {
            f"{kind}_{what}": float(
                getattr(pd.Series([entry[name][kind] for entry in found.values()]), how)(skipna=False)
            )
            for kind in ("away", "ratio")
            for what, how in (("mean", "mean"), ("sd", "std"))
        }
        for name in METRICS
    }
