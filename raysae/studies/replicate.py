"""Run a finished run again from what it recorded, into an empty output root, and compare the two.

Nothing is reused: records, tokens, the embedded model, activations and SAEs are made anew. The SAEs are those that the run
trained (`sweep.replay`), not what a search would propose this time, since that depends on which trial ends first.

Three outcomes. *identical*: data, tokens, model, every shard of the store and every SAE's weights have the same bits, and
every number is the same; on a CPU with the same packages and number of threads nothing less is expected. *within*: bits
differ, but verdict and chosen SAE are the same and no metric left the original's interval, or, where it has none,
TOLERANCE. *differs*: all else. Intervals are about the data, not about another training, so that *within* is the stricter
reading of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from raysae import run_folder
from raysae.artifacts import read_manifest
from raysae.config.jobs import SweepJob
from raysae.config.load import validate
from raysae.errors import UserError
from raysae.files import read_json, sha256_of, write_json
from raysae.progress import say
from raysae.run import Run
from raysae.sae.architectures import COEFFICIENTS
from raysae.sae.formats.saelens import WEIGHTS
from raysae.studies.study import MADE_FROM, bench_of, differences
from raysae.studies.sweep import SweepStudy
from raysae.sweep.replay import replay

if TYPE_CHECKING:
    from raysae.bench import Bench

TOLERANCE, SMALL = 0.05, 0.01
"""How far a metric without interval may move: relatively, or absolutely if that is more (shares near 0)."""
SETTINGS = ("d_in", "d_sae", "expansion_factor", *COEFFICIENTS, "seed", "learning_rate")
NOT_METRICS = {
    *SETTINGS, "sae_id", "site", "architecture", "status", "status_reason", "train_seconds", "pareto", "passes_gate",
}  # fmt: skip
OUTCOME = "replication.json"
MARK = "replication-of.json"


def replicate(run: Run, output: Path | None = None, exact: bool = False, bench: Bench | None = None) -> dict[str, Any]:
    """Replicate `run` below the root `output` and return what `compare` found, also in `<run>/replication.json`.

    `output` defaults to `replications/<run>` beside the run. It must be empty, or hold an unfinished replication of this
    run, which then goes on. `replicates` in the result is what the exit status says: not *differs*, and *identical* if
    `exact`. UserError, before anything runs, where the data, the gate or another file of then is not what it was.
    """
    original = run.path.resolve()
    output = (output or original.parent / "replications" / original.name).absolute()
    config = validate(SweepJob, run.config, where=str(run.path / "config.yaml"))
    config = config.model_copy(update={"output": output, "run": original.name, "require_go": False, "plan": False})
    _check_output(output, original)
    manifest = read_manifest(run.stage("records"))
    run.stage("store"), run.stage("tokens")  # to compare with
    with bench_of(config, bench) as bench:
        study = SweepStudy(config, bench, replay(run.table))
        _check_sources(run, study, manifest["inputs"].get("source_hash"))
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / MARK, {"run": str(original)})
        again = study.run()
    found = compare(run, again)
    good = ("identical",) if exact else ("identical", "within")
    found = {**found, "exact": exact, "replicates": found["outcome"] in good}
    run_folder.add(run.path, lambda folder: write_json(folder / OUTCOME, found), [OUTCOME], shown=False)
    say(f"compared with {again.path}: {run.path / OUTCOME}")
    return found


def _check_sources(run: Run, study: SweepStudy, source_hash: str | None) -> None:
    """Refuse a replication whose config, gate, data or model is not what it was."""
    was, now = read_json(run.path / "identity.json"), study.identity()
    made_from = was.pop(MADE_FROM, {}), now.pop(MADE_FROM)
    changed = list(differences(was, now))
    if changed:
        raise UserError(
            f"{changed[0]}: is not what it was when {run.path} was made; replicate with the files and the raysae of then"
        )
    if made_from[1]["data.path"] != source_hash:
        raise UserError(
            f"data.path: {study.job.data.path} has changed since {run.path} was made (hash {source_hash} then, "
            f"{made_from[1]['data.path']} now); bring back the data of then"
        )
    changed = [what for what, content in made_from[0].items() if made_from[1].get(what) != content]
    if changed:
        raise UserError(f"{changed[0]}: its content has changed since {run.path} was made; bring back that of then")


def _check_output(output: Path, original: Path) -> None:
    """Refuse a root whose stages could be taken for the replication's own."""
    if not output.is_dir() or not any(output.iterdir()):
        return
    mark = output / MARK
    if not mark.is_file() or read_json(mark)["run"] != str(original):
        raise UserError(f"output: {output} is not empty; a replication reuses nothing, give another --output")
    if (output / original.name / "decision.json").exists():
        raise UserError(f"output: {output} holds a finished replication; delete it, or give another --output")


def compare(one: Run, two: Run) -> dict[str, Any]:
    """Two runs of one config, file by file and number by number.

    Keys: outcome; checks (check, original, replicated, same, decides); saes (sae_id, status and weights, same or not);
    metrics (per column: compared, identical, inside, outside, largest_difference, rule); outside (each value that left its
    interval or tolerance); environment (what differs, by name); expected_identical.
    """
    environments = [_environment(run.path) for run in (one, two)]
    differing = {
        key: [e.get(key) for e in environments]
        for key in sorted({*environments[0], *environments[1]})
        if environments[0].get(key) != environments[1].get(key)
    }
    checks = list(_checks(one, two))
    saes = list(_saes(one, two))
    metrics, outside = _metrics(one.table, two.table)
    holds = all(check["same"] for check in checks if check["decides"]) and not outside
    identical = (
        holds
        and all(check["same"] for check in checks)
        and all(sae["same_weights"] for sae in saes if sae["same_weights"] is not None)
        and all(metric["identical"] == metric["compared"] for metric in metrics)
    )
    return {
        "run": str(one.path.resolve()),
        "replicated": str(two.path.resolve()),
        "outcome": "identical" if identical else "within" if holds else "differs",
        "expected_identical": not differing and not one.ledger["total"]["gpu_seconds"],
        "environment": differing,
        "checks": checks,
        "saes": saes,
        "metrics": metrics,
        "outside": outside,
        "tolerance": {"relative": TOLERANCE, "absolute": SMALL},
    }


def _environment(path: Path) -> dict[str, Any]:
    """What bits may depend on: code, Python, torch, processor, threads, GPUs, settings."""
    file = path / "environment.json"
    if not file.is_file():
        return {"recorded": False}
    e = read_json(file)
    packages = {f"package {name}": e["packages"].get(name) for name in ("torch", "numpy", "transformers", "ray")}
    names = ("raysae", "python", "platform", "cpu", "cpus", "threads", "gpus", "cuda", "settings")
    return {"recorded": True, **{name: e[name] for name in names}, **packages}


def _checks(one: Run, two: Run) -> Iterator[dict[str, Any]]:
    """What must be the same (`decides`), or would be if every bit were."""

    def check(name: str, value: Any, decides: bool = False) -> dict[str, Any]:
        original, replicated = (value(run) for run in (one, two))
        return {
            "check": name, "original": original, "replicated": replicated, "same": original == replicated,
            "decides": decides,
        }  # fmt: skip

    def files(run: Run, stage: str) -> dict[str, str]:
        return {
            name: value
            for part in read_manifest(run.stage(stage))["blocks" if stage == "tokens" else "shards"]
            for name, value in ({part["file"]: part["sha256"]} if stage == "tokens" else part["sha256"]).items()
        }

    def counted(name: str, stage: str) -> dict[str, Any]:
        a, b = (files(run, stage) for run in (one, two))
        same = sum(a.get(key) == b.get(key) for key in {*a, *b})
        return {
            "check": name, "original": f"{len(a)} files", "replicated": f"{same} the same of {len(b)}", "same": a == b,
            "decides": False,
        }  # fmt: skip

    # The sweep's own directory is named by its inputs, of which a replay is one; its SAEs are compared instead.
    for stage in ("records", "tokens", "store"):
        yield check(f"directory of {stage}", lambda run, s=stage: run.stage(s).name)
    yield check("data: sha256 of the records", lambda run: sha256_of(run.stage("records") / "records.parquet"), True)
    yield counted("tokens: sha256 of each block", "tokens")
    yield check("model: hash of weights and config", lambda run: _model(read_json(run.path / "store.json")["model"]))
    yield counted("activations: sha256 of each file of the store", "store")
    yield check("SAEs and what became of them", lambda run: _statuses(run.table), True)
    yield check("settings of each SAE", lambda run: _settings(run.table), True)
    yield check("verdict", lambda run: run.decision["verdict"], True)
    yield check("chosen SAE of each site", _chosen, True)


def _chosen(run: Run) -> str:
    choices = run.decision.get("choices") or {"": run.decision}
    return ", ".join(str(choice["chosen"]) for choice in choices.values())


def _model(facts: Mapping[str, Any]) -> str:
    return " ".join(str(facts[key]) for key in ("revision", "weights", "config") if facts.get(key))


def _settings(table: pd.DataFrame) -> dict[str, list[str]]:
    """By SAE, what it was asked to be; as text, so that an absent coefficient equals itself."""
    names = [name for name in SETTINGS if name in table]
    return {str(row["sae_id"]): [repr(float(row[name])) for name in names] for row in table.to_dict("records")}


def _statuses(table: pd.DataFrame) -> dict[str, str]:
    return dict(zip(table["sae_id"].astype(str), table["status"].astype(str), strict=True))


def _saes(one: Run, two: Run) -> Iterator[dict[str, Any]]:
    """Each SAE of either run; `same_weights` is None where neither run has weights of it."""
    statuses = [_statuses(run.table) for run in (one, two)]
    for sae_id in sorted({*statuses[0], *statuses[1]}):
        files = [run.path / "saes" / sae_id / WEIGHTS for run in (one, two)]
        hashes = [sha256_of(file) if file.is_file() else None for file in files]
        yield {
            "sae_id": sae_id,
            "status": [s.get(sae_id) for s in statuses],
            "same_weights": None if hashes == [None, None] else hashes[0] == hashes[1],
        }


def _metrics(one: pd.DataFrame, two: pd.DataFrame) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every numeric column of both tables, SAE by SAE; and each value that is outside of what the original allows."""
    a, b = (t.set_index(t["sae_id"].astype(str)) for t in (one, two))
    shared = [sae_id for sae_id in a.index if sae_id in b.index]
    numeric = [c for c in a if c not in NOT_METRICS and c in b and not str(c).endswith(("_low", "_high"))]
    summary, outside = [], []
    for column in numeric:
        low, high = f"{column}_low", f"{column}_high"
        has_interval = low in a and high in a
        counts = {"compared": 0, "identical": 0, "inside": 0, "outside": 0}
        largest = 0.0
        for sae_id in shared:
            value, again = (float(t.at[sae_id, column]) for t in (a, b))
            if math.isnan(value) and math.isnan(again):
                continue
            bounds = (float(a.at[sae_id, low]), float(a.at[sae_id, high])) if has_interval else (math.nan, math.nan)
            if math.isnan(bounds[0]):  # stopped early: a value without interval
                room = max(TOLERANCE * abs(value), SMALL)
                bounds = (value - room, value + room)
            same = value == again
            inside = same or bounds[0] <= again <= bounds[1]
            counts["compared"] += 1
            counts["identical"] += same
            counts["inside" if inside else "outside"] += 1
            largest = max(largest, 0.0 if same else abs(again - value))
            if not inside:
                outside.append({
                    "sae_id": sae_id, "metric": str(column), "original": value, "low": bounds[0], "high": bounds[1],
                    "replicated": again,
                })  # fmt: skip
        if counts["compared"]:
            rule = "interval" if has_interval else "tolerance"
            summary.append({"metric": str(column), **counts, "largest_difference": largest, "rule": rule})
    return summary, outside


def in_words(found: Mapping[str, Any]) -> str:
    """The comparison as lines: checks, metrics, what lies outside, the outcome."""
    lines = []
    for check in found["checks"]:
        shown = [
            str(v) if not isinstance(v, dict) else f"{len(v)} SAEs" for v in (check["original"], check["replicated"])
        ]
        mark = "same" if check["same"] else "DIFFERS" if check["decides"] else "differs"
        lines.append(f"{mark:8} {check['check']}: {shown[0] if check['same'] else ' | '.join(shown)}")
    weights = [sae["same_weights"] for sae in found["saes"] if sae["same_weights"] is not None]
    same = sum(weights)
    lines.append(
        f"{'same' if same == len(weights) else 'differs':8} weights of SAEs: {same} of {len(weights)} to the bit"
    )
    lines.append("")
    lines.append(f"{'metric':32}{'SAEs':>6}{'same':>6}{'inside':>8}{'outside':>9}  {'largest difference':<20}rule")
    for m in found["metrics"]:
        lines.append(
            f"{m['metric']:32}{m['compared']:>6}{m['identical']:>6}{m['inside']:>8}{m['outside']:>9}  "
            f"{m['largest_difference']:<20.3g}{m['rule']}"
        )
    for o in found["outside"][:20]:
        lines.append(
            f"outside: {o['sae_id']} {o['metric']} {o['original']:.6g} [{o['low']:.6g}, {o['high']:.6g}], "
            f"now {o['replicated']:.6g}"
        )
    lines.append("")
    if found["environment"]:
        lines.append(f"the environments differ in {', '.join(found['environment'])}")
    meaning = {
        "identical": "IDENTICAL: every bit and every number is the same",
        "within": "WITHIN: the same verdict and SAE, every metric within its interval or tolerance; bits differ",
        "differs": "DIFFERS: it does not replicate",
    }
    lines.append(meaning[found["outcome"]])
    if found["expected_identical"] and found["outcome"] != "identical":
        lines.append("the environments are the same, so identical bits were expected")
    return "\n".join(lines)
