"""All SAEs of a sweep: sortable, filtered by words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raysae.report import read as run
from raysae.report.columns import COLUMNS
from raysae.report.page import Part


def read(run_dir: Path) -> dict[str, Any]:
    table = run.table(run_dir)
    return {
        "columns": [column for column in COLUMNS if table[column.name].notna().any()],
        "rows": rows(table, run.decision(run_dir)),
        "pages": run.pages(table),
    }


def rows(table: pd.DataFrame, decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per SAE: the decision's first, then the Pareto front by L0, then the others by FVU."""
    leads = run.leads(decision)
    order = pd.DataFrame(
        {
            "lead": ~table["sae_id"].isin(list(leads)),
            "status": table["status"].map(run.ORDER),
            "front": ~table["pareto"],
            "by": np.where(table["pareto"], table["l0"], table["fvu"]),
        }
    )
    ordered = table.loc[order.sort_values(list(order.columns), kind="stable").index]
    return [
        {**row, "why_not": "; ".join(run.reasons(decision, row["sae_id"])), "role": leads.get(row["sae_id"], "")}
        for row in run.records(ordered)
    ]


PART = Part("table", "All SAEs", Path(__file__).with_name("table.html.j2"), read)
