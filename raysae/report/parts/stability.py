"""Stability and transfer, each number beside what it must be compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysae.files import read_json_if
from raysae.report.columns import cell, is_number, label, show
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
    cells = [_cell(entry, name) for name in ("mmcs", "recurring_fraction", "recurring_variance")]
    pairs = len(entry["pairs"])
    cells[0]["range"] += f" over {pairs} pair{'s' if pairs > 1 else ''}"
    return {
        "name": f"{entry['architecture']}, d_sae {entry['d_sae']:,}",
        "setting": ", ".join([*setting, entry["site"]]),
        "seeds": len(entry["seeds"]),
        "note": entry["note"],
        "method": entry["method"],
        "silent": ", ".join(f"{n:,}" for n in entry["never_fired"]),
        "cells": cells,
        "spread": [f"{show(m, entry[f'{m}_mean'])} ± {show(m, entry[f'{m}_sd'])}" for m in SHOWN_AWAY[:3]],
    }


def _cell(entry: Mapping[str, Any], name: str) -> dict[str, str]:
    column, closely = f"stability_{name}", name.replace("recurring", "recurring_closely")
    value, least, largest, null = (show(column, entry[f"{name}{end}"]) for end in ("", "_least", "_largest", "_null"))
    shown = {"value": value, "range": f"{least}–{largest}", "null": null}
    return {**shown, "closely": show(column, entry[closely]) if closely != name else ""}


def dataset(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A held-out dataset: per SAE and metric the value at home, away, and their ratio with its interval."""
    rows = []
    for sae_id, measured in entry["saes"].items():
        cells = [
            {
                "home": show(metric, measured[metric]["home"]),
                "away": cell(metric, measured[metric], "away"),
                "ratio": cell("fvu", measured[metric], "ratio"),
            }
            for metric in SHOWN_AWAY
        ]
        n, groups = (f"{measured[count]:,}" for count in ("n_rows", "n_groups"))
        rows.append({"sae_id": sae_id, "cells": cells, "n": n, "groups": groups})
    over = entry["over_seeds"]
    spread = [
        f"{label(metric)} × {show('fvu', over[metric]['ratio_mean'])} ± {show('fvu', over[metric]['ratio_sd'])}"
        for metric in SHOWN_AWAY
        if is_number(over[metric]["ratio_sd"])
    ]
    counts = {count: f"{entry[count]:,}" for count in ("examples", "left_out")}
    return {"name": name, "rows": rows, "spread": "; ".join(spread), **counts}


PART = Part("stability", "Stability", Path(__file__).with_name("stability.html.j2"), read)
