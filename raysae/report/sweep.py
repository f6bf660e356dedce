"""`write_report`: the page of a sweep, its figures, and a page of each SAE.

The decision comes first and the evidence behind it after, in the order in which a sceptical reader asks.
"""

from __future__ import annotations

from pathlib import Path

from raysae.errors import UserError
from raysae.report import sae_page
from raysae.report.page import page
from raysae.report.parts import (
    assumptions,
    axes,
    choice,
    config,
    cost,
    decision,
    gate,
    method,
    nulls,
    plots,
    probes,
    risk,
    stability,
    table,
)

PARTS = [
    module.PART
    for module in (
        decision, choice, gate, nulls, plots, table, axes, probes, stability, risk, assumptions, cost, method, config
    )
]  # fmt: skip


def write_report(run_dir: Path) -> Path:
    """Write `report.html`, `figures/` and the SAEs' pages into a run directory and return the report's path.

    Reads `table.parquet` and `decision.json`, and what else the parts show where it exists. Raises `UserError` if the
    directory holds no finished run.
    """
    run_dir = Path(run_dir)
    for needed in ("table.parquet", "decision.json"):
        if not (run_dir / needed).exists():
            raise UserError(f"run={run_dir}: has no {needed}; give the folder of a finished sweep")
    sae_page.write_pages(run_dir)
    return page(PARTS, run_dir)
