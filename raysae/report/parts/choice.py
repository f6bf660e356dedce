"""The choice: by site the candidates with their scores, what was traded, and both splits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysae.report import read as run
from raysae.report.page import Part

SHOWN = 12
"""Candidates of a site that are listed."""


def read(run_dir: Path) -> dict[str, Any] | None:
    decision = run.decision(run_dir)
    chosen = sites(decision)
    return {"sites": chosen, "selection": decision.get("selection")} if chosen else None


def sites(decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The choice of each site: `site`, what decision.json says of it, and how each listed candidate stands."""
    shown = []
    for site, choice in (decision.get("choices") or {}).items():
        role, candidates = run.lead(choice)[1], choice.get("candidates") or ()
        standing = {(choice.get("runner_up") or {}).get("sae_id"): "runner-up", choice["chosen"]: role}
        listed = [{**c, "standing": standing.get(c["sae_id"], "")} for c in candidates[:SHOWN]]
        shown.append({**choice, "site": site, "candidates": listed, "more": len(candidates[SHOWN:]), "role": role})
    return shown


PART = Part("choice", "Choice", Path(__file__).with_name("choice.html.j2"), read)
