"""Which SAE, and why not the others: constraints first, then the Pareto front of FVU against L0, then the sparsest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import pandas as pd

from raysae.gates.criteria import Gate, Verdict, apply, passes

RULE = (
    "Among the SAEs that meet every mandatory criterion on the validation split, those on the Pareto front of FVU against "
    "L0 (at one site, no other of them has both lower); of these the one with the lowest L0, then the smallest. It is "
    "measured once on the test split, and must meet the criteria there as well."
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


def choose(table: pd.DataFrame, gate: Gate) -> Choice:
    """Apply `gate` to each completed SAE of the table and choose by `RULE`."""
    rows = {str(row["sae_id"]): row for row in table.to_dict("records")}
    completed = table[table["status"] == "completed"]
    verdicts = {str(i): apply(gate, rows[str(i)]) for i in completed["sae_id"]}
    passing = completed[completed["sae_id"].map(lambda i: passes(verdicts[i])).astype(bool)]
    candidates = pareto_front(passing)
    key = {i: (rows[i]["l0"], rows[i]["d_sae"], rows[i]["fvu"]) for i in candidates}
    chosen = min(candidates, key=lambda i: key[i], default=None)
    closest = None
    if chosen is None and verdicts:
        closest = min(verdicts, key=lambda i: _miss(verdicts[i]))
    rejected = {i: _reasons(i, rows[i], verdicts.get(i), candidates, chosen, rows) for i in rows if i != chosen}
    return Choice(chosen, closest, pareto_front(completed), verdicts, rejected)


def _miss(verdicts: list[Verdict]) -> tuple[int, float]:
    failed = [v for v in verdicts if v.mandatory and v.verdict == "fail"]
    return len(failed), sum(v.shortfall for v in failed)


def _reasons(
    sae_id: str,
    row: Mapping[str, Any],
    verdicts: list[Verdict] | None,
    candidates: list[str],
    chosen: str | None,
    rows: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    if verdicts is None:
        return [": ".join(str(part) for part in (row["status"], row["status_reason"]) if part)]
    failed = [v.in_words for v in verdicts if v.mandatory and v.verdict == "fail"]
    if failed:
        return failed
    if not (math.isfinite(row["l0"]) and math.isfinite(row["fvu"])):
        return ["passes, but its L0 or FVU was not measured"]
    if sae_id not in candidates:
        for peer in candidates:
            p = rows[peer]
            if p["site"] == row["site"] and p["l0"] <= row["l0"] and p["fvu"] <= row["fvu"]:
                return [f"passes, but {peer} has both lower L0 ({p['l0']:.4g}) and lower FVU ({p['fvu']:.4g})"]
    return [f"passes, but {chosen} is sparser (L0 {rows[chosen]['l0']:.4g} against {row['l0']:.4g})"] if chosen else []


def decide(
    gate: Gate,
    gate_path: str,
    choice: Choice,
    controls: Mapping[str, Mapping[str, Any]],
    test: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of decision.json.

    controls: metrics of untrained SAEs; a gate that lets one pass cannot tell a good SAE and decides nothing. test: the
    chosen SAE's metrics on the test split.
    """
    controls_seen = {i: {"metrics": dict(m), "passes_gate": passes(apply(gate, m))} for i, m in controls.items()}
    void = [i for i, seen in controls_seen.items() if seen["passes_gate"]]
    on_test = apply(gate, test) if test is not None else []
    shown = choice.chosen or choice.closest
    if choice.chosen is None:
        missed = [v.in_words for v in choice.verdicts[shown] if v.mandatory and v.verdict == "fail"] if shown else []
        reason = "No SAE passes the gate. "
        reason += f"Closest is {shown}: {'; '.join(missed)}." if shown else "None finished its training."
    elif void:
        reason = f"The gate is void: the untrained SAE {void[0]} passes it. Tighten {gate_path}."
    elif test is None:
        reason = f"{choice.chosen} passes on the validation split but was not measured on the test split."
    elif not passes(on_test):
        missed = [v.in_words for v in on_test if v.mandatory and v.verdict == "fail"]
        reason = f"{choice.chosen} passes on the validation split but not on the test split: {'; '.join(missed)}."
    else:
        reason = (
            f"{choice.chosen} meets every mandatory criterion on the validation split and on the untouched test split."
        )
    go = choice.chosen is not None and not void and test is not None and passes(on_test)
    return {
        "verdict": "go" if go else "no-go",
        "reason": reason,
        "gate": {"name": gate.name, "path": gate_path},
        "selection": RULE,
        "chosen": choice.chosen,
        "closest": choice.closest,
        "criteria": [v.record() for v in choice.verdicts.get(shown, [])] if shown else [],
        "test": {"metrics": dict(test), "criteria": [v.record() for v in on_test]} if test is not None else None,
        "controls": controls_seen,
        "pareto": choice.front,
        "rejected": choice.rejected,
        "decided_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
