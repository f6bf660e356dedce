"""What the trials of a sweep left on disk: what was asked of it, what has ended, one row per SAE, the training curves.

These files are all that a sweep goes on from after an interrupt: `saes/`, `history/`, `pruned/`, `proposed/` (what Optuna
chose) and `state/` (of packs in training). Ray Tune's own state is not among them: half of it can be gone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError, safe_open

from raysae.errors import Fault
from raysae.files import read_json, write_json
from raysae.sae.architectures import COEFFICIENTS
from raysae.sweep.space import Common, Proposal, members

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
    rungs = history(root)
    return rungs[CURVES + [name for name in rungs if name.startswith("share_")]]


def history(root: Path) -> pd.DataFrame:
    """Every rung of every SAE, the last writing of each."""
    frame = pd.DataFrame([rung for file in sorted((root / "history").glob("*.jsonl")) for rung in read_rungs(file)])
    if frame.empty:
        return frame
    return frame.drop_duplicates(["sae_id", "tokens"], keep="last").sort_values(["sae_id", "tokens"], ignore_index=True)


def read_rungs(file: Path) -> list[dict[str, Any]]:
    """The rungs of an SAE's history, up to a line that is not whole (a full disk): a resumed trial writes them again."""
    found: list[dict[str, Any]] = []
    for line in file.read_bytes().splitlines() if file.exists() else ():
        try:
            rung = json.loads(line)
        except ValueError:
            break
        if not isinstance(rung, dict):
            break
        found.append({name: math.nan if value is None else value for name, value in rung.items()})
    return found


def note_proposal(root: Path, index: int, coefficient: float) -> None:
    """Keep what was chosen for a proposal, for a driver that comes after."""
    (root / "proposed").mkdir(parents=True, exist_ok=True)
    write_json(root / "proposed" / f"{index:03d}.json", {"coefficient": coefficient})


def noted_proposal(root: Path, index: int) -> float | None:
    """The coefficient that an earlier driver chose for a proposal, if it did."""
    found = _read_if_whole(root / "proposed" / f"{index:03d}.json").get("coefficient")
    return found if isinstance(found, (int, float)) else None


def asked(
    plan: Sequence[Proposal], widths: Mapping[str, int], seeds: Sequence[int], common: Common, root: Path
) -> list[str] | None:
    """The ids of all SAEs of a plan; None while coefficients of it are still to be chosen."""
    ids: list[str] = []
    for p in plan:
        coefficient = noted_proposal(root, p.index) if p.coefficient is None else p.coefficient
        if coefficient is None:
            return None
        ids += [member.sae_id for member in members(p, coefficient, widths[p.site], seeds, common)]
    return ids


def ended(root: Path, tokens: int) -> dict[str, dict[str, Any]]:
    """The last rung, by id, of SAEs that have nothing left to do: stopped by rule, or at their last token and then saved
    or diverged."""
    all_rungs = history(root)
    found = {}
    for last in all_rungs.groupby("sae_id").tail(1).to_dict("records") if len(all_rungs) else ():
        sae_id = str(last["sae_id"])
        whole = last["tokens"] >= tokens and (last["diverged"] or _saved(root / "saes" / sae_id))
        if whole or pruned(root, sae_id) is not None:
            found[sae_id] = {str(name): value for name, value in last.items()}
    return found


def note_pruned(root: Path, reasons: Mapping[str, str]) -> None:
    """Keep why SAEs are stopped by rule."""
    (root / "pruned").mkdir(parents=True, exist_ok=True)
    for sae_id, reason in reasons.items():
        write_json(root / "pruned" / f"{sae_id}.json", {"reason": reason})


def pruned(root: Path, sae_id: str) -> str | None:
    """Why an SAE was stopped by rule, or None."""
    return _read_if_whole(root / "pruned" / f"{sae_id}.json").get("reason")


def _saved(directory: Path) -> bool:
    """Whether an SAE lies there whole: its config can be read, and its weights are as long as their header says."""
    try:
        with safe_open(directory / "sae_weights.safetensors", "pt"):
            return isinstance(read_json(directory / "cfg.json"), dict)
    except (OSError, ValueError, SafetensorError):
        return False


def _read_if_whole(file: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty where there is none, or half of it."""
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def alike(table: pd.DataFrame, row: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of the configuration that `row` is of, one per seed."""
    for name in CONFIGURATION:
        if name in table:
            table = table[table[name].isna() if pd.isna(row[name]) else table[name] == row[name]]
    return table


def training_table(
    root: Path,
    errors: Mapping[str, Mapping[str, Any]],
    ids: Sequence[str],
    tokens: int,
    unique_tokens: int,
    dead_window: int,
) -> pd.DataFrame:
    """One row per SAE of `ids`, each to see so many `tokens` (columns FACTS): its last rung, and what became of it.

    status: completed, pruned (with the reason), diverged, or error. `errors` maps sae_id to {facts..., message} for
    trials that failed for good. Fidelity is measured later, on whole splits. Raises Fault where nothing is known of an
    SAE's end: the sweep was left before it.
    """
    last = {r["sae_id"]: r for r in history(root).to_dict("records")}
    over, rows, absent = ended(root, tokens), list[dict[str, Any]](), list[str]()
    for sae_id in ids:
        if sae_id in over and over[sae_id]["diverged"]:
            status, reason = "diverged", "its loss is no longer finite"
        elif sae_id in over and _saved(root / "saes" / sae_id):
            status, reason = "completed", ""
        elif sae_id in over:
            status, reason = "pruned", str(pruned(root, sae_id))
        elif sae_id in errors:
            status, reason = "error", errors[sae_id]["message"]
        else:
            absent.append(sae_id)
            continue
        facts = dict(last.get(sae_id) or errors[sae_id])
        facts["learning_rate"] = facts.get("peak_learning_rate")  # the last rung's own rate has decayed
        rows.append(facts | {"sae_id": sae_id, "status": status, "status_reason": reason})
    if absent:
        raise Fault(
            f"sweep: {len(absent)} of {len(ids)} SAEs are not trained to their end, such as {absent[0]}; "
            "the same command goes on from here"
        )
    table = pd.DataFrame(rows)
    table["unique_tokens"] = table["tokens"].clip(upper=unique_tokens) if "tokens" in table else 0
    table["dead_window_tokens"] = dead_window
    return table.reindex(columns=FACTS).sort_values("sae_id", ignore_index=True)
