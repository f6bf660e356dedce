"""Probes: a table per label, every baseline beside the SAE, flags in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from raysae.evaluate.probes import INFORMATION_GAP
from raysae.evaluate.probes import in_words as effect_in_words
from raysae.files import read_json, read_table
from raysae.report.columns import decimals
from raysae.report.page import Part

INPUTS = {
    "sae": "the SAE's latents",
    "raw": "raw activations",
    "random_sae": "an untrained SAE's latents",
    "untrained_model": "latents of an SAE of the untrained model",
    "bigram": "the token id and the one before",
    "token": "the token id alone",
    "position": "the position alone",
    "shuffled": "the SAE's latents, labels shuffled",
    "majority": "class frequencies",
}
"""By input of a probe, in the order of the table."""
SCORES = {
    "macro_f1": "Macro-F1",
    "balanced_accuracy": "Balanced accuracy",
    "auroc": "AUROC",
    "control_f1": "F1 on the control task",
    "selectivity": "Selectivity",
}
SIGNIFICANT = 0.05


def read(run_dir: Path) -> dict[str, Any] | None:
    """What was probed, how, and a section per label; None where nothing was."""
    folder = run_dir / "probes"
    if not all((folder / name).exists() for name in ("probes.json", "probes.parquet")):
        return None
    about, table = read_json(folder / "probes.json"), read_table(folder / "probes.parquet")
    sections = [section(str(label), rows, about["labels"][label]) for label, rows in table.groupby("label", sort=False)]
    return {
        **{name: about[name] for name in ("sae_id", "site", "settings")},
        "labels": sections,
        "scores": list(SCORES.values()),
    }


def section(label: str, table: pd.DataFrame, facts: Mapping[str, Any]) -> dict[str, Any]:
    """One label: its classes, a row per input, the flags, the largest effect; or why it was not measured."""
    done = table[table["status"] == "measured"]
    head = {"label": label, "classes": facts["classes"], "dropped": facts["dropped"]}
    if done.empty:
        return {**head, "rows": [], "status": str(table["status"].iloc[0])}
    sparse = [kind for kind in done["probe"].unique() if kind != "dense"]
    rows = []
    for name, words in INPUTS.items():
        of_input = table[table["input"] == name]
        if of_input.empty:
            continue
        by_probe = {row["probe"]: row for row in of_input[of_input["status"] == "measured"].to_dict("records")}
        dense = by_probe.get("dense", {})
        stuck = sum(int(row["not_converged"]) for row in by_probe.values())
        rows.append(
            {
                "input": name,
                "words": words,
                "columns": int(dense["n_columns"]) if dense.get("n_columns") else None,
                "status": "" if dense else str(of_input["status"].iloc[0]),
                "scores": [cell(dense, score) for score in SCORES],
                "gap": gap(facts["gaps"].get(name)),
                "sparse": [cell(by_probe.get(kind, {}), "macro_f1") for kind in sparse],
                "note": f"{stuck} fits did not converge" if stuck else "",
            }
        )
    flags = [in_words(name, check) for name, check in facts["leakage"].items() if check["flag"]]
    sizes = {key: facts[key] for key in ("n_rows", "n_groups")} | {"effect": effect_in_words(facts["effects"])}
    return {**head, "status": "", "rows": rows, "sparse": sparse, "flags": flags, **sizes}


def cell(row: Mapping[str, Any], score: str) -> dict[str, str]:
    """A score with its interval."""
    return decimals(*(row.get(f"{score}{end}") for end in ("", "_low", "_high")))


def gap(difference: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How far the SAE's dense probe lies above a baseline's, and whether that is more than chance."""
    if difference is None:
        return None
    f1, clear = difference["macro_f1"], difference["q"] <= SIGNIFICANT
    tone = "" if not clear else "pass" if f1 > 0 else "fail"
    value = f"{f1:+.3f}".replace("-", "−")
    return {**cell(difference, "macro_f1"), "value": value, "q": f"{difference['q']:.2g}", "tone": tone}


def in_words(name: str, check: Mapping[str, Any]) -> str:
    """A raised flag as a sentence."""
    if name != "information":
        return f"{check['flag'][0].upper()}{check['flag'][1:]}."
    gained = "the latents tell more" if check["gap"] > 0 else "the latents tell less"
    return (
        f"{check['flag'].capitalize()}: {gained} than the raw activations that they are made of, by more than "
        f"{INFORMATION_GAP:g} in macro-F1, and the interval excludes 0."
    )


PART = Part("probes", "Probes", Path(__file__).with_name("probes.html.j2"), read)
