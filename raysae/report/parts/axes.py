"""What each axis of a sweep did: the L0 and FVU that it reached, and axes that did nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raysae.report import read as run
from raysae.report.columns import label, show
from raysae.report.page import Part
from raysae.sae.architectures import COEFFICIENTS

AXES = ("architecture", "expansion_factor")
NARROW = 2.0
"""An axis whose values span less than this ratio of L0 has not been searched."""


def read(run_dir: Path) -> dict[str, Any]:
    table = run.table(run_dir)
    return {"spans": spans(table), "narrow": NARROW, "moves": moves(table), "inert": inert(table)}


def spans(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For each architecture and expansion factor: how much of L0 and FVU its SAEs reached, and by which settings."""
    done = run.measured(table)
    if done.empty:
        return []
    whole = np.log(done["l0"].max() / done["l0"].min()) or 1.0
    shown = []
    for axis in AXES:
        for value, part in done.groupby(axis):
            low, high = part["l0"].min(), part["l0"].max()
            settings = [
                f"{label(knob)} {show(knob, part[knob].min())}–{show(knob, part[knob].max())}"
                for knob in COEFFICIENTS
                if knob in part and part[knob].notna().any()
            ]
            shown.append(
                {
                    "axis": label(axis),
                    "value": show(axis, value),
                    "n": len(part),
                    "l0": f"{show('l0', low)}–{show('l0', high)}",
                    "ratio": high / low,
                    "fvu": f"{show('fvu', part['fvu'].min())}–{show('fvu', part['fvu'].max())}",
                    "settings": "; ".join(settings),
                    "left": 100 * np.log(low / done["l0"].min()) / whole,
                    "width": 100 * np.log(high / low) / whole,
                }
            )
    return shown


def moves(table: pd.DataFrame) -> list[str]:
    """How far the median L0 and FVU move along each axis: small against the spans within means it did little."""
    done, said = run.measured(table), []
    for axis, name in (("architecture", "architectures"), ("expansion_factor", "expansion factors"), ("seed", "seeds")):
        medians = done.groupby(axis)[["l0", "fvu"]].median()
        if len(medians) > 1:
            l0, fvu = medians["l0"], medians["fvu"]
            said.append(
                f"Between {name}, the median L0 moves by ×{l0.max() / l0.min():.1f} "
                f"and the median FVU from {show('fvu', fvu.min())} to {show('fvu', fvu.max())}."
            )
    return said


def inert(table: pd.DataFrame) -> list[str]:
    """Axes that did nothing: values of a coefficient at least ×1.5 apart, or different widths, seeds or sites, whose SAEs
    are alike (L0 and FVU within 5%, and seeds identical) wherever all else is the same."""
    done, said = run.measured(table), []
    free = [name for name in COEFFICIENTS if name in done]
    fixed = ["site", "architecture", "expansion_factor", "seed"]
    for architecture, part in done.groupby("architecture"):
        for axis in [*free, "expansion_factor", "seed"]:
            others = [name for name in [*fixed, *free] if name != axis and name in part]
            widest, tried = 1.0, 1.0
            for _, same in part.dropna(subset=[axis]).groupby(others, dropna=False):
                if same[axis].nunique() > 1:
                    spread = max(same[name].max() / max(same[name].min(), 1e-12) for name in ("l0", "fvu"))
                    widest = max(widest, spread)
                    apart = same[axis].max() / same[axis].min() if axis in free else 2.0
                    tried = max(tried, apart)
            if tried >= 1.5 and widest <= (1.0 if axis == "seed" else 1.05):
                said.append(
                    f"{label(axis)} did nothing for {architecture}: SAEs that differ in it alone have the same L0 and FVU"
                    + (" to the last digit." if axis == "seed" else f" within {100 * (widest - 1):.1f}%.")
                )
    return said


PART = Part("axes", "What the axes did", Path(__file__).with_name("axes.html.j2"), read)
