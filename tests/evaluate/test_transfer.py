"""Ratios between two datasets, from sums whose answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from raysae.evaluate import transfer
from raysae.evaluate.fidelity import SCORE_SUMS
from raysae.evaluate.rows import ROW_SUMS
from raysae.evaluate.statistics import Bootstrap


def place(root, error, delta, seed, groups=80, shifted=200.0):
    """A dataset on which FVU is about `error`; a group's variance is 100 about the mean, `shifted` about the store's."""
    rng = np.random.default_rng(seed)
    root.mkdir()
    rows, metrics = [], {}
    for sae_id, factor in (("one", 1.0), ("two", 1.1)):
        sums = {name: np.full(groups, 1.0) for name in (*ROW_SUMS, *SCORE_SUMS)}
        sums |= {
            "rows": np.full(groups, 10.0),
            "scored": np.full(groups, 9.0),
            "squared_shifted": np.full(groups, shifted),
        }
        sums["squared_error"] = factor * error * 100 * rng.uniform(0.8, 1.2, groups)
        sums |= {"nll_clean": np.full(groups, 9.0), "nll_zero": np.full(groups, 40.0)}
        sums["nll_spliced"] = 9 + 9 * delta * rng.normal(1, 0.5, groups)
        rows.append(pd.DataFrame(sums).assign(sae_id=sae_id, group=[f"g{i}" for i in range(groups)]))
        fvu = sums["squared_error"].sum() / (100 * groups)
        metrics[sae_id] = {"fvu": fvu, "l0": 0.1, "kl": 1 / 9, "n_rows": 10 * groups, "n_groups": groups}
        ce_delta = (sums["nll_spliced"] - 9).sum() / (9 * groups)
        metrics[sae_id] |= {"ce_delta": ce_delta, "ce_loss_recovered": 1 - ce_delta * 9 / 31}
        spread = 0.4 if delta < 0.01 else 0.1 * abs(ce_delta)
        for name in transfer.METRICS:
            half = spread if name == "ce_delta" else 0.01 * metrics[sae_id][name]
            metrics[sae_id] |= {
                f"{name}_low": metrics[sae_id][name] - half,
                f"{name}_high": metrics[sae_id][name] + half,
            }
    pd.concat(rows).to_parquet(root / "block.parquet")
    return root, ["block"], metrics


def test_the_ratio_and_its_interval(tmp_path):
    home, away = place(tmp_path / "home", 0.1, 0.2, 0), place(tmp_path / "away", 0.15, 0.2, 1, shifted=400.0)
    found = transfer.compare(["one"], home, away, Bootstrap(500, 0.95, 0))["one"]
    fvu = found["fvu"]
    assert fvu["ratio"] == pytest.approx(away[2]["one"]["fvu"] / home[2]["one"]["fvu"])
    assert fvu["ratio_low"] < fvu["ratio"] < fvu["ratio_high"]
    # both datasets vary: the relative variance of a ratio is the sum of theirs (0.4 / √12 relative per group, 80 groups)
    expected = 2 * 1.96 * fvu["ratio"] * np.sqrt(2) * 0.4 / np.sqrt(12) / np.sqrt(80)
    assert fvu["ratio_high"] - fvu["ratio_low"] == pytest.approx(expected, rel=0.25)
    assert found["n_rows"] == 800 and (fvu["home"], fvu["away"]) == (home[2]["one"]["fvu"], away[2]["one"]["fvu"])


def test_the_datasets_are_drawn_independently(tmp_path):
    """Even equal ones: a ratio of two samples is not known to be 1."""
    home = place(tmp_path / "home", 0.1, 0.2, 0)
    fvu = transfer.compare(["one"], home, home, Bootstrap(500, 0.95, 0))["one"]["fvu"]
    assert fvu["ratio"] == 1 and fvu["ratio_low"] < 0.99 and fvu["ratio_high"] > 1.01


def test_no_ratio_to_what_may_be_zero(tmp_path):
    home, away = place(tmp_path / "home", 0.1, 0.001, 0), place(tmp_path / "away", 0.15, 0.2, 1)
    found = transfer.compare(["one"], home, away, Bootstrap(100, 0.95, 0))["one"]
    assert all(np.isnan(found["ce_delta"][f"ratio{end}"]) for end in ("", "_low", "_high"))
    assert np.isfinite(found["fvu"]["ratio"])


def test_seeds_are_averaged_and_one_has_no_spread(tmp_path):
    home, away = place(tmp_path / "home", 0.1, 0.2, 0), place(tmp_path / "away", 0.15, 0.2, 1)
    found = transfer.compare(["one", "two"], home, away, Bootstrap(100, 0.95, 0))
    over = transfer.over_seeds(found)["fvu"]
    values = [found[i]["fvu"]["ratio"] for i in ("one", "two")]
    assert (over["ratio_mean"], over["ratio_sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert np.isnan(transfer.over_seeds({"one": found["one"]})["fvu"]["ratio_sd"])
    found["two"]["fvu"]["ratio"] = float("nan")
    assert np.isnan(transfer.over_seeds(found)["fvu"]["ratio_mean"])
