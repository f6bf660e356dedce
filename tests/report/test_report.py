"""The report of synthetic runs: complete, offline, escaped, in the right order, and whole in the odd cases."""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import yaml
from browser import visit

from raysae.errors import UserError
from raysae.report import figures, write_report
from raysae.report.columns import interval, show, show_threshold
from raysae.report.parts.axes import inert
from raysae.report.parts.decision import facts

VOID = {"meta", "link", "input", "br", "hr", "img"}


def synthetic_table(n: int = 24, architectures: tuple[str, ...] = ("relu", "topk"), seed: int = 0) -> pd.DataFrame:
    """A table of the shape a sweep gives: FVU falls with L0 and with width, TopK beats ReLU, a few SAEs went wrong."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for i in range(n):
        architecture, expansion = architectures[i % len(architectures)], (4.0, 8.0, 16.0)[i // 2 % 3]
        relu, d_in = architecture == "relu", 64
        strength = rng.uniform()
        l0 = 3 * 20**strength * rng.uniform(0.9, 1.1)
        fvu = min(0.95, 0.9 * l0**-0.55 / expansion**0.25 * (1.2 if relu else 1.0) * rng.uniform(0.95, 1.05))
        status = {5: "pruned", 9: "pruned", 13: "diverged", 17: "error"}.get(i, "completed")
        knob = float(np.round(0.5 * 25**-strength, 4)) if relu else float(round(l0))
        ce_clean, ce_zero, ce_mean = 1.21, 5.9, 4.4
        delta = 0.9 * fvu**1.5
        rows.append(
            {
                "sae_id": f"{architecture}-x{expansion:g}-{'l1_' if relu else 'k_'}{knob:g}-s0-{i}",
                "site": "blocks.2.resid_post",
                "architecture": architecture,
                "d_in": d_in,
                "d_sae": int(d_in * expansion),
                "expansion_factor": expansion,
                "l1_coefficient": knob if relu else np.nan,
                "k": np.nan if relu else knob,
                "seed": 0,
                "learning_rate": 2e-4 * (16384 / (d_in * expansion)) ** 0.5,
                "status": status,
                "tokens": 1_000_000 if status != "pruned" else 500_000,
                "unique_tokens": 400_000,
                "fvu": fvu,
                "fvu_low": fvu * 0.97,
                "fvu_high": fvu * 1.03,
                "explained_variance": 1 - fvu,
                "l0": l0,
                "l0_low": l0 * 0.96,
                "l0_high": l0 * 1.04,
                "dead_fraction": 0.02 * expansion * rng.uniform(),
                "dead_window_tokens": 500_000,
                "never_fired_fraction": 0.01,
                "dense_fraction": 0.004,
                "l2_ratio": 0.93 if relu else 0.99,
                "cosine": 1 - fvu / 2,
                "ce_clean": ce_clean,
                "ce_spliced": ce_clean + delta,
                "ce_zero": ce_zero,
                "ce_mean": ce_mean,
                "ce_delta": delta,
                "ce_delta_low": delta * 0.9,
                "ce_delta_high": delta * 1.1,
                "ce_loss_recovered": 1 - delta / (ce_zero - ce_clean),
                "ce_loss_recovered_low": 1 - 1.1 * delta / (ce_zero - ce_clean),
                "ce_loss_recovered_high": 1 - 0.9 * delta / (ce_zero - ce_clean),
                "ce_recovered_mean": (ce_zero - ce_mean) / (ce_zero - ce_clean),
                "kl": delta * 1.05,
                "kl_zero": 4.8,
                "kl_mean": 3.3,
                "n_rows": 40_000,
                "n_scored_tokens": 20_000,
                "train_seconds": 30 + expansion,
            }
        )
    table = pd.DataFrame(rows)
    measured = list(table.columns[table.columns.get_loc("fvu") : -1])
    table.loc[table["status"].isin(["error", "diverged"]), measured] = np.nan
    done = table[table["status"] == "completed"]
    table["pareto"] = [
        row.status == "completed" and not ((done["fvu"] < row.fvu) & (done["l0"] < row.l0)).any()
        for row in table.itertuples()
    ]
    table["passes_gate"] = table["pareto"] & (table["fvu"] < 0.2)
    return table


def synthetic_curves(table: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for row in table.to_dict("records"):
        fvu, l0 = (row[name] if row[name] == row[name] else 3.0 for name in ("fvu", "l0"))
        for rung in range(1, 6 if row["status"] == "completed" else 4):
            rows.append(
                {
                    "sae_id": row["sae_id"],
                    "tokens": rung * 200_000,
                    "fvu": fvu * (1 + 4 * np.exp(-1.5 * rung)),
                    "l0": l0 * (1 + 3 * np.exp(-rung)),
                    "loss": fvu + 0.1,
                    "dead_fraction": 0.01 * rung,
                    "learning_rate": 1e-3,
                }
            )
    return pd.DataFrame(rows)


def synthetic_decision(table: pd.DataFrame, go: bool = True) -> dict[str, Any]:
    passing = table[table["passes_gate"]].sort_values("l0")
    lead = passing.iloc[0] if len(passing) else table.iloc[0]

    def criterion(name: str, metric: str, op: str, threshold: float, why: str, passes: bool = True) -> dict[str, Any]:
        value = float(lead[metric])
        low, high = (float(lead.get(f"{metric}_{end}", np.nan)) for end in ("low", "high"))
        return {
            "criterion": name,
            "metric": metric,
            "op": op,
            "threshold": threshold,
            "value": value,
            "low": None if np.isnan(low) else low,
            "high": None if np.isnan(high) else high,
            "n": 412,
            "mandatory": metric != "dead_fraction",
            "why": why,
            "verdict": "pass" if passes else "fail",
        }

    criteria = [
        criterion("faithful", "fvu", "<=", 0.2, "What is not reconstructed cannot be explained.", go),
        criterion("sparse", "l0", "<=", 40, "A dense code is no easier to read than the activations."),
        criterion(
            "keeps the model working", "ce_loss_recovered", ">=", 0.9, "Features must carry what the model uses."
        ),
        criterion("alive", "dead_fraction", "<=", 0.5, "Dead latents are wasted width."),
    ]
    names = ["fvu", "l0", "explained_variance", "ce_loss_recovered", "ce_delta", "dead_fraction", "kl", "l2_ratio"]
    metrics = {name: float(lead[name]) * 1.01 for name in [*names, "fvu_low", "fvu_high", "l0_low", "l0_high"]}
    return {
        "verdict": "go" if go else "no-go",
        "reason": "It is the sparsest SAE on the Pareto front that meets every mandatory criterion."
        if go
        else "No SAE on the Pareto front meets FVU <= 0.2.",
        "gate": {"name": "default", "path": "configs/gates/default.yaml"},
        "selection": "the lowest L0 on the Pareto front among the SAEs that pass",
        "chosen": lead["sae_id"] if go else None,
        "closest": None if go else lead["sae_id"],
        "criteria": criteria,
        "test": {"metrics": metrics, "criteria": criteria} if go else None,
        "controls": {"untrained-relu": {"metrics": {"fvu": 0.98, "l0": 31.0}, "passes_gate": False}},
        "pareto": list(table.loc[table["pareto"], "sae_id"]),
        "rejected": {
            row.sae_id: ["fvu 0.31 > 0.2", f"status {row.status}"] for row in table.itertuples() if not row.passes_gate
        },
        "decided_at": "2026-01-31T12:00:00+00:00",
    }


def synthetic_run(folder: Path, table: pd.DataFrame, decision: dict[str, Any], extras: bool = True) -> Path:
    folder.mkdir(parents=True)
    table.to_parquet(folder / "table.parquet")
    (folder / "decision.json").write_text(json.dumps(decision))
    if not extras:
        return folder
    synthetic_curves(table).to_parquet(folder / "curves.parquet")
    config = {
        "model": {"name": "embedded"},
        "data": {"source": "arithmetic", "text_separator": "</pre><script>alert(1)</script>"},
        "evaluation": {"confidence": 0.95, "bootstrap": 1000},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    stages = [
        {
            "stage": "tokens",
            "seconds": 2.1,
            "cpu_seconds": 2.0,
            "gpu_seconds": 0,
            "tokens": 480_000,
            "bytes": 3_100_000,
        },
        {"stage": "capture", "seconds": 210, "cpu_seconds": 400, "gpu_seconds": 0, "tokens": 480_000, "bytes": 61e6},
        {"stage": "sweep", "seconds": 9400, "cpu_seconds": 18_000, "gpu_seconds": None, "tokens": 24e6, "bytes": 9e6},
    ]
    total = {name: sum(stage[name] or 0 for stage in stages) for name in list(stages[0])[1:]}
    for stage in stages:
        stage["reused"] = stage["stage"] == "tokens"
    (folder / "ledger.json").write_text(json.dumps({"stages": stages, "total": total}))
    store = {
        "model": {"name": "embedded"},
        "rows": {"train": 400_000, "validation": 40_000, "test": 40_000},
        "sites": {},
    }
    (folder / "store.json").write_text(json.dumps(store))
    return folder


def pareto(table: pd.DataFrame, decision: dict[str, Any]) -> Any:
    return figures.against(table, decision, "l0", "fvu")


class Page(HTMLParser):
    """Checks nesting and collects ids, references and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return synthetic_table()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, table: pd.DataFrame) -> Path:
    folder = synthetic_run(tmp_path_factory.mktemp("runs") / "go", table, synthetic_decision(table))
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text()


@pytest.fixture(scope="module")
def no_go(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A no-go whose texts are hostile."""
    table = synthetic_table(3)
    table.loc[0, "sae_id"] = '<img src=x onerror="alert(1)">$\\alpha$&'
    decision = synthetic_decision(table, go=False) | {"closest": table.loc[0, "sae_id"], "reason": "<b>bold</b>"}
    return write_report(synthetic_run(tmp_path_factory.mktemp("runs") / "r", table, decision)).read_text()


def test_page_is_well_formed_and_refers_to_nothing_outside(run: Path, html: str) -> None:
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    for reference in page.references:
        assert reference == "data:," or reference[1:] in page.ids or (run / unquote(reference)).is_file(), reference
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert len(html) < 1_500_000


def test_decision_comes_first_then_gate_plots_and_table(html: str, table: pd.DataFrame) -> None:
    order = [html.index(f'id="{name}"') for name in ("decision", "gate", "plots", "saes", "axes", "cost", "method")]
    assert order == sorted(order)
    head = html[order[0] : order[1]]
    chosen = synthetic_decision(table)["chosen"]
    row = table.set_index("sae_id").loc[chosen]
    assert chosen in head and "sparsest SAE on the Pareto front" in head
    assert show("fvu", row["fvu"]) in head and interval("fvu", row["fvu_low"], row["fvu_high"]) in head
    assert show("fvu", row["fvu"] * 1.01) in head  # test
    assert "✓ pass" in html and "≤ 0.2" in html and "What is not reconstructed" in html
    assert "untrained-relu" in html and "fails, as it must" in html


def test_every_sae_is_in_the_table_with_its_reason(html: str, table: pd.DataFrame) -> None:
    for sae_id in table["sae_id"]:
        assert f'<tr data-sae="{sae_id}"' in html
    assert "fvu 0.31 &gt; 0.2; status error" in html
    assert "aria-sort" in html and 'id="filter"' in html


def test_each_mark_has_its_tooltip(html: str, table: pd.DataFrame) -> None:
    drawn = table[table["status"].isin(figures.PLOTTED)]
    pareto = html[html.index("FVU against L0</figcaption>") : html.index("FVU against the expansion")]
    assert sorted(re.findall(r'class="sae" data-sae="([^"]*)"', pareto)) == sorted(drawn["sae_id"])
    assert pareto.count("<title>") == len(drawn)


def test_figures_are_written_and_follow_the_page_s_colours(run: Path, html: str) -> None:
    names = {path.stem for path in (run / "figures").glob("*.svg")}
    assert names == {path.stem for path in (run / "figures").glob("*.png")}
    assert {
        "pareto",
        "fvu_by_l1_coefficient",
        "l0_by_k",
        "ce_delta_by_l0",
        "l0_over_training",
        "fvu_by_expansion",
    } <= names
    assert figures.INK not in re.sub(r"<style>.*?</style>", "", html, flags=re.S)
    assert "currentColor" in html


def test_text_from_files_is_escaped(no_go: str) -> None:
    page = Page(no_go)
    assert "img" not in page.tags and no_go.count("<script>") == 2 and "<b>bold</b>" not in no_go
    assert "&lt;b&gt;bold&lt;/b&gt;" in no_go and "&lt;img src=x" in no_go


def test_no_go_shows_the_closest_and_leaves_test_untouched(no_go: str) -> None:
    assert "no-go" in no_go and "Closest: &lt;img" in no_go
    assert "The test split was not touched" in no_go and "✗ fail" in no_go


def test_waiver_basis_and_what_a_criterion_asks_beyond_its_bound_are_shown(tmp_path: Path, html: str) -> None:
    table = synthetic_table(3)
    decision = synthetic_decision(table)
    decision["criteria"][0] |= {
        "verdict": "waived", "confidence": "interval", "must_beat": "untrained", "baseline_value": 0.987
    }  # fmt: skip
    waiver = {"waived_by": "A. <b>Person</b>", "why": "a replication", "criteria": ["faithful"], "run": None}
    decision |= {"waiver": waiver, "basis": {"path": "results/phase1", "verdict": "no-go"}}
    page = write_report(synthetic_run(tmp_path / "r", table, decision)).read_text()
    Page(page)
    shown = ("waived: faithful, by A. &lt;b&gt;Person", "because a replication", "✗ waived", "results/phase1 (no-go)")
    for text in (*shown, "<small>whole interval</small>", "better than untrained</small><small>0.9870"):
        assert text in page
        assert text not in html


def with_choice(table: pd.DataFrame) -> dict[str, Any]:
    """A decision with a choice at the table's site and none at another."""
    decision = synthetic_decision(table)
    lead, others = decision["chosen"], [i for i in table.query("passes_gate")["sae_id"] if i != decision["chosen"]]
    row = table.set_index("sae_id").loc[lead]
    words = {"failed_advisory": 0, "d_sae": 256, "tie": None}
    candidates = [
        {**words, "sae_id": i, "seeds": [i], "score": 0.3, "in_words": f"score of {i}"} for i in [lead, *others]
    ]
    candidates[1] |= {"tie": "inside the noise", "seeds": ["a", "b"]}
    validation, test = (
        {"value": v, "in_words": f"FVU 0.1 × L0 {v / 0.1:g} = {v}"} for v in (float(row["fvu"] * row["l0"]), 0.31)
    )
    choice = {
        "verdict": "go", "reason": "so", "chosen": lead, "closest": None, "candidates": candidates, "traded": ["<much>."],
        "runner_up": {"sae_id": others[0], "why": "L0 ×2 for FVU ×0.7"}, "test": decision["test"],
        "score": {"name": "FVU · L0", "validation": validation, "test": test}, "criteria": decision["criteria"],
    }  # fmt: skip
    score = {"name": "FVU · L0", "validation": None, "test": None}
    none = {
        **choice,
        "verdict": "no-go",
        "chosen": None,
        "candidates": [],
        "traded": [],
        "runner_up": None,
        "score": score,
    }
    splits = {"dead_fraction": "training"}
    asked = [{**c, "split": splits.get(c["metric"], "validation")} for c in decision["criteria"]]
    again = {**decision["test"], "criteria": [{**c, "split": splits.get(c["metric"], "test")} for c in asked]}
    return decision | {
        "choose": {"rule": "knee", "error": "fvu", "a": 1.0, "matched_l0": None},
        "choices": {"blocks.2.resid_post": choice, "<site>": {**none, "closest": others[1], "criteria": asked}},
        "unmeasured": [
            {"subject": "factors <b>", "why": "none known", "mandatory": True, "waived": False},
            {"subject": "neurons", "why": "later", "mandatory": False, "waived": False},
        ],
        "criteria": asked, "test": again,
        "looks": {"test_split": "records-0", "number": 3, "earlier": [
            {"at": "then", "by": by, "run": "<run>"} for by in ("choice", "probes")]},
    }  # fmt: skip


def test_the_choice_defends_itself_with_candidates_runner_up_and_both_splits(tmp_path: Path, html: str) -> None:
    table = synthetic_table()
    decision = with_choice(table)
    lead, second = (c["sae_id"] for c in decision["choices"]["blocks.2.resid_post"]["candidates"][:2])
    folder = synthetic_run(tmp_path / "r", table, decision)
    page = write_report(folder).read_text()
    Page(page)
    part = page[page.index('id="choice"') : page.index('id="gate"')]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", part))
    assert f"Runner-up: {second}. L0 ×2 for FVU ×0.7." in text and "&lt;much&gt;." in text
    assert re.search(r"= [\d.]+ on validation, by which it was chosen .* FVU 0\.1 × L0 3\.1 = 0\.31 on test", text)
    assert f"{lead} score of {lead} 0 256 chosen" in text and f"{second} of 2 seeds" in text
    assert "runner-up tie: inside the noise" in text and "&lt;site&gt;: no-go" in part
    assert "look 3 at these test rows" in page and "choice of &lt;run&gt;, probes of &lt;run&gt;" in page
    assert 'href="#choice"' in page and 'id="choice"' not in html and "look " not in html

    gate = page[page.index('id="gate"') : page.index('id="plots"')]
    rows = {re.sub(r"<[^>]+>|\s", "", row.partition("</th>")[0]): row for row in gate.split('<tr><th scope="row">')}
    dead = next(row for name, row in rows.items() if name.startswith("alive"))
    assert dead.count("<small>training</small>") == 2 and "<small>validation</small>" not in dead
    assert "factors &lt;b&gt;" in gate and "✗ mandatory" in gate and "advisory" in gate

    other = decision["choices"]["<site>"]["closest"]
    assert "The gate" in (folder / "saes" / other / "index.html").read_text(), "of every site's SAE"
    marks = pareto(table, decision).axes[0].lines
    assert sum(line.get_markersize() == 13 for line in marks) == 1


def test_the_line_of_equal_score_goes_through_the_choice() -> None:
    table = synthetic_table()
    decision = with_choice(table)
    row = table.set_index("sae_id").loc[decision["chosen"]]

    def lines(rule: dict[str, Any], figure: Any) -> list[Any]:
        axes = figure(table, decision | {"choose": {**decision["choose"], **rule}}).axes[0]
        return [line for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata()) > 1]

    def through(line: Any, error: str) -> bool:
        x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
        return bool(np.isclose(np.exp(np.interp(np.log(row["l0"]), np.log(x), np.log(y))), row[error], rtol=1e-3))

    def by_ce(table: pd.DataFrame, decision: dict[str, Any]) -> Any:
        return figures.against(table, decision, "l0", "ce_delta")

    limits = pareto(table, decision | {"choose": None}).axes[0].get_ylim()
    assert pareto(table, decision).axes[0].get_ylim() == limits, "the line does not set the scale"
    for rule, figure, error in (
        ({}, pareto, "fvu"), ({"a": 0.5}, pareto, "fvu"),
        ({"rule": "most_faithful"}, pareto, "fvu"), ({"error": "ce_delta"}, by_ce, "ce_delta"),
    ):  # fmt: skip
        assert any(through(line, error) for line in lines(rule, figure) if len(line.get_xdata()) == 100)
    for rule, at in (({"rule": "sparsest"}, row["l0"]), ({"rule": "matched_l0", "matched_l0": 7.0}, 7.0)):
        assert any(list(line.get_xdata()) == [at, at] for line in lines(rule, pareto))
    assert len(lines({"error": "ce_delta"}, pareto)) < len(lines({}, pareto))


def test_an_incomplete_verdict_is_no_go_in_disguise(tmp_path: Path) -> None:
    table = synthetic_table()
    decision = with_choice(table) | {"verdict": "incomplete"}
    page = write_report(synthetic_run(tmp_path / "r", table, decision)).read_text()
    assert f"Incomplete. Chosen: {decision['chosen']}" in page and 'class="decision incomplete"' in page


def test_stability_transfer_and_risk_stand_beside_their_nulls(tmp_path: Path, html: str) -> None:
    folder = evidence_run(tmp_path / "evidence")
    page = write_report(folder).read_text()
    Page(page)
    assert "null 0.2500" in page and "0.5000–0.7000 over 1 pair" in page and "2 seeds, and 3 were asked for" in page
    assert "× 1.5000 [1.4000, 1.6000]" in page and "no ratio: home may be 0" in page and "7 left out" in page
    assert "worst in &lt;hard&gt;, × 1.2000" in page and "tiny (3 groups)" in page
    assert "90 of 100" in page and "8 without any; 2 with the same tokens" in page
    assert "rows are &lt;shuffled&gt;" in page
    for words in ("Three or more in", "--evaluation.invariance 100", "The gate states none."):
        assert words in html and words not in page


def evidence_run(folder: Path) -> Path:
    """A run with every file that the sections on stability and risk read."""
    table = synthetic_table()
    decision = synthetic_decision(table)
    lead = decision["chosen"]
    decision["assumptions"] = [{"assumption": "rows are <shuffled>", "if_wrong": "no", "checked_by": "nothing"}]
    synthetic_run(folder, table, decision)
    names = ("mmcs", "recurring_fraction", "recurring_closely_fraction", "recurring_variance")
    entry: dict[str, Any] = {
        "site": "s", "architecture": "topk", "d_sae": 256, "k": 8.0, "sae_ids": ["a", "b"], "seeds": [0, 1],
        "note": "2 seeds, and 3 were asked for", "method": "Hungarian", "never_fired": [0, 3], "pairs": [{}],
        "recurring_closely_variance": 0.1,
    }  # fmt: skip
    for name in names:
        entry |= {name: 0.6, f"{name}_least": 0.5, f"{name}_largest": 0.7, f"{name}_null": 0.25}
    for name in ("fvu", "l0", "ce_loss_recovered"):
        entry |= {f"{name}_mean": 0.2, f"{name}_sd": 0.01}
    (folder / "stability.json").write_text(json.dumps({"rule": "so", "configurations": [entry]}))
    moved = {"home": 0.1, "away": 0.15, "ratio": 1.5}
    moved |= {f"{kind}{end}": moved[kind] + d for kind in list(moved) for end, d in (("_low", -0.1), ("_high", 0.1))}
    none = moved | {"ratio": math.nan, "ratio_low": math.nan, "ratio_high": math.nan}
    of_sae = {"n_rows": 9, "n_groups": 3, "fvu": moved, "l0": moved, "ce_loss_recovered": moved, "ce_delta": none}
    spread = {name: {"ratio_mean": 1.0, "ratio_sd": 0.1} for name in ("fvu", "l0", "ce_loss_recovered", "ce_delta")}
    other = {"examples": 40, "left_out": 7, "saes": {lead: of_sae}, "over_seeds": spread}
    (folder / "transfer.json").write_text(json.dumps({"<away>": other}))
    rows = [
        {"sae_id": s, "axis": "stratum", "domain": d, "n_groups": n, "n_scored_groups": n, "n_rows": 9}
        | {f"{m}{e}": 0.1 for m in ("fvu", "l0", "ce_loss_recovered") for e in ("", "_low", "_high")}
        for s in (lead, "another")
        for d, n in (("<hard>", 40), ("tiny", 3))
    ]
    pd.DataFrame(rows).to_parquet(folder / "domains.parquet")
    worst = {"domain": "<hard>", "ratio": 1.2, "ratio_low": 1.1, "ratio_high": 1.3, "null_95": 1.05}
    facts = {"enough_groups": 10, "worst": {lead: {"stratum": {"fvu": worst}}}}
    (folder / "domains.json").write_text(json.dumps(facts))
    kind = {"kind": "names", "examples": 100, "compared": 90, "not_found": 8, "same_tokens": 2}
    kind |= {f"{m}{n}{e}": 0.5 for m in ("jaccard", "cosine") for n in ("", "_null") for e in ("", "_low", "_high")}
    (folder / "invariance.json").write_text(json.dumps({"sae_id": lead, "too_long": 0, "kinds": [kind]}))
    return folder


def test_a_candidate_that_fails_on_test_is_not_called_chosen(tmp_path: Path) -> None:
    table = synthetic_table(1, ("topk",)).drop(columns=["ce_delta", "ce_loss_recovered", "k"])
    table["fvu"] = table["fvu"].astype(object)  # what a table merged from dicts may hold
    decision = synthetic_decision(synthetic_table(1, ("topk",))) | {"verdict": "no-go", "reason": "Not on test."}
    html = write_report(synthetic_run(tmp_path / "r", table, decision, extras=False)).read_text()
    assert f"No SAE is cleared. Candidate: {decision['chosen']}" in html and "chosen</small>" not in html


def test_one_sae_and_nothing_but_what_must_be_there(tmp_path: Path) -> None:
    table = synthetic_table(1, ("topk",)).drop(columns=["pareto", "l1_coefficient", "ce_delta", "fvu_low", "d_sae"])
    decision = {"verdict": "no-go", "reason": "", "chosen": None, "criteria": [], "test": None}
    html = write_report(synthetic_run(tmp_path / "r", table, decision, extras=False)).read_text()
    Page(html)
    assert "No SAE passes" in html and "No criterion was judged" in html
    assert "No ledger was kept" in html and "No config was kept" in html


def test_all_saes_failed(tmp_path: Path) -> None:
    table = synthetic_table(2).assign(status="error")
    table[["fvu", "l0", "ce_delta", "ce_loss_recovered"]] = np.nan
    decision = {"verdict": "no-go", "reason": "No SAE completed.", "chosen": None, "closest": None}
    html = write_report(synthetic_run(tmp_path / "r", table, decision, extras=False)).read_text()
    assert "no SAE has both numbers" in html and "2 SAE(s) that diverged or failed" in html


@pytest.mark.parametrize(("n", "architecture"), [(20, "relu"), (300, "topk")])
def test_many_saes_of_one_architecture_can_be_drawn(n: int, architecture: str) -> None:
    table = synthetic_table(n, (architecture,))
    drawn = figures.draw(table, None, synthetic_decision(table))
    assert ("fvu_by_l1_coefficient" in drawn) == (architecture == "relu") and ("fvu_by_k" in drawn) == (
        architecture == "topk"
    )


def test_saes_of_one_l0_are_drawn_without_a_warning() -> None:
    """A TopK grid of one k, far below the gate's bound: nothing may squeeze the axes, as a label off the scale did."""
    table = (
        synthetic_table(16, ("topk",)).query("status == 'completed'").assign(k=32, l0=32.0, l0_low=32.0, l0_high=32.0)
    )
    table["fvu"] = np.linspace(0.0705, 0.0758, len(table))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for drawn in figures.draw(table, synthetic_curves(table), synthetic_decision(table)).values():
            drawn.figure.savefig(io.BytesIO())


def test_an_outlier_does_not_set_the_scale() -> None:
    table = synthetic_table(12)
    table.loc[0, ["fvu", "fvu_low", "fvu_high"]] = 1e6
    table.loc[1, "l0"] = 0.0
    low, high = pareto(table, {}).axes[0].get_ylim()
    assert 0 <= low < high <= figures.FVU_TOP
    assert len(figures.off_scale(table)) == 2


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no table\.parquet"):
        write_report(tmp_path)


def test_numbers_read_as_people_write_them() -> None:
    assert [show("fvu", value) for value in (0.12345, np.nan, None, np.inf)] == ["0.1235", "–", "–", "∞"]
    assert show("dead_fraction", 0.0123) == "1.23%" and show("tokens", 1e6) == "1,000,000"
    assert show("unknown_metric", 0.5) == "0.5" and show_threshold("dead_fraction", "<=", 0.1) == "≤ 10%"
    assert interval("l0", 1.0, None) == "" and interval("ce_delta", -0.01, 0.02) == "[−0.0100, 0.0200]"


def test_in_a_browser_headers_sort_the_filter_filters_and_marks_light_up(
    tmp_path: Path, html: str, table: pd.DataFrame
) -> None:
    script = """
    const heads = [...document.querySelectorAll("#saes thead button")], filter = document.getElementById("filter");
    const fvu = heads.find(button => button.textContent === "FVU");
    fvu.click(); fvu.click();
    filter.value = "TOPK completed"; filter.dispatchEvent(new Event("input"));
    document.querySelector(".sae").dispatchEvent(new PointerEvent("pointerenter"));
    """
    page = tmp_path / "page.html"
    page.write_text(html)
    dom = visit(page, tmp_path, script).dom

    assert dom.count('aria-sort="') == 1 and 'aria-sort="descending"' in dom
    rows = re.findall(r'<tr data-sae="([^"]*)"[^>]*?( hidden="")?>', dom)
    measured = table.dropna(subset="fvu").sort_values("fvu", ascending=False)
    assert [sae_id for sae_id, _ in rows][: len(measured)] == list(measured["sae_id"])
    kept = {sae_id for sae_id, hidden in rows if not hidden}
    assert kept == set(table.query("architecture == 'topk' and status == 'completed'")["sae_id"])
    assert f"{len(kept)} of {len(table)}" in dom
    lit = re.findall(r'class="sae hot" data-sae="([^"]*)"', dom)
    assert len(lit) > 4 and len(set(lit)) == 1
    assert re.search(rf'id="tip"[^>]*>{re.escape(lit[0])}\n', dom)


def axis_table(l0_of, fvu_of=lambda x, seed: 0.1, coefficient="l0_coefficient", values=(0.01, 0.1), seeds=(0, 1)):
    return pd.DataFrame(
        [
            {
                "sae_id": f"{x}-{seed}", "site": "s", "architecture": "jumprelu_l0", "expansion_factor": 4, coefficient: x,
                "seed": seed, "status": "completed", "l0": l0_of(x, seed), "fvu": fvu_of(x, seed),
            }
            for x in values
            for seed in seeds
        ]
    )  # fmt: skip


def test_an_axis_that_did_nothing_is_flagged_and_one_that_did_is_not():
    flat = inert(axis_table(lambda x, seed: 40 + 0.1 * seed + x))
    assert len(flat) == 1 and flat[0].startswith("L0 coefficient did nothing for jumprelu_l0")
    assert not inert(axis_table(lambda x, seed: (40 + 0.1 * seed) / x))
    assert not inert(axis_table(lambda x, seed: 40 + 0.1 * seed, lambda x, seed: x)), "it moved FVU alone"
    assert not inert(axis_table(lambda x, seed: 40 + 0.1 * seed, values=(0.01, 0.011))), "nothing was tried"
    same = inert(axis_table(lambda x, seed: 1 / x))
    assert len(same) == 1 and same[0].startswith("Seed did nothing")


# ----------------------------------------------------------------------------------------------------------------------
# Nulls and probes


def with_nulls(table: pd.DataFrame) -> dict[str, Any]:
    """A decision with a failing, a voiding and a harmless null beside the first SAE."""

    def null(kind: str, passes: bool, **metrics: Any) -> tuple[str, dict[str, Any]]:
        own = {
            "kind": kind,
            "beside": [table.loc[0, "sae_id"], table.loc[2, "sae_id"]],
            "d_sae": 64,
            "fvu": 0.7,
            "fvu_low": 0.65,
            "fvu_high": 0.75,
        }
        return f"control-{kind}-relu-64-s", {"metrics": own | metrics, "passes_gate": passes}

    nulls = [
        null("permuted", False), null("ica", True, converged=False), null("untrained_model", True, ce_loss_recovered=None)
    ]  # fmt: skip
    return synthetic_decision(table) | {"controls": dict(nulls)}


def test_nulls_stand_below_their_sae_with_intervals_and_what_the_gate_made_of_them(tmp_path: Path, html: str) -> None:
    table = synthetic_table(3)
    page = write_report(synthetic_run(tmp_path / "r", table, with_nulls(table))).read_text()
    Page(page)
    part = page[page.index('id="null-table"') : page.index('id="plots"')]
    rows = [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", row)) for row in re.findall(r"<tr.*?</tr>", part, flags=re.S)]
    assert rows[1].split()[0] == table.loc[0, "sae_id"] and show("fvu", table.loc[0, "fvu"]) in rows[1]
    assert "decoder rows permuted 64 latents" in rows[2] and "0.7000 [0.6500, 0.7500]" in rows[2]
    assert "fails, as it must" in rows[2] and "passes" not in rows[2]
    assert "ICA" in rows[3] and "passes: the gate is void" in rows[3] and "did not converge" in rows[3]
    assert "random weights" in rows[4] and "passes: the gate does not ask what the model" in rows[4]
    assert "void" not in rows[4] and "converge" not in rows[2] + rows[4]
    again = [row.split()[0] for row in rows[5:9]]
    assert again == [table.loc[2, "sae_id"], "its", "ICA,", "SAE"], "a null that two SAEs share stands below both"
    assert "random weights, on its activations" not in html, "of a kind that was not measured nothing is shown"


def probed(folder: Path) -> Path:
    """What `jobs/probe.py` leaves: one label measured with a leak and a gain, one not measured."""
    rows: list[dict[str, Any]] = [{"label": "step", "status": "not measured: fewer than two classes"}]
    for i, name in enumerate(("majority", "shuffled", "token", "raw", "random_sae", "sae")):
        for probe in ("dense", "k=1") if name not in ("majority", "token") else ("dense",):
            scores = {m: 0.3 + 0.1 * i + 0.03 * (probe == "dense") for m in ("macro_f1", "balanced_accuracy", "auroc")}
            ends = {f"{m}_{end}": v + by for m, v in scores.items() for end, by in (("low", -0.02), ("high", 0.02))}
            entry = {"label": "operation", "input": name, "probe": probe, "status": "measured", "n_columns": 10 + i}
            rows.append({**entry, **scores, **ends, "not_converged": 2 * (name == "raw" and probe == "k=1")})
    rows.append({"label": "operation", "input": "untrained_model", "status": "not measured: add <it>"})
    folder.mkdir()
    pd.DataFrame(rows).to_parquet(folder / "probes.parquet")
    low_high = {"macro_f1_low": 0.05, "macro_f1_high": 0.15}
    gaps = {
        "raw": {"macro_f1": 0.1, **low_high, "p": 0.01, "q": 0.02},
        "token": {"macro_f1": -0.2, "macro_f1_low": -0.25, "macro_f1_high": -0.15, "p": 0.01, "q": 0.02},
        "random_sae": {"macro_f1": 0.1, **low_high, "p": 0.2, "q": 0.25},
    }
    leakage = {
        "duplicates": {"flag": ""},
        "information": {"gap": 0.1, "flag": "information gain"},
        "token": {"gap": -0.2, "flag": "the token id alone tells the label as well"},
    }
    effects = {"largest_z": 7.81, "null_largest_z": 3.72, "null_largest_z_95": 4.88, "discoveries": 3, "tested": 15}
    label = {"classes": ["*", "+"], "dropped": ["</td>"], "n_rows": 3193, "n_groups": 40, "gaps": gaps}
    facts = {"operation": {**label, "leakage": leakage, "effects": effects}, "step": {"classes": ["0"], "dropped": []}}
    settings = {"split": "test", "folds": 5, "confidence": 0.9}
    about = {"sae_id": "<b>", "site": "blocks.1.resid_post", "settings": settings, "labels": facts}
    (folder / "probes.json").write_text(json.dumps(about))
    return folder


def test_probes_have_a_table_per_label_with_every_baseline_and_flags_in_words(tmp_path: Path, html: str) -> None:
    table = synthetic_table(3)
    folder = synthetic_run(tmp_path / "r", table, synthetic_decision(table))
    probed(folder / "probes")
    page = write_report(folder).read_text()
    Page(page)
    part = page[page.index('id="probes"') : page.index('id="cost"')]
    assert 'href="#probes"' in page and 'id="probes"' not in html and 'href="#probes"' not in html
    assert "&lt;b&gt;" in part and "&lt;/td&gt;" in part and "90% intervals" in part
    text = [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", row)) for row in re.findall(r"<tr.*?</tr>", part, flags=re.S)]
    names = ("latents 15", "raw activations", "untrained SAE", "untrained model", "token id", "shuffled", "frequencies")
    assert len(text) == 8 and all(name in row for name, row in zip(names, text[1:], strict=True))
    assert "0.830 [0.810, 0.850]" in text[1] and "0.800 [0.780, 0.820]" in text[1], "dense, and k=1"
    assert "+0.100 [0.050, 0.150], q 0.02" in text[2] and "2 fits did not converge" in text[2]
    assert "−0.200 [−0.250, −0.150], q 0.02" in text[5] and "not measured: add &lt;it&gt;" in text[4]
    assert part.count('<span class="pass">+') == 1, "a gap that chance explains is not coloured"
    assert "Information gain: the latents tell more" in part and "The token id alone tells the label as well." in part
    assert "No leak was found" not in part and "3,193 rows of 40 groups" in part
    assert "7.81; with shuffled labels 3.72" in part and "3 of 15" in part
    assert "Not measured: fewer than two classes" in part


def test_what_became_no_row_stands_among_the_facts():
    table = pd.DataFrame({"status": ["completed"], "tokens": [10.0], "site": ["blocks.0.resid_post"]})
    store = {"left_out": {"bad rows": 1200, "examples without a row": 1}, "not_compared": 0.0251}
    found = dict(facts(table, {}, store))
    assert found["Left out"] == "1,200 bad rows, 1 examples without a row"
    assert found["Too short to find near-duplicates of"] == "2.5% of the examples"
    assert not {"Left out", "Too short to find near-duplicates of"} & {*dict(facts(table, {}, {"not_compared": 0.0}))}
