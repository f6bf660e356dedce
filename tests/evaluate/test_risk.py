"""Domains: sums by group split as the records say, small ones named, the worst beside what chance makes of equals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from raysae.data.records import make_problem
from raysae.evaluate import risk
from raysae.evaluate.statistics import Bootstrap


def problem(group: str, stratum: str, dataset: str = "d"):
    return replace(make_problem(f"{group}/{stratum}", dataset, "q", group=group), stratum=stratum)


def world(tmp_path, error_of, sizes, scored=None, seed=0):
    """An evaluation of one SAE and a control: per group 10 rows, variance 100, error as given by stratum."""
    rng = np.random.default_rng(seed)
    problems, rows = [], []
    for stratum, n in sizes.items():
        for i in range(n):
            group = f"{stratum}-{i}"
            problems.append(problem(group, stratum))
            is_scored = i < (scored or sizes)[stratum]
            sums = dict.fromkeys(risk.SUMS, 0.0) | {"rows": 10, "squared_shifted": 100.0, "active": 50}
            sums["squared_error"] = error_of[stratum] * rng.uniform(0.8, 1.2)
            if is_scored:
                sums |= {"scored": 9, "nll_clean": 9.0, "nll_spliced": 10.0 + rng.uniform(), "nll_zero": 30.0}
            rows += [{"sae_id": s, "group": group, **sums} for s in ("sae", "control-untrained-relu-8-x")]
    pd.DataFrame(rows).to_parquet(tmp_path / "block.parquet")
    return lambda extra=(): risk.coverage([tmp_path], ["block"], [*problems, *extra], Bootstrap(200, 0.95, 0))


def test_metrics_by_domain_and_the_worst(tmp_path):
    table, facts = world(tmp_path, {"easy": 10, "mid": 10, "hard": 20}, {"easy": 30, "mid": 30, "hard": 30})()
    assert set(table["sae_id"]) == {"sae"} and set(facts["axes"]) == {"stratum"}  # all of one dataset
    rows = table.set_index("domain")
    assert rows.loc["hard", "fvu"] == pytest.approx(0.2, rel=0.05) and rows.loc["easy", "fvu"] == pytest.approx(
        0.1, rel=0.05
    )
    assert (rows["fvu_low"] < rows["fvu"]).all() and (rows["fvu"] < rows["fvu_high"]).all()
    worst = facts["worst"]["sae"]["stratum"]
    assert worst["fvu"]["domain"] == "hard"
    assert worst["fvu"]["ratio"] == pytest.approx(rows.loc["hard", "fvu"] / rows["fvu"].mean())
    assert worst["fvu"]["ratio_low"] < worst["fvu"]["ratio"] < worst["fvu"]["ratio_high"]
    assert worst["fvu"]["null_95"] < worst["fvu"]["ratio_low"]
    assert worst["ce_loss_recovered"]["value"] == rows["ce_loss_recovered"].min()
    assert "l0" not in worst  # the same in all: none is the worst


def test_equal_domains_have_a_worst_within_chance(tmp_path):
    """Over many draws, the worst of equal domains is above the null's 95th percentile about once in twenty."""
    above = 0
    for seed in range(40):
        equal = {name: 10 for name in "abc"}
        _, facts = world(tmp_path, equal, {name: 15 for name in "abc"}, seed=seed)()
        worst = facts["worst"]["sae"]["stratum"]["fvu"]
        assert worst["ratio"] > 1
        above += worst["ratio"] > worst["null_95"]
    assert above <= 8


def test_small_domains_are_given_but_not_judged(tmp_path):
    sizes = {"a": 30, "b": 30, "tiny": risk.ENOUGH_GROUPS - 1}
    table, facts = world(tmp_path, {"a": 10, "b": 12, "tiny": 90}, sizes, {"a": 30, "b": 5, "tiny": 5})()
    rows, worst = table.set_index("domain"), facts["worst"]["sae"]["stratum"]
    assert rows.loc["tiny", "fvu"] > 0.5 and np.isnan(rows.loc["tiny", "fvu_low"])
    assert worst["fvu"]["domain"] == "b" and worst["fvu"]["mean"] == pytest.approx(rows.loc[["a", "b"], "fvu"].mean())
    # CE rests on fewer groups: of a alone there are enough, and no domain is the worst of one
    assert np.isfinite(rows.loc["a", "ce_loss_recovered_low"]) and np.isnan(rows.loc["b", "ce_loss_recovered_low"])
    assert rows.loc["b", "n_scored_groups"] == 5 and "ce_loss_recovered" not in worst


def test_a_domain_in_which_ablation_costs_nothing_has_no_share_of_it(tmp_path):
    """Where the model is better off without the site, CE recovered changes its sign: it would be the best of all."""
    found = world(tmp_path, {"a": 10, "b": 12, "c": 14}, {"a": 30, "b": 30, "c": 30})
    block = pd.read_parquet(tmp_path / "block.parquet")
    block.loc[block["group"].str.startswith("b"), "nll_zero"] = 8.9  # below clean
    block.to_parquet(tmp_path / "block.parquet")
    table, facts = found()
    rows, worst = table.set_index("domain"), facts["worst"]["sae"]["stratum"]["ce_loss_recovered"]
    assert rows.loc["b", [f"ce_loss_recovered{end}" for end in ("", "_low", "_high")]].isna().all()
    assert worst["domain"] in "ac" and worst["mean"] == pytest.approx(rows["ce_loss_recovered"].mean())
    assert rows.loc["b", "fvu_low"] < rows.loc["b", "fvu"]


def test_a_group_of_several_domains_is_mixed(tmp_path):
    table, facts = world(tmp_path, {"a": 10, "b": 11}, {"a": 30, "b": 30})([problem("a-0", "b"), problem("b-1", "b")])
    rows = table.set_index("domain")
    assert rows["n_groups"].to_dict() == {"a": 29, "b": 30, risk.MIXED: 1}
    assert facts["worst"]["sae"]["stratum"]["fvu"]["domain"] == "b"


def test_mixed_groups_are_never_the_worst(tmp_path):
    extra = [problem(f"a-{i}", "b") for i in range(15)]
    table, facts = world(tmp_path, {"a": 20, "b": 10}, {"a": 45, "b": 30})(extra)
    assert table.set_index("domain").loc[risk.MIXED, "n_groups"] == 15
    assert facts["worst"]["sae"]["stratum"]["fvu"]["domain"] == "a"


def test_records_of_one_domain_have_no_axes(tmp_path):
    table, facts = world(tmp_path, {"a": 10}, {"a": 30})()
    assert len(table) == 0 and facts["axes"] == {}
