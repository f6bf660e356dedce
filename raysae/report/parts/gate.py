"""The gate: each criterion with the value that it judged, and what the gate is about that nothing measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysae.report import read as run
from raysae.report.columns import interval, is_number, label, show, show_threshold
from raysae.report.page import Part


def read(run_dir: Path) -> dict[str, Any]:
    decision = run.decision(run_dir)
    lead, role = run.lead(decision)
    return {
        "name": (decision.get("gate") or {}).get("name"),
        "lead": lead,
        "role": role,
        "criteria": criteria(decision),
        "tested": bool(decision.get("test")),
        "unmeasured": decision.get("unmeasured"),
    }


def criteria(decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The criteria of a decision, or of the choice at a site, with the test split's value beside the validation split's."""
    test = {entry["criterion"]: entry for entry in (decision.get("test") or {}).get("criteria") or ()}
    shown = []
    for entry in decision.get("criteria") or ():
        metric, again = entry["metric"], test.get(entry["criterion"], {})
        n, groups = entry.get("n"), entry.get("n_groups")
        shown.append(
            {
                "criterion": entry["criterion"],
                "metric": label(metric),
                "bound": show_threshold(metric, entry.get("op", ""), entry.get("threshold")),
                "whole_interval": entry.get("confidence") == "interval",
                "must_beat": entry.get("must_beat"),
                "baseline": show(metric, entry.get("baseline_value")),
                "value": show(metric, entry.get("value")),
                "interval": interval(metric, entry.get("low"), entry.get("high")),
                "n": f"{n:,}" if is_number(n) else "",
                "groups": f"{groups:,} groups" if is_number(groups) and groups else "",
                "mandatory": entry.get("mandatory", True),
                "why": entry.get("why") or "",
                "verdict": entry.get("verdict", ""),
                "split": entry.get("split") or "validation",
                "test_split": again.get("split") or "test",
                "test": show(metric, again.get("value")) if again else "",
                "test_interval": interval(metric, again.get("low"), again.get("high")),
                "test_verdict": again.get("verdict", ""),
            }
        )
    return shown


PART = Part("gate", "Gate", Path(__file__).with_name("gate.html.j2"), read)
