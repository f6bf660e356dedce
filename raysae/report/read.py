"""A run's folder as the parts of a page read it: files that are absent are empty."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from raysae.config.load import read_yaml
from raysae.errors import Damaged, UserError
from raysae.files import is_folder_name, read_json_if, read_table
from raysae.report.columns import COLUMNS

ORDER = {"completed": 0, "pruned": 1, "diverged": 2, "error": 3}
"""How an SAE may have ended, in the order of the table."""


def decision(run_dir: Path) -> dict[str, Any]:
    return read_json_if(run_dir / "decision.json")


def config(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "config.yaml"
    try:
        return read_yaml("config", file) if config_text(run_dir).strip() else {}
    except Damaged:
        raise
    except UserError as error:
        raise Damaged(file, str(error).partition(f"{file} ")[2]) from None


def config_text(run_dir: Path) -> str:
    file = run_dir / "config.yaml"
    try:
        return file.read_text(encoding="utf-8") if file.exists() else ""
    except UnicodeDecodeError:
        raise Damaged(file, "is not UTF-8") from None


def curves(run_dir: Path) -> pd.DataFrame | None:
    file = run_dir / "curves.parquet"
    return read_table(file) if file.exists() else None


def table(run_dir: Path) -> pd.DataFrame:
    """The table with every known column, absent ones empty, and its flags as booleans."""
    file = run_dir / "table.parquet"
    given = read_table(file) if file.exists() else pd.DataFrame({"sae_id": [], "site": []})
    if not {"sae_id", "site"} <= set(given):
        raise Damaged(file, "has no column sae_id and site")
    absent = [column.name for column in COLUMNS if column.name not in given]
    given = pd.concat([given, pd.DataFrame(np.nan, index=given.index, columns=absent)], axis=1)
    for column in COLUMNS:
        if column.kind != "text":
            given[column.name] = pd.to_numeric(given[column.name], errors="coerce").astype(float)
    given["sae_id"] = given["sae_id"].astype(str)
    given["status"] = given["status"].astype(str) if "status" in given else "completed"
    given["status"] = given["status"].where(given["status"].isin(list(ORDER)), "error")
    for flag in ("pareto", "passes_gate"):
        given[flag] = [value is True or value == 1 for value in given[flag]] if flag in given else False
    return given.reset_index(drop=True)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The table's rows as dicts."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """The completed SAEs that have an L0."""
    return table[(table["status"] == "completed") & np.isfinite(table["l0"]) & (table["l0"] > 0)]


def pages(table: pd.DataFrame) -> dict[str, str]:
    """Addresses of the SAEs' own pages, relative to the run, by sae_id."""
    completed = table.loc[table["status"] == "completed", "sae_id"]
    return {sae_id: f"saes/{quote(sae_id)}/index.html" for sae_id in completed if is_folder_name(sae_id)}


def lead(decision: Mapping[str, Any]) -> tuple[str | None, str]:
    """The SAE that a decision, or the choice at a site, is about, and what it is called: the chosen one; a candidate that
    failed on the test split or whose gate is void; or the closest, where none passed."""
    if decision.get("chosen"):
        return decision["chosen"], "chosen" if decision.get("verdict") in ("go", "incomplete") else "candidate"
    return decision.get("closest"), "closest"


def leads(decision: Mapping[str, Any]) -> dict[str, str]:
    """The same for each site that has a choice, and for the decision as a whole: what an SAE is called, by id."""
    roles = {}
    for each in (*(decision.get("choices") or {}).values(), decision):
        sae_id, role = lead(each)
        if sae_id and (each.get("chosen") or each is decision):
            roles[sae_id] = role
    return roles


def reasons(decision: Mapping[str, Any], sae_id: str) -> list[str]:
    """Why an SAE was not chosen."""
    said = (decision.get("rejected") or {}).get(sae_id) or ()
    return [said] if isinstance(said, str) else list(map(str, said))
