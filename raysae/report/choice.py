"""The choice as the page shows it: by site the candidates with their scores, what was traded, and both splits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = 12
"""Candidates of a site that are listed."""


def sites(decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The choice of each site: `site`, what decision.json says of it, and how each listed candidate stands."""
    shown = []
    for site, choice in (decision.get("choices") or {}).items():
        second = (choice.get("runner_up") or {}).get("sae_id")
        candidates = []
        for c in (choice.get("candidates") or ())[:SHOWN]:
            standing = "runner-up" if c["sae_id"] == second else ""
            standing = _role(choice) if c["sae_id"] == choice["chosen"] else standing
            candidates.append({**c, "standing": standing})
        more = len(choice.get("candidates") or ()) - len(candidates)
        shown.append({**choice, "site": site, "candidates": candidates, "more": more, "role": _role(choice)})
    return shown


def looks_in_words(decision: Mapping[str, Any]) -> str:
    """How often the test rows were looked at; empty where they were not."""
    looks = decision.get("looks")
    if not looks:
        return ""
    if looks["number"] == 1:
        return "The test rows were looked at once: by this decision."
    earlier = list(dict.fromkeys(f"{e['by']} of {e['run']}" for e in looks["earlier"]))
    who = ", ".join(earlier[-5:]) + (f" and {len(earlier) - 5} more" if len(earlier) > 5 else "")
    return (
        f"This is look {looks['number']} at these test rows by runs below one output folder (before it: {who}). Each look "
        "makes it likelier that something does well there by luck."
    )


def _role(choice: Mapping[str, Any]) -> str:
    return "chosen" if choice["verdict"] in ("go", "incomplete") else "candidate" if choice["chosen"] else "closest"
