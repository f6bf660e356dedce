"""Which SAE, and why not the others: constraints first, then the Pareto front of FVU against L0, then the sparsest, or a
smaller one that the noise of the seeds cannot tell from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import pandas as pd

from raysae.evaluate.nulls import ELSEWHERE
from raysae.gates.criteria import Gate, Verdict, apply, kind_of, passes
from raysae.gates.waivers import Waiver
from raysae.sweep.collect import alike

RULE = (
    "Among the SAEs that meet every mandatory criterion on the validation split (but for waived ones), those on the Pareto "
    "front of FVU against L0 (at one site, no other of them has both lower); of these the one with the lowest L0, then the "
    "smallest. Where its configuration was trained with several seeds: the smallest SAE that passes at its site and has "
    "neither FVU nor L0 higher than it by more than their standard deviation over these seeds. The choice is measured once "
    "on the test split, and must meet the criteria there as well."
)


@dataclass(frozen=True)
class Choice:
    """The outcome on the validation split."""

    chosen: str | None
    closest: str | None
    """The SAE that misses least, where none passes."""
    front: list[str]
    verdicts: dict[str, list[Verdict]]
    rejected: dict[str, list[str]]
    """Why each other SAE was not chosen."""


def pareto_front(table: pd.DataFrame) -> list[str]:
    """sae_ids that no other SAE of the same site beats in both FVU and L0, by rising L0. NaN rows are never on it."""
    front: list[str] = []
    for _, rows in table.dropna(subset=["fvu", "l0"]).groupby("site", sort=True):
        best = math.inf
        for row in rows.sort_values(["l0", "fvu", "d_sae"], kind="stable").itertuples():
            if row.fvu < best:
                front.append(str(row.sae_id))
                best = float(row.fvu)
    return front


def choose(
    table: pd.DataFrame,
    gate: Gate,
    controls: Mapping[str, Mapping[str, Any]] | None = None,
    waiver: Waiver | None = None,
) -> Choice:
    """Apply `gate` to each completed SAE of the table and choose by `RULE`; controls as in `criteria.apply`."""
    rows = {str(row["sae_id"]): row for row in table.to_dict("records")}
    completed = table[table["status"] == "completed"]
    waived = waiver.criteria if waiver else ()
    verdicts = {str(i): apply(gate, rows[str(i)], controls, waived) for i in completed["sae_id"]}
    passing = completed[completed["sae_id"].map(lambda i: passes(verdicts[i])).astype(bool)]
    candidates = pareto_front(passing)
    key = {i: (rows[i]["l0"], rows[i]["d_sae"], rows[i]["fvu"]) for i in candidates}
    sparsest = min(candidates, key=lambda i: key[i], default=None)
    rejected = {i: _reasons(i, rows[i], verdicts.get(i), candidates, sparsest, rows) for i in rows}
    chosen = closest = None
    if sparsest is not None:
        noise = seed_noise(completed, rows[sparsest])
        chosen = _smallest(passing, rows[sparsest], noise)
        if chosen != sparsest:
            rejected[sparsest] = [
                f"passes, but {chosen} is smaller (d_sae {rows[chosen]['d_sae']}, not {rows[sparsest]['d_sae']}) and worse "
                f"by no more than seeds differ (standard deviation {noise['fvu']:.2g} in FVU, {noise['l0']:.2g} in L0)"
            ]
        del rejected[chosen]
    elif verdicts:
        closest = min(verdicts, key=lambda i: _miss(verdicts[i]))
    return Choice(chosen, closest, pareto_front(completed), verdicts, rejected)


def seed_noise(completed: pd.DataFrame, row: Mapping[str, Any]) -> dict[str, float]:
    """Standard deviation (n - 1) of FVU and L0 over the seeds of a row's configuration; 0 where there is only one."""
    same = alike(completed, row)
    return {metric: float(same[metric].std()) if same[metric].count() > 1 else 0.0 for metric in ("fvu", "l0")}


def _smallest(passing: pd.DataFrame, best: Mapping[str, Any], noise: Mapping[str, float]) -> str:
    """The smallest SAE at the site of `best` that is worse than it by no more than the noise; of equals, the sparsest."""
    alike = passing[passing["site"] == best["site"]]
    for metric, deviation in noise.items():
        alike = alike[alike[metric] <= best[metric] + deviation]
    return str(alike.sort_values(["d_sae", "l0", "fvu"], kind="stable")["sae_id"].iloc[0])


def _miss(verdicts: list[Verdict]) -> tuple[int, float]:
    failed = [v for v in verdicts if v.stops]
    return len(failed), sum(v.shortfall for v in failed)


def _missed(verdicts: list[Verdict]) -> list[str]:
    return [v.reason for v in verdicts if v.stops]


def _reasons(
    sae_id: str,
    row: Mapping[str, Any],
    verdicts: list[Verdict] | None,
    candidates: list[str],
    sparsest: str | None,
    rows: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    if verdicts is None:
        return [": ".join(str(part) for part in (row["status"], row["status_reason"]) if part)]
    if not passes(verdicts):
        return _missed(verdicts)
    if not (math.isfinite(row["l0"]) and math.isfinite(row["fvu"])) or sparsest is None:
        return ["passes, but its L0 or FVU was not measured"]
    if sae_id not in candidates:
        for peer in candidates:
            p = rows[peer]
            if p["site"] == row["site"] and p["l0"] <= row["l0"] and p["fvu"] <= row["fvu"]:
                return [f"passes, but {peer} has both lower L0 ({p['l0']:.4g}) and lower FVU ({p['fvu']:.4g})"]
    if rows[sparsest]["l0"] == row["l0"]:
        return [f"passes, but {sparsest} is as sparse and smaller, or as small and more faithful"]
    return [f"passes, but {sparsest} is sparser (L0 {rows[sparsest]['l0']:.4g} against {row['l0']:.4g})"]


def decide(
    gate: Gate,
    gate_path: str,
    choice: Choice,
    controls: Mapping[str, Mapping[str, Any]],
    test: Mapping[str, Any] | None,
    waiver: Waiver | None = None,
    basis: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of decision.json.

    controls: metrics of the nulls by id. A gate that lets one pass cannot tell an SAE from it and decides nothing. That
    holds for PCA and ICA too, which may be good codes: a gate that they pass has not shown what the SAE is for, and one in
    which a mandatory criterion says `must_beat: pca` they cannot pass. SAEs of an untrained model are the exception: they
    were measured on other activations, perhaps easier ones, so that they pass says nothing against the SAE, only what the
    gate does not show; the reason then says so.

    test: the chosen SAE's metrics on the test split. basis: the earlier run that this one builds on, as `read_basis` gives
    it.
    """
    waived = waiver.criteria if waiver else ()
    controls_seen = {
        i: {"metrics": dict(m), "passes_gate": passes(apply(gate, m, controls, waived))} for i, m in controls.items()
    }
    passing = [i for i, seen in controls_seen.items() if seen["passes_gate"]]
    void = [i for i in passing if kind_of(i) != ELSEWHERE]
    on_test = apply(gate, test, controls, waived) if test is not None else []
    shown = choice.chosen or choice.closest
    if choice.chosen is None:
        reason = "No SAE passes the gate. "
        missed = "; ".join(_missed(choice.verdicts[shown])) if shown else ""
        reason += f"Closest is {shown}: {missed}." if shown else "None finished its training."
    elif void:
        beat = f", or ask it to be beaten (must_beat: {kind_of(void[0])})" if kind_of(void[0]) else ""
        reason = f"The gate is void: the null {void[0]} passes it. Tighten {gate_path}{beat}."
    elif test is None:
        reason = f"{choice.chosen} passes on the validation split but was not measured on the test split."
    elif not passes(on_test):
        missed = "; ".join(_missed(on_test))
        reason = f"{choice.chosen} passes on the validation split but not on the test split: {missed}."
    else:
        spared = any(v.verdict == "waived" for v in [*choice.verdicts[choice.chosen], *on_test])
        reason = (
            f"{choice.chosen} meets every mandatory criterion{' that is not waived' if spared else ''} on the validation "
            "split and on the untouched test split."
        )
    for name in (i for i in passing if i not in void):
        reason += f" {name} passes the gate as well: nothing in it depends on what the model has learnt."
    go = choice.chosen is not None and not void and test is not None and passes(on_test)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "verdict": "go" if go else "no-go",
        "reason": reason,
        "gate": {"name": gate.name, "path": gate_path},
        "basis": dict(basis) if basis else None,
        "waiver": waiver.model_dump(mode="json") if waiver else None,
        "assumptions": [a.model_dump() for a in gate.assumptions],
        "selection": RULE,
        "chosen": choice.chosen,
        "closest": choice.closest,
        "criteria": _records(choice.verdicts[shown], "table.parquet", now) if shown else [],
        "test": {"metrics": dict(test), "criteria": _records(on_test, "decision.json", now)}
        if test is not None
        else None,
        "controls": controls_seen,
        "pareto": choice.front,
        "rejected": choice.rejected,
        "decided_at": now,
    }


def _records(verdicts: list[Verdict], evidence_path: str, decided_at: str) -> list[dict[str, Any]]:
    """Verdicts as gate records, each with the file of the run that holds its metrics."""
    return [{**v.record(), "evidence_path": evidence_path, "decided_at": decided_at} for v in verdicts]
