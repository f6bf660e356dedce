"""A run made again from what it recorded: the same bits, or exactly what differs; a plan and a bundle of the same run."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile

import pytest
from small import reseal, sae_hashes, small_job, small_values, study

import raysae
from raysae.bundle import bundle
from raysae.config.load import dump_yaml, validate
from raysae.errors import UserError
from raysae.files import plain, read_json, read_sealed, write_json, write_sealed
from raysae.plan.schedule import Kind
from raysae.studies.plan import plan, to_time
from raysae.studies.replicate import compare, differences, in_words, replicate
from raysae.studies.sweep import SweepStudy
from raysae.sweep.space import Proposal

SEARCHED = {"search": "optuna", "samples": 2, "prune": {"enabled": True, "grace_fraction": 0.2, "margin": 0.0}}


@pytest.fixture(scope="module")
def run(ray_cluster, arithmetic_model, tmp_path_factory) -> raysae.Run:
    """A search with pruning: what it proposed and what it stopped hung on which trial reported first."""
    return raysae.run_sweep(small_job(arithmetic_model, tmp_path_factory.mktemp("results"), sweep=SEARCHED))


@pytest.fixture
def copy(run, tmp_path):
    """The run and its stages, to be altered."""
    shutil.copytree(run.path.parent, tmp_path / "results", symlinks=True)
    return raysae.Run.open(tmp_path / "results" / run.path.name)


@pytest.fixture
def nothing_runs(monkeypatch):
    """What should be refused before anything runs fails at once where it is not."""

    def run(self):
        raise AssertionError("the replication has started")

    monkeypatch.setattr(SweepStudy, "run", run)


def alter(run: raysae.Run, sae: int, **values) -> raysae.Run:
    table = run.table.copy()
    for column, value in values.items():
        table.loc[sae, column] = value
    table.to_parquet(run.path / "table.parquet", index=False)
    reseal(run.path)
    return raysae.Run.open(run.path)


# ----------------------------------------------------------------------------------------------------------------------
# Replication


@pytest.mark.slow
def test_a_searched_run_replicates_to_the_bit(run, copy):
    """Also one SAE that was stopped early: it is stopped at the same rung, and is not chosen this time either."""
    rung = copy.curves.query("sae_id == @copy.table.sae_id[0]").sort_values("tokens").iloc[1]
    stopped = {"status": "pruned", "status_reason": "dominated", "tokens": int(rung["tokens"])}
    pruned = alter(copy, 0, **stopped)
    found = replicate(pruned, exact=False)
    assert "same weights" not in found and all(sae["same_weights"] for sae in found["saes"][1:])
    again = raysae.Run.open(found["replicated"])
    row = again.table.set_index("sae_id").loc[pruned.table["sae_id"][0]]
    assert (row["status"], row["status_reason"], row["tokens"]) == ("pruned", "dominated", rung["tokens"])
    assert read_json(copy.path / "replication.json") == plain(found)
    assert found["environment"] == {} and found["expected_identical"]
    same = {check["check"]: check["same"] for check in found["checks"]}
    assert all(same.values()), same
    left = {k: v for k, v in sae_hashes(run.path).items() if k != row.name}
    assert sae_hashes(again.path) == left
    with pytest.raises(UserError, match="holds a finished replication"):
        replicate(pruned)


def test_a_run_compared_with_itself_is_identical(run):
    found = compare(run, run)
    assert found["outcome"] == "identical" and found["outside"] == []
    compared = {m["metric"]: m for m in found["metrics"]}
    assert compared["fvu"]["identical"] == compared["fvu"]["compared"] == len(run.table)
    assert compared["fvu"]["rule"] == "interval" and compared["dead_fraction"]["rule"] == "tolerance"
    assert "train_seconds" not in compared
    assert "IDENTICAL" in in_words(found)


def test_a_metric_inside_its_interval_replicates_and_outside_does_not(run, copy):
    row = run.table.iloc[0]
    inside = compare(run, alter(copy, 0, fvu=(row["fvu"] + row["fvu_high"]) / 2))
    assert inside["outcome"] == "within"
    outside = compare(run, alter(copy, 0, fvu=row["fvu_high"] * 1.01))
    assert outside["outcome"] == "differs"
    (left,) = outside["outside"]
    assert (left["sae_id"], left["metric"]) == (row["sae_id"], "fvu") and left["original"] == row["fvu"]
    assert "DIFFERS" in in_words(outside) and "outside: " in in_words(outside)


def test_a_metric_without_interval_has_a_tolerance(run, copy):
    value = run.table["ce_clean"][0]
    assert compare(run, alter(copy, 0, ce_clean=value * 1.04))["outcome"] == "within"
    assert compare(run, alter(copy, 0, ce_clean=value * 1.06))["outcome"] == "differs"


@pytest.mark.parametrize("change", ["weights", "verdict", "status", "setting", "store"])
def test_what_is_not_a_metric_counts_too(run, copy, change):
    expected = "differs"
    if change == "weights":
        file = next((copy.path / "saes").glob("*/sae_weights.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.unlink()  # a link to the stage's
        file.write_bytes(content)
        expected = "within"
    elif change == "verdict":
        write_json(copy.path / "decision.json", {**copy.decision, "verdict": "go" if not copy.go else "no-go"})
    elif change == "status":
        copy = alter(copy, 0, status="diverged")
    elif change == "setting":
        copy = alter(copy, 0, learning_rate=copy.table["learning_rate"][0] * 1.001)
    else:
        manifest = copy.stage("store") / "manifest.json"
        facts = read_sealed(manifest)
        first = facts["shards"][0]["sha256"]
        first[next(iter(first))] = "0" * 64
        write_sealed(manifest, facts)
        expected = "within"
    reseal(copy.path)
    assert compare(run, raysae.Run.open(copy.path))["outcome"] == expected


def test_changed_data_is_refused_before_anything_runs(nothing_runs, copy, arithmetic_model, tmp_path):
    source = tmp_path / "texts.txt"
    source.write_text("one text\n\nanother text\n")
    values = small_values(
        arithmetic_model, copy.path.parent, sweep=SEARCHED, data={"source": "text", "path": str(source)}
    )
    config = validate(raysae.SweepJob, values)
    (copy.path / "config.yaml").write_text(dump_yaml(config))
    then = study(config.model_copy(update={"run": "another"}))
    write_json(copy.path / "identity.json", then.identity())
    manifest = copy.stage("records") / "manifest.json"
    write_sealed(manifest, {**read_sealed(manifest), "inputs": {"source_hash": then.made_from["data.path"]}})
    reseal(copy.path)
    source.write_text("one text\n\nanother text, changed\n")
    with pytest.raises(UserError, match=r"data\.path: .*texts\.txt has changed since") as caught:
        replicate(raysae.Run.open(copy.path))
    assert "\n" not in str(caught.value)
    assert not (copy.path.parent / "replications").exists() and not (copy.path / "replication.json").exists()


def test_another_gate_is_refused(nothing_runs, copy):
    identity = read_json(copy.path / "identity.json")
    identity["gate"]["criteria"][0]["threshold"] = 0.5
    write_json(copy.path / "identity.json", identity)
    reseal(copy.path)
    with pytest.raises(UserError, match=r"gate\.criteria: is not what it was"):
        replicate(copy)


def test_a_folder_with_something_in_it_is_refused(nothing_runs, copy, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"output: .*full is not empty"):
        replicate(copy, tmp_path / "full")


def test_fields_that_came_later_are_no_difference():
    then, now = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 2, "d": 4, "new": 0}, "new": 1}
    assert list(differences(then, now)) == ["b.d"]
    assert list(differences(then, {"a": 1})) == ["b"]


# ----------------------------------------------------------------------------------------------------------------------
# Bundle


def test_the_bundle_holds_what_an_auditor_needs_with_its_hashes(run, tmp_path):
    path = bundle(run, tmp_path / "run.tar.gz")
    with tarfile.open(path) as archive:
        content = {m.name.split("/", 1)[1]: archive.extractfile(m).read() for m in archive.getmembers()}
    manifest = json.loads(content["MANIFEST.json"])
    for name in ("config.yaml", "identity.json", "environment.json", "ledger.json", "decision.json", "table.parquet",
                 "report.html", "store.json", "curves.parquet"):  # fmt: skip
        assert name in content, name
    assert any(name.startswith("figures/") for name in content)
    assert set(content) == {"MANIFEST.json", *manifest["members"]}
    for name, facts in manifest["members"].items():
        assert facts == {"sha256": hashlib.sha256(content[name]).hexdigest(), "bytes": len(content[name])}
    stages = [json.loads(text)["stage"] for name, text in content.items() if name.startswith("stages/")]
    assert {"records", "tokens", "store", "sweep", "evaluation"} <= set(stages)
    nulls = {name for name in manifest["weights"] if name.startswith("control-")}
    assert nulls == {file.name for file in (run.path / "nulls").iterdir()} and nulls
    assert {i: made for i, made in manifest["weights"].items() if i not in nulls} == sae_hashes(run.path)
    assert not any(name.endswith(".safetensors") or name.startswith("tune/") for name in content)
    assert not content["environment.json"].startswith(b"{}") and json.loads(content["environment.json"])["packages"]


def test_the_same_run_gives_the_same_bundle(run, copy, tmp_path, monkeypatch):
    """Whatever the time, its files' times and links to elsewhere are; with weights only where they are asked for."""
    one = bundle(run, tmp_path / "one.tar.gz")
    monkeypatch.setattr("time.time", lambda: 1e9)
    for file in sorted(copy.path.rglob("*"), reverse=True):
        if file.is_file():
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(content)
    (copy.path / "elsewhere.txt").symlink_to(__file__)
    two = bundle(copy, tmp_path / "two.tar.gz")
    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(bundle(run, tmp_path / "weights.tar.gz", weights=True)) as archive:
        held = sum(name.endswith("sae_weights.safetensors") for name in archive.getnames())
    assert held == len(run.saes) + len(list((run.path / "nulls").iterdir()))


@pytest.mark.parametrize("name,why", [("run.zip", "must end in .tar.gz"), ("no/run.tar.gz", "is not a folder")])
def test_a_wrong_place_for_a_bundle_is_refused(run, tmp_path, name, why):
    with pytest.raises(UserError, match=why):
        bundle(run, tmp_path / name)
    with pytest.raises(UserError, match="inside the run"):
        bundle(run, run.path / "run.tar.gz")


# ----------------------------------------------------------------------------------------------------------------------
# Ledger and plan


def test_another_budget_reaches_the_ledger_of_a_finished_run(copy, arithmetic_model):
    assert copy.ledger["budget"]["tokens"]["limit"] is None
    changed = {"sweep": SEARCHED, "budget": {"tokens": 10**7}}
    again = raysae.run_sweep(small_job(arithmetic_model, copy.path.parent, **changed))
    budget = read_json(again.path / "ledger.json")["budget"]
    assert again.path == copy.path and budget["tokens"]["limit"] == 10**7
    assert budget["tokens"]["before"] == budget["tokens"]["spent"] == copy.ledger["total"]["tokens"]
    assert budget["gigabytes"]["activations"] > 0 and budget["device_hours"]["spent"] > 0


@pytest.mark.slow
def test_a_plan_projects_the_exact_counts_and_leaves_no_trace_of_a_run(ray_cluster, run, arithmetic_model, tmp_path):
    changed = {"sweep": SEARCHED, "budget": {"tokens": 10**7}}
    made = plan(small_job(arithmetic_model, tmp_path, **changed))
    by_stage = {entry.stage: entry for entry in made.entries}
    real = {s["stage"]: s for s in run.ledger["stages"]}
    assert list(by_stage) == ["records", "tokens", "store", "sweep", "evaluation (validation)", "evaluation (test)"]
    assert [e.done for e in made.entries] == [True, True, False, False, False, False]
    assert by_stage["store"].tokens == real["store"]["tokens"]
    assert by_stage["store"].bytes == pytest.approx(real["store"]["bytes"], rel=0.1)
    assert by_stage["sweep"].tokens == 8 * (40_000 // 512) * 512
    assert by_stage["sweep"].bytes == pytest.approx(real["sweep"]["bytes"], rel=0.5)
    assert all(e.seconds > 0 for e in made.entries) and by_stage["sweep"].cpu_seconds > 0
    assert made.budget["tokens"]["limit"] == 10**7 and "budget.tokens" in str(made)
    kept = {path.name.split("-")[0] for path in tmp_path.iterdir()} | {
        path.name.split("-")[0] for path in (tmp_path / "stages").iterdir() if path.name != ".locks"
    }
    assert kept == {"stages", "records", "tokens"}


def test_the_plan_of_a_finished_run_is_all_done(run, arithmetic_model):
    made = plan(small_job(arithmetic_model, run.path.parent, sweep=SEARCHED))
    assert all(entry.done for entry in made.entries) and made.rates is None
    assert sum(entry.tokens for entry in made.entries if entry.stage == "sweep") == int(run.table["tokens"].sum())


def test_of_many_widths_three_are_timed():
    kinds = {Proposal(i, "s", "relu", i, 0.1): Kind(8, "relu", 8 * i) for i in range(1, 17)}
    assert [p.expansion_factor for p in to_time(kinds)] == [1, 9, 16]
    few = {Proposal(i, "s", "relu", i % 2 + 1, 0.1): Kind(8, "relu", 8 * (i % 2 + 1)) for i in range(6)}
    assert [p.expansion_factor for p in to_time(few)] == [1, 2]
