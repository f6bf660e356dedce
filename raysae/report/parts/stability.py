"""Stability and transfer, each number beside what it must be compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysae.files import read_json_if
from raysae.report.columns import interval, is_number, label, show
from raysae.report.page import Part
from raysae.sae.architectures import COEFFICIENTS

SHOWN_AWAY = ("fvu", "l0", "ce_loss_recovered", "ce_delta")


def read(run_dir: Path) -> dict[str, Any]:
    """From `stability.json` and `transfer.json`; empty where they are absent."""
    stable, moved = (read_json_if(run_dir / f"{name}.json") for name in ("stability", "transfer"))
    return {
        "rule": stable.get("rule", ""),
        "configurations": [configuration(entry) for entry in stable.get("configurations", ())],
        "transfer": [dataset(name, entry) for name, entry in moved.items()],
        "away": [label(name) for name in SHOWN_AWAY],
    }


def configuration(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's row: what it is, and cells of value, range over the seeds and null."""
    setting = [f"{label(knob)} {show(knob, entry[knob])}" for knob in COEFFICIENTS if knob in entry]
    pairs = len(entry["pairs"])
    cells = [
        _cell("stability_mmcs", entry, "mmcs", f"{pairs} pair{'s' if pairs > 1 else ''}"),
        _cell("stability_recurring_fraction", entry, "recurring_fraction"),
        _cell("stability_recurring_variance", entry, "recurring_variance"),
    ]
    for cell, name in zip(cells[1:], ("recurring_closely_fraction", "recurring_closely_variance"), strict=True):
        cell["closely"] = show("stability_recurring_fraction", entry[name])
    spread = {
        name: f"{show(name, entry[f'{name}_mean'])} ± {show(name, entry[f'{name}_sd'])}" for name in SHOWN_AWAY[:3]
    }
    return {
        "name": f"{entry['architecture']}, d_sae {entry['d_sae']:,}",
        "setting": ", ".join([*setting, entry["site"]]),
        "seeds": len(entry["seeds"]),
        "note": entry["note"],
        "method": entry["method"],
        "silent": ", ".join(f"{n:,}" for n in entry["never_fired"]),
        "cells": cells,
        "spread": spread,
    }


def _cell(column: str, entry: Mapping[str, Any], name: str, over: str = "") -> dict[str, str]:
    least, largest = (show(column, entry[f"{name}_{end}"]) for end in ("least", "largest"))
    null = entry[f"{name}_null"]
    return {
        "value": show(column, entry[name]),
        "range": f"{least}–{largest}" + (f" over {over}" if over else ""),
        "null": show(column, null) if is_number(null) else "–",
        "closely": "",
    }


def dataset(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A held-out dataset: per SAE and metric the value at home, away, and their ratio with its interval."""
    rows = []
    for sae_id, measured in entry["saes"].items():
        cells = []
        for metric in SHOWN_AWAY:
            m = measured[metric]
            cells.append(
                {
                    "home": show(metric, m["home"]),
                    "away": show(metric, m["away"]),
                    "away_interval": interval(metric, m["away_low"], m["away_high"]),
                    "ratio": show("fvu", m["ratio"]),
                    "ratio_interval": interval("fvu", m["ratio_low"], m["ratio_high"]),
                }
            )
        n, groups = (f"{measured[name]:,}" for name in ("n_rows", "n_groups"))
        rows.append({"sae_id": sae_id, "cells": cells, "n": n, "groups": groups})
    over = entry["over_seeds"]
    spread = [
        f"{label(metric)} × {show('fvu', over[metric]['ratio_mean'])} ± {show('fvu', over[metric]['ratio_sd'])}"
        for metric in SHOWN_AWAY
        if is_number(over[metric]["ratio_sd"])
    ]
    return {
        "name": name,
        "rows": rows,
        "examples": f"{entry['examples']:,}",
        "left_out": f"{entry['left_out']:,}",
        "spread": "; ".join(spread),
    }


PART = Part("stability", "Stability", Path(__file__).with_name("stability.html.j2"), read)
