"""The whole flow at a small size: its files, its second run, its Python face, and what a user can get wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from outside import foreign
from small import GATE, sae_hashes, small_job, small_values, stage_of, study, write_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlavaConfig

import raysae
from raysae.activations.store import Store
from raysae.config.load import validate
from raysae.config.sections import NULLS, ProbesConfig
from raysae.errors import UserError
from raysae.models.embedded import build_tokenizer
from raysae.sae import formats
from raysae.stages.evidence import metrics_of_nulls
from raysae.sweep.collect import FACTS
from raysae.workspace import Made

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def run(ray_cluster, arithmetic_model, output) -> raysae.Run:
    return raysae.run_sweep(small_job(arithmetic_model, output))


def job(*arguments: str, script: str = "sweep_sae.py", cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / script), *arguments],
        cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_run_holds_what_the_contract_says(run):
    names = (
        "config.yaml",
        "table.parquet",
        "table.csv",
        "decision.json",
        "ledger.json",
        "report.html",
        "curves.parquet",
    )
    assert [name for name in names if not (run.path / name).is_file()] == []
    assert (run.path / "tune").is_dir() and run.figures
    assert set(run.table["status"]) == {"completed"} and len(run.table) == 4
    assert set(run.saes) == set(run.table["sae_id"])
    assert run.table["tokens"].nunique() == 1
    assert run.table["ce_loss_recovered"].isna().all(), "the model's weights are random: to ablate a site loses nothing"
    for metric in ("fvu", "l0", "ce_delta"):
        low, value, high = (run.table[f"{metric}{end}"] for end in ("_low", "", "_high"))
        assert ((low <= value + 1e-9) & (value <= high + 1e-9)).all()
    assert (run.table.query("architecture == 'topk'")["l0"] <= 4).all()
    assert run.ledger["total"]["tokens"] > 0
    assert len(run.curves) == 4 * 4


def test_the_store_holds_each_kept_token_once(run, output):
    store = Store(stage_of(output, "store"))
    store.verify()
    tokens = json.loads((stage_of(output, "tokens") / "manifest.json").read_text())
    tables = [store.row_columns(s.name, ("example_id", "position", "split")).to_pandas() for s in store.shards]
    rows = pd.concat(tables)
    assert len(rows) == sum(tokens["rows"].values())
    assert not rows.duplicated(["example_id", "position"]).any()
    assert (rows.groupby("example_id", observed=True)["split"].nunique() == 1).all()


def test_the_table_says_what_a_plain_computation_says(run, output):
    store = Store(stage_of(output, "store"))
    site = store.sites[0]
    x = store.head(site, "validation", 10**9).double()
    for row in run.table.to_dict("records"):
        sae = run.sae(row["sae_id"])
        f = sae.encode(x.float())
        error = (x - sae.decode(f).double()).square().sum()
        fvu = (error / (x - x.mean(0)).square().sum()).item()
        assert row["fvu"] == pytest.approx(fvu, rel=1e-9)
        assert row["l0"] == pytest.approx((f != 0).sum(1).double().mean().item(), rel=1e-9)


def test_the_chosen_or_any_sae_means_the_same_to_saelens(run, output):
    sae_lens = foreign("sae_lens")
    from sae_lens.evals import ExplainedVarianceCalculator

    store = Store(stage_of(output, "store"))
    x = store.head(store.sites[0], "validation", 10**9).float()
    for row in run.table.to_dict("records"):
        theirs = sae_lens.SAE.load_from_disk(str(run.path / "saes" / row["sae_id"]))
        f = theirs.encode(x)
        x_hat = theirs.decode(f)
        assert torch.allclose(x_hat, run.sae(row["sae_id"])(x), atol=1e-5)
        calculator = ExplainedVarianceCalculator()
        for rows in zip(x_hat.split(100), x.split(100), strict=True):
            calculator.add_batch(*rows)
        assert calculator.compute() == pytest.approx(row["explained_variance"], abs=5e-4)
        assert (f != 0).sum(1).double().mean().item() == pytest.approx(row["l0"], abs=5e-4)


def test_the_decision_explains_every_sae(run):
    decision = run.decision
    assert set(decision["rejected"]) | {decision["chosen"]} >= set(run.table["sae_id"])
    assert all(reasons for reasons in decision["rejected"].values())
    assert {sae for control in decision["controls"].values() for sae in control["metrics"]["beside"]} == set(run.saes)
    assert not any(control["passes_gate"] for control in decision["controls"].values())
    assert (decision["test"] is None) == (decision["chosen"] is None)


def test_the_best_sae_has_its_features_and_any_other_on_request(run, arithmetic_model, output):
    features = pd.read_parquet(run.path / "saes" / run.best / "features" / "features.parquet")
    row = run.table.set_index("sae_id").loc[run.best]
    assert len(features) == row["d_sae"] and features["density"].sum() == pytest.approx(row["l0"], rel=1e-9)
    assert features["dead"].mean() == pytest.approx(row["never_fired_fraction"])
    folders = [path.parent.name for path in run.path.glob("saes/*/features")]
    assert folders == [run.best] and len(list(run.path.glob("saes/*/index.html"))) == 4
    cards = (run.path / "saes" / run.best / "features" / "cards.jsonl").read_text().splitlines()
    assert len(cards) == row["d_sae"] and json.loads(cards[int(features["max"].idxmax())])["top_contexts"]
    for asked, count in (("all", 4), ("none", 0)):
        other = raysae.run_sweep(small_job(arithmetic_model, output, evaluation={
            "max_tokens": 1000, "bootstrap": 100, "features": asked
        }))  # fmt: skip
        assert len(list(other.path.glob("saes/*/features/cards.jsonl"))) == count
        made = {stage["stage"] for stage in other.ledger["stages"] if not stage["reused"]}
        assert made == ({"features"} if count else set()), "nothing else depends on it"


def test_a_second_run_redoes_nothing(run, arithmetic_model, output):
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file() and ".locks" not in p.parts}
    # A process of its own, without a cluster to join: had a stage work to do, it would have to start one.
    again = job("--config", str(write_config(output.parent / "again.yaml", small_values(arithmetic_model, output))))
    assert again.returncode == 0, again.stderr
    assert "Ray:" not in again.stdout
    after = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file() and ".locks" not in p.parts}
    assert after == before


def strict_gate(tmp_path: Path) -> Path:
    gate = tmp_path / "strict.yaml"
    gate.write_text(
        "name: strict\ncriteria:\n"
        "  - {criterion: faithful, metric: fvu, op: <=, threshold: 1.0e-9, why: nothing passes}\n"
        "  - {criterion: sparse, metric: l0_fraction, op: <=, threshold: 0.5, why: every gate has one}\n"
    )
    return gate


def test_another_gate_reuses_the_saes_and_can_say_no(run, arithmetic_model, output, tmp_path):
    gate = strict_gate(tmp_path)
    strict = raysae.run_sweep(small_job(arithmetic_model, output, gate=str(gate)))
    assert strict.path != run.path and sae_hashes(strict.path) == sae_hashes(run.path)
    assert strict.decision["verdict"] == "no-go" and strict.decision["closest"] in run.saes
    assert job(str(strict.path), script="gate.py").returncode == 3
    gate.write_text(gate.read_text().replace("1.0e-9", "1.0"))  # another gate under the same name is another run
    with pytest.raises(UserError, match="another config or gate"):
        raysae.run_sweep(small_job(arithmetic_model, output, gate=str(gate), run=strict.path.name))
    gate.write_text(gate.read_text().replace("1.0,", "1.0e-9,"))
    config = write_config(tmp_path / "c.yaml", small_values(arithmetic_model, output, gate=str(gate)))
    assert job("--config", str(config)).returncode == 0
    assert job("--config", str(config), "--require_go", "true").returncode == 3


def test_a_run_builds_on_a_no_go_only_with_a_waiver(run, arithmetic_model, output, tmp_path):
    no_go = raysae.run_sweep(small_job(arithmetic_model, output, gate=str(strict_gate(tmp_path)), run="phase1"))
    with pytest.raises(UserError, match=r"basis: .*phase1 is a no-go: No SAE passes"):
        raysae.run_sweep(small_job(arithmetic_model, output, basis=str(no_go.path)))
    waiver = tmp_path / "waiver.yaml"
    waiver.write_text(
        "{waived_by: A. Person, why: the bound is a test's, run: phase1, criteria: [latents are alive]}\n"
    )
    after = raysae.run_sweep(small_job(arithmetic_model, output, basis=str(no_go.path), waiver=str(waiver)))
    line = "waived: latents are alive; the decision of phase1, by A. Person, because the bound is a test's"
    assert after.path not in (run.path, no_go.path) and after.decision["basis"]["verdict"] == "no-go"
    assert (
        line in job(str(after.path), script="gate.py").stdout and "the decision of phase1" in after.report.read_text()
    )
    assert sae_hashes(after.path) == sae_hashes(run.path)


def test_a_run_in_which_no_sae_completes_is_a_no_go_that_says_how_each_was_stopped(
    arithmetic_model, tmp_path, monkeypatch
):
    """Plain files where the stages would be: nothing is left to measure, and no cluster is started."""

    stages: dict[str, Made] = {}

    def made(name: str, **manifest: Any) -> Made:
        (tmp_path / name).mkdir()
        stages[name] = Made(tmp_path / name, {"cost": {}, "stage": name, **manifest}, reused=False)
        return stages[name]

    site = "blocks.1.resid_post"
    facts = {"site": site, "architecture": "relu", "d_in": 32, "d_sae": 64, "expansion_factor": 2.0, "seed": 0}
    rows = [
        {"sae_id": "a", "status": "pruned", "status_reason": "L0 0 at 20,000 tokens"},
        {"sae_id": "b", "status": "diverged", "status_reason": "its loss is no longer finite"},
    ]
    saes = made("sweep")
    pd.DataFrame([{**facts, **row, "l1_coefficient": 5.0} for row in rows]).reindex(columns=FACTS).to_parquet(
        saes.path / "table.parquet"
    )
    curve = {"tokens": 20_000, "fvu": 1.0, "l0": 0.0, "loss": 1.0, "dead_fraction": 1.0, "learning_rate": 1e-3}
    pd.DataFrame([{"sae_id": row["sae_id"], **curve} for row in rows]).to_parquet(saes.path / "curves.parquet")
    made("measurement", saes={}, blocks=[]), made("evaluation", metrics={}), made("nulls", nulls={})
    made("records"), made("tokens", blocks=[])
    facts_of_store = {
        "model": {"name": "m"},
        "rows": {"train": 9},
        "dtype": "float32",
        "left_out": {},
        "not_compared": 0.0,
    }
    made("store", sites={site: {}}, **facts_of_store)
    job = small_job(
        arithmetic_model, tmp_path / "results", sweep={"seeds": [0, 1]}, run="r", probes={"labels": ["step"]}
    )
    mine = study(job)
    monkeypatch.setattr(mine.workspace, "make", lambda stage: stages[stage.kind])
    mine.workspace.made.update(stages)
    table, controls, further = mine.gather()
    decision = mine.judge(table, controls)
    run = mine.finish(table, decision, [*further, *mine.about_lead(table, decision)])
    assert run.decision["verdict"] == "no-go" and run.decision["chosen"] is None and run.best is None
    said = "None finished its training: 1 pruned: L0 0 at 20,000 tokens; 1 diverged: its loss is no longer finite."
    assert said in run.decision["reason"] and said in run.report.read_text()
    assert run.decision["rejected"]["a"] == ["pruned: L0 0 at 20,000 tokens"]
    assert list(run.table["fvu"]) == [1.0, 1.0] and not run.table["passes_gate"].any()


def test_optuna_samples_each_width_equally_often(run, arithmetic_model, output):
    sweep = {
        "search": "optuna",
        "samples": 2,
        "architectures": ["topk"],
        "expansion_factors": [2, 4],
        "k_range": [2, 16],
    }
    found = raysae.run_sweep(small_job(arithmetic_model, output, sweep=sweep, training={"tokens": 10_000, "rungs": 2}))
    assert sorted(found.table["expansion_factor"]) == [2, 2, 4, 4]
    assert found.table["k"].between(2, 16).all()


def test_packs_give_the_same_saes_as_singles(run, arithmetic_model, output, tmp_path):
    pack = raysae.run_sweep(small_job(arithmetic_model, tmp_path / "packed", sweep={"pack_size": 4}))
    assert sae_hashes(pack.path) == sae_hashes(run.path)


def test_trackers_get_each_sae_and_no_secret_reaches_the_run(ray_cluster, arithmetic_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 39 + "7")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sweep = {"architectures": ["topk"], "expansion_factors": [2, 4], "pack_size": 2}
    changes = {"sweep": sweep, "training": {"tokens": 5_000, "rungs": 2}, "tracking": {"wandb_project": "test"}}
    run = raysae.run_sweep(small_job(arithmetic_model, tmp_path, **changes))
    assert len(list(tmp_path.glob("stages/sweep-*/wandb/offline-run-*"))) == len(run.saes) == 2
    assert len(list((run.path / "tune").glob("*/*/events.out.tfevents.*"))) == 2
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"k" * 39 + b"7" not in file.read_bytes(), file


def test_several_sites_come_from_one_capture(ray_cluster, arithmetic_model, tmp_path):
    sites = ["blocks.0.mlp_hidden", "blocks.1.resid_post"]
    sweep = {"architectures": ["batchtopk"], "expansion_factors": [2]}
    two = raysae.run_sweep(
        small_job(arithmetic_model, tmp_path, capture={"sites": sites}, sweep=sweep, training={"tokens": 5_000})
    )
    assert sorted(two.table["site"]) == sites
    assert sorted(two.table["d_in"]) == [32, 128]
    leads = {site: choice["chosen"] or choice["closest"] for site, choice in two.decision["choices"].items()}
    assert sorted(leads) == sites and all(two.site(sae_id) == site for site, sae_id in leads.items())
    assert all((two.path / "saes" / sae_id / "features" / "cards.jsonl").is_file() for sae_id in leads.values())


@pytest.fixture(scope="module")
def nulls_job(arithmetic_model, tmp_path_factory) -> raysae.SweepJob:
    """Every null and a probe beside two SAEs. Seed 1: the fixture's model is what random weights of seed 0 are."""
    return small_job(
        arithmetic_model,
        tmp_path_factory.mktemp("nulls"),
        seed=1,
        sweep={"expansion_factors": [2], "k": [3]},
        training={"tokens": 10_000, "rungs": 2},
        evaluation={"nulls": ["all"], "bootstrap": 50},
        probes={"labels": ["operation"], "ks": [1], "rows": 400, "bootstrap": 20},
    )


@pytest.fixture(scope="module")
def controlled(ray_cluster, nulls_job) -> raysae.Run:
    return raysae.run_sweep(nulls_job)


def test_every_null_is_measured_and_judged_beside_its_sae(controlled):
    controls = controlled.decision["controls"]
    assert sorted(controls) == sorted(controlled.nulls)
    table = controlled.table.set_index("sae_id")
    for name, control in controls.items():
        m = control["metrics"]
        kind = m["kind"]
        assert not control["passes_gate"] and m["fvu_low"] <= m["fvu"] <= m["fvu_high"] and m["fvu"] < 5
        assert name.startswith(f"control-{kind}-") and {m["site"]} == {*table.loc[m["beside"], "site"]}
        assert formats.load(controlled.path / "nulls" / name).config.d_sae == m["d_sae"]
        dead_window_is_the_split = 0 if kind in ("pca", "ica") else m["never_fired_fraction"]
        assert m["dead_fraction"] == dead_window_is_the_split
        assert (m["ce_delta"] is None or np.isnan(m["ce_delta"])) == (kind == "untrained_model")
        if kind == "permuted":
            assert m["l0"] == pytest.approx(table.at[m["beside"][0], "l0"], abs=1e-6)
        if kind not in ("permuted", "shuffled_rows", "untrained_model"):
            assert (m["l0"] >= 0.95 * table.loc[m["beside"], "l0"]).all() or m["l0"] > 0.45 * m["d_sae"]
    for kind in NULLS:
        stands = {i for c in controls.values() if c["metrics"]["kind"] == kind for i in c["metrics"]["beside"]}
        assert stands == {*table.index}, kind
    assert all(kind in controlled.report.read_text() for kind in ("PCA", "decoder rows permuted", "random weights"))


def test_the_dead_window_of_a_null_is_the_split_and_one_that_diverged_is_no_control():
    made = SimpleNamespace(manifest={"nulls": {"a": {"kind": "permuted", "made": True}, "b": {"made": False}}})
    seen = SimpleNamespace(manifest={"metrics": {"a": {"fvu": 0.5, "never_fired_fraction": 0.25}}})
    found = metrics_of_nulls(made, seen)
    measured = {"fvu": 0.5, "never_fired_fraction": 0.25}
    assert found == {"a": {**measured, "sae_id": "a", "dead_fraction": 0.25, "kind": "permuted", "made": True}}
    made.manifest["nulls"]["a"]["kind"] = "pca"
    assert metrics_of_nulls(made, seen)["a"]["dead_fraction"] == 0, "what never fires can be left out of PCA"


def test_the_untrained_model_s_sae_reads_that_model_and_becomes_the_probes_baseline(controlled):
    store, other = controlled.subject().store, controlled.untrained_model(controlled.best).store
    assert controlled.stage("store") == store.path != other.path
    assert store.manifest["model"]["weights"] != other.manifest["model"]["weights"]
    assert [shard.rows for shard in store.shards] == [shard.rows for shard in other.shards]
    name = next(
        n for n, f in controlled.nulls.items() if f["kind"] == "untrained_model" and f["architecture"] == "relu"
    )
    measured = controlled.decision["controls"][name]["metrics"]
    x = other.head(other.sites[0], "validation", 10**9).double()
    error = (x - formats.load(controlled.path / "nulls" / name)(x.float()).double()).square().sum()
    assert measured["fvu"] == pytest.approx((error / (x - x.mean(0)).square().sum()).item(), rel=1e-6)

    table = pd.read_parquet(controlled.path / "probes" / "probes.parquet")
    assert set(table["input"]) >= {"sae", "raw", "untrained_model"} and set(table["status"]) == {"measured"}
    assert json.loads((controlled.path / "probes" / "probes.json").read_text())["sae_id"] == controlled.best
    assert 'id="probes"' in controlled.report.read_text()


def test_other_nulls_train_no_sae_again_and_a_second_run_makes_none(controlled, nulls_job, tmp_path):
    again = job("--config", str(write_config(tmp_path / "c.yaml", nulls_job.model_dump(mode="json"))))
    assert again.returncode == 0 and "Ray:" not in again.stdout, again.stderr
    asked = nulls_job.evaluation.model_copy(update={"nulls": ("random_encoder", "pca")})
    fewer = nulls_job.model_copy(update={"evaluation": asked})
    run = raysae.run_sweep(fewer.model_copy(update={"probes": ProbesConfig()}))
    assert run.path != controlled.path and sae_hashes(run.path) == sae_hashes(controlled.path)
    assert {c["metrics"]["kind"] for c in run.decision["controls"].values()} == {"random_encoder", "pca"}
    assert not (run.path / "probes").exists() and 'id="probes"' not in run.report.read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes: one clear line, nothing half-written


def mistakes(tmp_path: Path) -> dict[str, tuple[dict, str]]:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "answer": "a\\n#### 1"}\n{"question": 3}\n')
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    prose = tmp_path / "prose.txt"
    prose.write_text("\n\n".join(f"number{n} and some words{n}" for n in range(8)))
    half, wide, null = (tmp_path / name for name in ("half.jsonl", "wide.jsonl", "null.jsonl"))
    half.write_text(r'{"question": "a \ud800 b"}')
    wide.write_text('{"question": "a b"}', encoding="utf-16")
    null.write_text('{"question": "a b"}\n{"question": null}')
    small, vision = tmp_path / "small", tmp_path / "vision"
    config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(small)
    build_tokenizer().save_pretrained(small)
    LlavaConfig(text_config=config).save_pretrained(vision)
    unmeasured = tmp_path / "unmeasured.yaml"
    unmeasured.write_text(GATE.read_text().replace("must_beat: random_encoder", "must_beat: pca", 1))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "gpt2"}')
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    return {
        "missing file": ({"data": {"source": "gsm8k", "path": str(tmp_path / "none.jsonl")}}, "none.jsonl"),
        "malformed row": ({"data": {"source": "gsm8k", "path": str(bad)}}, "bad.jsonl:2"),
        "empty": ({"data": {"source": "text", "path": str(empty)}}, "empty.txt"),
        "surrogate": ({"data": {"source": "dataset", "path": str(half)}}, "half.jsonl:1: \\ud800"),
        "utf-16": ({"data": {"source": "dataset", "path": str(wide)}}, "wide.jsonl: not UTF-8"),
        "null": (
            {"data": {"source": "dataset", "path": str(null)}},
            "null.jsonl row 1: data.columns.question holds None",
        ),
        "vocabulary": ({"model": {"name": str(small)}}, "model.tokenizer: "),
        "vision": ({"model": {"name": str(vision)}}, "is a llava around a llama"),
        "unknown site": ({"capture": {"sites": ["blocks.9.resid_post"]}}, "capture.sites"),
        "context": ({"data": {"context_length": 4096}}, "data.context_length"),
        "pickle": ({"model": {"name": str(pickled)}}, "pickle"),
        "gpus": ({"cluster": {"num_gpus": 99}}, "cluster.num_gpus"),
        "expansion": ({"sweep": {"expansion_factors": [-4]}}, "sweep.expansion_factors"),
        "l1": ({"sweep": {"l1_coefficients": [0]}}, "sweep.l1_coefficients"),
        "architecture": ({"sweep": {"architectures": ["linear"]}}, "sweep.architectures: 'linear' is not allowed"),
        "batch": ({"training": {"batch_size": 0}}, "training.batch_size"),
        "gate": ({"gate": str(tmp_path / "no.yaml")}, "gate"),
        "null control": ({"gate": str(unmeasured)}, "evaluation.nulls: untrained, random_encoder lacks pca"),
        "labels": (
            {"data": {"source": "text", "path": str(prose)}, "probes": {"labels": ["operation"]}},
            "probes.labels: none",
        ),
    }


@pytest.mark.parametrize("name", [
    "missing file", "malformed row", "empty", "unknown site", "context", "pickle", "gpus", "expansion", "l1", "batch",
    "gate", "architecture", "null control", "labels", "surrogate", "utf-16", "null", "vocabulary", "vision",
])  # fmt: skip
def test_a_mistake_gets_one_line(ray_cluster, arithmetic_model, tmp_path, name):
    changes, named = mistakes(tmp_path)[name]
    output = tmp_path / "results"
    with pytest.raises(UserError) as caught:
        raysae.run_sweep(validate(raysae.SweepJob, small_values(arithmetic_model, output, **changes)))
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert not list(output.glob("*/config.yaml"))
    if name != "gpus":  # which is known once the cluster is there
        made = {path.name.split("-")[0] for path in output.glob("stages/*")} - {".locks"}
        assert made == {"labels": {"records"}, "vocabulary": {"records", "tokens"}}.get(name, set())


def test_a_mistake_exits_with_2_and_prints_one_line(tmp_path):
    wrong = job("--training.tokens", "0", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "error: training.tokens: '0' is not allowed; input should be greater than 0"
    assert list(tmp_path.iterdir()) == []


def test_relative_output_in_a_jobs_folder_is_refused(tmp_path):
    folder = tmp_path / "_ray_pkg_0123"
    folder.mkdir()
    wrong = job(cwd=folder)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: output:")
    assert list(folder.iterdir()) == []


def test_a_run_of_another_config_is_refused(run, arithmetic_model, output):
    name = run.path.name
    with pytest.raises(UserError, match="belongs to another config"):
        raysae.run_sweep(small_job(arithmetic_model, output, run=name, training={"tokens": 80_000}))


def test_non_finite_activations_are_refused(ray_cluster, arithmetic_model, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in arithmetic_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["transformer.h.0.mlp.c_proj.bias"][3] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "results"
    with pytest.raises(UserError, match="max_non_finite_fraction"):
        raysae.run_sweep(small_job(broken, output))
    assert not list(output.glob("stages/store-*/manifest.json"))


def test_a_damaged_store_is_refused(ray_cluster, run, arithmetic_model, output, tmp_path):
    import shutil

    copy = tmp_path / "results"
    shutil.copytree(output, copy, symlinks=True)
    shard = next((stage_of(copy, "store") / "blocks.1.resid_post").glob("train-*.safetensors"))
    content = np.fromfile(shard, dtype=np.uint8)
    content[-1] ^= 1
    content.tofile(shard)
    with pytest.raises(UserError, match="does not match its sha256"):
        raysae.run_sweep(small_job(arithmetic_model, copy, training={"tokens": 20_000}))


def test_seeds_transfer_and_risk_are_measured(ray_cluster, arithmetic_model, tmp_path):
    from raysae.data import arithmetic

    own = small_job(arithmetic_model, tmp_path / "results").data
    away = tmp_path / "away.jsonl"
    shared = [p for p in arithmetic.generate(own.examples or 0, 0, "held_out")][:7]  # also in the run's own data
    away.write_text("".join(
        json.dumps({"question": p.question, "answer": p.answer}) + "\n"
        for p in [*shared, *arithmetic.generate(60, 5, "train")]
    ))  # fmt: skip
    gate = tmp_path / "gate.yaml"
    gate.write_text(
        "name: seeds\ncriteria:\n"
        "  - {criterion: sparse, metric: l0_fraction, op: <=, threshold: 0.5, why: every gate has one}\n"
        "  - {criterion: seeds agree, metric: stability_mmcs, op: '>=', threshold: 0.1, confidence: interval, "
        "must_beat: untrained, why: more than chance}\n"
        "assumptions:\n  - {assumption: rows are a sample, if_wrong: all is, checked_by: nobody}\n"
    )
    run = raysae.run_sweep(small_job(
        arithmetic_model, tmp_path / "results", gate=str(gate), transfer={"away": {"source": "gsm8k", "path": str(away)}},
        sweep={"architectures": ["topk"], "expansion_factors": [2], "seeds": [0, 1, 2]}, evaluation={"invariance": 9},
        capture={"rows_per_shard": 40_000}, training={"tokens": 20_000, "rungs": 2},
    ))  # fmt: skip
    assert run.go, run.decision["reason"]  # the control has the null's stability, so it fails and the gate stands
    (control,) = (c for c in run.decision["controls"].values() if c["metrics"]["kind"] == "untrained")
    assert 0 < control["metrics"]["stability_mmcs"] < run.table["stability_mmcs"].min()
    assert [c["value"] for c in run.decision["test"]["criteria"]][1] == run.decision["criteria"][1]["value"]

    stability = json.loads((run.path / "stability.json").read_text())
    (entry,) = stability["configurations"]
    assert entry["seeds"] == [0, 1, 2] and len(pd.read_parquet(run.path / "stability.parquet")) == 1
    assert (run.table["stability_mmcs_low"] < run.table["stability_mmcs"]).all()

    transfer = json.loads((run.path / "transfer.json").read_text())["away"]
    assert transfer["left_out"] >= 7 and transfer["examples"] == 67 - transfer["left_out"]
    assert next(iter(transfer["saes"])) == run.best and {*transfer["saes"]} == {*run.table["sae_id"]}
    (other,) = {*(tmp_path / "results" / "stages").glob("store-*")} - {run.stage("store")}
    store = Store(other)
    x = store.head(store.sites[0], "test", 10**9).double()
    x_hat = run.sae()(x.float()).double()
    fvu = ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert transfer["saes"][run.best]["fvu"]["away"] == pytest.approx(fvu, rel=1e-6)
    assert transfer["saes"][run.best]["fvu"]["home"] == run.table.set_index("sae_id").at[run.best, "fvu"]

    kinds = {k["kind"]: k for k in json.loads((run.path / "invariance.json").read_text())["kinds"]}
    assert set(kinds) == {"whitespace", "names", "numbers"} and all(k["compared"] for k in kinds.values())
    domains = pd.read_parquet(run.path / "domains.parquet")
    rows = domains[domains["sae_id"] == run.best]
    assert rows["n_rows"].sum() == run.table.set_index("sae_id").at[run.best, "n_rows"]
    assert run.decision["assumptions"][0]["checked_by"] == "nobody"
    page = run.report.read_text()
    assert all(words in page for words in ("Recurring variance", "Names swapped", "rows are a sample", "away</b>"))
    assert run.stage("store").name.startswith("store-")  # later jobs read the run's own, not the other dataset's


def test_a_mistake_in_a_dataset_to_transfer_to_shows_before_capture(ray_cluster, arithmetic_model, tmp_path):
    wrong = small_job(arithmetic_model, tmp_path, transfer={"away": {"source": "gsm8k", "path": "nowhere.jsonl"}})
    with pytest.raises(UserError, match=r"^transfer\.away\.path: no file nowhere\.jsonl"):
        raysae.run_sweep(wrong)
    same = small_job(arithmetic_model, tmp_path, transfer={"away": {"source": "arithmetic", "examples": 50}})
    with pytest.raises(UserError, match=r"^transfer\.away\.source: every example is in the run's own data"):
        raysae.run_sweep(same)
    assert not list(tmp_path.glob("stages/store-*"))
