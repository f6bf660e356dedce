"""Nulls: under each SAE that they stand beside, and what the gate made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from raysae.evaluate.nulls import ELSEWHERE
from raysae.gates.criteria import voids
from raysae.report import read as run
from raysae.report.columns import cell, label
from raysae.report.page import Part

METRICS = ("fvu", "l0", "ce_loss_recovered", "ce_delta")
"""What is shown of an SAE's; of others, what the gate asks for."""
IN_WORDS = {
    "untrained": "untrained SAE, its k largest, decoder scaled",
    "random_encoder": "random encoder, decoder fitted",
    "permuted": "its decoder rows permuted",
    "pca": "PCA, the k largest of each row",
    "ica": "ICA, the k largest of each row",
    "shuffled_rows": "SAE trained on shuffled rows",
    "untrained_model": "SAE of the model with random weights, on its activations",
}


def read(run_dir: Path) -> dict[str, Any] | None:
    decision, chooses = run.decision(run_dir), "chosen" in run.decision(run_dir)
    metrics = METRICS if chooses else tuple(dict.fromkeys(c["metric"] for c in decision.get("criteria") or ()))
    shown = groups(decision, run.table(run_dir), metrics)
    return {"groups": shown, "metrics": list(map(label, metrics)), "chooses": chooses} if shown else None


def groups(decision: Mapping[str, Any], table: pd.DataFrame, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Nulls by the SAE that they stand beside: its id, its own values, and a row per null, in the order of the table."""
    saes = {row["sae_id"]: row for row in run.records(table)}
    choices = (decision.get("choices") or {"": decision}).values()
    chosen = [choice["chosen"] for choice in choices if choice.get("chosen")]
    shown: dict[str | None, list[dict[str, Any]]] = {i: [] for i in saes}
    for name, seen in (decision.get("controls") or {}).items():
        null = seen["metrics"]
        kind = null.get("kind", "")
        row = {
            "name": name,
            "kind": IN_WORDS.get(kind, kind),
            "d_sae": null.get("d_sae"),
            "cells": [cell(m, null) for m in metrics],
            "passes": bool(seen["passes_gate"]),
            "must_fail": kind != ELSEWHERE,
            "voids": voids(name, null, chosen),
            "note": "" if null.get("converged", True) else "did not converge",
        }
        for sae_id in null.get("beside") or [None]:
            shown.setdefault(sae_id, []).append(row)
    return [
        {
            "sae_id": sae_id,
            "cells": [cell(m, saes[sae_id]) for m in metrics] if sae_id in saes else None,
            "nulls": nulls,
        }
        for sae_id, nulls in shown.items()
        if nulls
    ]


PART = Part("nulls", "", Path(__file__).with_name("nulls.html.j2"), read)
