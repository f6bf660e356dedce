"""The sweep's outcome from the files its trials wrote: one row per SAE, and the training curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from raysae.artifacts import read_json
from raysae.sae.architectures import COEFFICIENTS

FACTS = [
    "sae_id", "site", "architecture", "d_in", "d_sae", "expansion_factor", *COEFFICIENTS, "seed",
    "learning_rate", "status", "status_reason", "tokens", "unique_tokens", "loss", "dead_fraction",
    "dead_window_tokens", "train_seconds",
]  # fmt: skip
CONFIGURATION = ("site", "architecture", "d_sae", *COEFFICIENTS)
"""Columns in which the seeds of one configuration agree."""
CURVES = ["sae_id", "tokens", "fvu", "l0", "loss", "dead_fraction", "learning_rate"]


def curves(root: Path) -> pd.DataFrame:
    """The training curves below `root/history`: CURVES, and each loss term's share of the gradient as `share_<term>`."""
    rungs = _history(root)
    return rungs[CURVES + [name for name in rungs if name.startswith("share_")]]


def _history(root: Path) -> pd.DataFrame:
    """Every rung of every SAE, the last writing of each."""
    lines = [json.loads(line) for file in sorted((root / "history").glob("*.jsonl")) for line in file.open()]
    frame = pd.DataFrame(lines)
    return frame.drop_duplicates(["sae_id", "tokens"], keep="last").sort_values(["sae_id", "tokens"], ignore_index=True)


def alike(table: pd.DataFrame, row: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of the configuration that `row` is of, one per seed."""
    for name in CONFIGURATION:
        if name in table:
            table = table[table[name].isna() if pd.isna(row[name]) else table[name] == row[name]]
    return table


def training_table(
    root: Path, errors: Mapping[str, Mapping[str, Any]], unique_tokens: int, dead_window: int
) -> pd.DataFrame:
    """One row per SAE (columns FACTS): its last rung, and what became of it.

    status: completed, pruned (with the reason), diverged, or error. `errors` maps sae_id to {facts..., message} for
    trials that failed for good. Fidelity is measured later, on whole splits.
    """
    last = (
        _history(root).groupby("sae_id", sort=False).tail(1).set_index("sae_id")
        if (root / "history").exists()
        else None
    )
    rows = []
    for sae_id, facts in ({} if last is None else last.to_dict("index")).items():
        status, reason = "error", errors.get(str(sae_id), {}).get("message", "its trial did not finish")
        pruned = root / "pruned" / f"{sae_id}.json"
        if facts["diverged"]:
            status, reason = "diverged", "its loss is no longer finite"
        elif (root / "saes" / str(sae_id) / "cfg.json").exists():
            status, reason = "completed", ""
        elif pruned.exists():
            status, reason = "pruned", read_json(pruned)["reason"]
        peak = facts["peak_learning_rate"]  # the last rung's own rate has decayed
        rows.append(facts | {"sae_id": sae_id, "learning_rate": peak, "status": status, "status_reason": reason})
    known = {row["sae_id"] for row in rows}
    for sae_id, facts in errors.items():
        if sae_id not in known:
            rows.append({**facts, "sae_id": sae_id, "status": "error", "status_reason": facts["message"]})
    table = pd.DataFrame(rows)
    table["unique_tokens"] = table["tokens"].clip(upper=unique_tokens) if "tokens" in table else 0
    table["dead_window_tokens"] = dead_window
    return table.reindex(columns=FACTS).sort_values("sae_id", ignore_index=True)
