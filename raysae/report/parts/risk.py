"""Risk: domain coverage and invariance of one SAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from raysae.files import read_json_if, read_table
from raysae.report import read as run
from raysae.report.columns import cell, interval, label, show
from raysae.report.page import Part

METRICS = ("fvu", "l0", "ce_loss_recovered")
KINDS = {"whitespace": "Spaces and line breaks", "names": "Names swapped", "numbers": "Numbers changed"}
AXES = {"dataset": "Dataset", "stratum": "Stratum, by number of steps"}


def read(run_dir: Path) -> dict[str, Any]:
    """The decision's SAE in `domains.*` and `invariance.json`; empty where they are absent."""
    lead, _ = run.lead(run.decision(run_dir))
    file, facts = run_dir / "domains.parquet", read_json_if(run_dir / "domains.json")
    table = read_table(file) if file.exists() else pd.DataFrame()
    mine = table[table["sae_id"] == lead] if len(table) else table
    worst = facts.get("worst", {}).get(lead, {})
    reworded = read_json_if(run_dir / "invariance.json")
    return {
        "metrics": [label(name) for name in METRICS],
        "enough": facts.get("enough_groups"),
        "axes": [
            {"name": AXES.get(str(axis), str(axis)), **domains(rows, worst.get(axis, {}), facts["enough_groups"])}
            for axis, rows in (mine.groupby("axis", sort=False) if len(mine) else ())
        ],
        "measured": file.exists(),
        "invariance": [rewording(entry) for entry in reworded.get("kinds", ())],
        "reworded": reworded.get("sae_id"),
        "lead": lead,
        "too_long": reworded.get("too_long", 0),
    }


def domains(rows: pd.DataFrame, worst: dict[str, Any], enough: int) -> dict[str, Any]:
    """An axis' domains as rows of cells, the ones too small to judge by name, and the worst of each metric in words."""
    shown = [
        {
            "domain": row["domain"] or "none",
            "cells": [
                {**cell(name, row), "worst": worst.get(name, {}).get("domain") == row["domain"]} for name in METRICS
            ],
            "groups": f"{row['n_groups']:,}",
            "scored": f"{row['n_scored_groups']:,}",
        }
        for row in rows.to_dict("records")
    ]
    said = [
        f"{label(name)}: worst in {w['domain'] or 'none'}, × {show('fvu', w['ratio'])} the mean of the domains "
        f"{interval('fvu', w['ratio_low'], w['ratio_high'])}; domains dealt at random reach × {show('fvu', w['null_95'])}."
        for name, w in worst.items()
    ]
    few = [
        f"{row['domain'] or 'none'} ({row[count]} {what})"
        for count, what in (("n_groups", "groups"), ("n_scored_groups", "groups scored with the model"))
        for row in rows.to_dict("records")
        if row[count] < enough
    ]
    return {"rows": shown, "said": said, "few": few}


def rewording(entry: dict[str, Any]) -> dict[str, Any]:
    """A way of rewording as a row: how many examples, and cells of value, interval and null."""
    return {
        "kind": KINDS.get(entry["kind"], entry["kind"]),
        "compared": f"{entry['compared']:,} of {entry['examples']:,}",
        "left": "; ".join(
            f"{entry[key]:,} {words}"
            for key, words in (("not_found", "without any"), ("same_tokens", "with the same tokens"))
            if entry[key]
        ),
        "cells": [
            {**cell("fvu", entry, name), "null": cell("fvu", entry, f"{name}_null")} for name in ("jaccard", "cosine")
        ],
    }


PART = Part("risk", "Risk", Path(__file__).with_name("risk.html.j2"), read)
