"""The nulls of a run as the page shows them: under each SAE that they stand beside, and what the gate made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from raysae.evaluate.nulls import ELSEWHERE
from raysae.gates.criteria import voids
from raysae.report.columns import cell
from raysae.report.figures import records

METRICS = ("fvu", "l0", "ce_loss_recovered", "ce_delta")
IN_WORDS = {
    "untrained": "untrained SAE, its k largest, decoder scaled",
    "random_encoder": "random encoder, decoder fitted",
    "permuted": "its decoder rows permuted",
    "pca": "PCA, the k largest of each row",
    "ica": "ICA, the k largest of each row",
    "shuffled_rows": "SAE trained on shuffled rows",
    "untrained_model": "SAE of the model with random weights, on its activations",
}


def groups(decision: Mapping[str, Any], table: pd.DataFrame) -> list[dict[str, Any]]:
    """Nulls by the SAE that they stand beside: its id, its own values, and a row per null, in the order of the table."""
    saes = {row["sae_id"]: row for row in records(table)}
    choices = (decision.get("choices") or {"": decision}).values()
    chosen = [choice["chosen"] for choice in choices if choice.get("chosen")]
    shown: dict[str | None, list[dict[str, Any]]] = {i: [] for i in saes}
    for name, control in (decision.get("controls") or {}).items():
        metrics = control["metrics"]
        kind = metrics.get("kind", "")
        row = {
            "name": name,
            "kind": IN_WORDS.get(kind, kind),
            "d_sae": metrics.get("d_sae"),
            "cells": [cell(m, metrics) for m in METRICS],
            "passes": bool(control["passes_gate"]),
            "must_fail": kind != ELSEWHERE,
            "voids": voids(name, metrics, chosen),
            "note": "" if metrics.get("converged", True) else "did not converge",
        }
        for sae_id in metrics.get("beside") or [None]:
            shown.setdefault(sae_id, []).append(row)
    return [
        {
            "sae_id": sae_id,
            "cells": [cell(m, saes[sae_id]) for m in METRICS] if sae_id in saes else None,
            "nulls": nulls,
        }
        for sae_id, nulls in shown.items()
        if nulls
    ]
