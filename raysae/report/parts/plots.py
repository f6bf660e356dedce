"""Plots of a sweep, which are written to `figures/` too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysae.files import inside
from raysae.report import read as run
from raysae.report.columns import is_number, label, show
from raysae.report.page import Part
from raysae.report.parts.table import rows
from raysae.sae.architectures import COEFFICIENTS


def read(run_dir: Path) -> dict[str, Any]:
    from raysae.report import figures

    table, decision = run.table(run_dir), run.decision(run_dir)
    titles = {row["sae_id"]: tooltip(row) for row in run.records(table)}
    drawn = []
    for name, (title, figure, large) in figures.draw(table, run.curves(run_dir), decision).items():
        svg = figures.save(figure, inside(run_dir, "figures"), name)
        drawn.append({"title": title, "large": large, "svg": figures.inline(svg, name, title, titles)})
    return {
        "figures": drawn,
        "off_scale": figures.off_scale(table),
        "front": sorted((row for row in rows(table, decision) if row["pareto"]), key=lambda row: row["l0"]),
    }


def tooltip(row: Mapping[str, Any]) -> str:
    """An SAE in three lines, for its mark in a figure."""
    setting = [str(row["architecture"]), f"×{show('expansion_factor', row['expansion_factor'])}"]
    setting += [f"{label(knob)} {show(knob, row[knob])}" for knob in COEFFICIENTS if is_number(row.get(knob))]
    if row["status"] != "completed":
        setting.append(str(row["status"]))
    shown = [name for name in ("fvu", "l0", "ce_loss_recovered", "dead_fraction") if is_number(row[name])]
    numbers = [f"{label(name)} {show(name, row[name])}" for name in shown]
    return "\n".join((str(row["sae_id"]), " · ".join(numbers), ", ".join(setting)))


PART = Part("plots", "Plots", Path(__file__).with_name("plots.html.j2"), read)
