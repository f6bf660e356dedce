"""What a run cost, by stage, and against its budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysae.files import read_json_if
from raysae.report.page import Part

LABELS = {"device_hours": "{device}-hours", "tokens": "Tokens, all stages", "gigabytes": "On disk, GB"}


def read(run_dir: Path) -> dict[str, Any]:
    ledger = read_json_if(run_dir / "ledger.json")
    return {"ledger": ledger, "budget": budget_rows(ledger)}


def budget_rows(ledger: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each item label, spent, before (by reused stages), limit and share as text, the bar's width in percent, and
    whether it is over; nothing for a ledger without a budget."""
    budget = ledger.get("budget") or {}
    rows = []
    for item, name in LABELS.items():
        if item not in budget:
            continue
        entry, limit = budget[item], budget[item]["limit"]
        share = entry["share"]
        rows.append(
            {
                "label": name.format(device=budget["device"]),
                "field": f"budget.{item}",
                "spent": _amount(item, entry["spent"]),
                "before": _amount(item, entry["before"]),
                "limit": "no limit" if limit is None else _amount(item, limit),
                "share": "" if share is None else f"{share:.0%}" if share >= 0.01 else "under 1%",
                "width": None if share is None else f"{100 * min(share, 1.0):.1f}",
                "over": share is not None and share > 1,
                "note": f"activations {_amount(item, entry['activations'])}" if "activations" in entry else "",
            }
        )
    return rows


def _amount(item: str, value: float) -> str:
    return f"{value:,.0f}" if item == "tokens" else f"{value:,.3g}"


PART = Part("cost", "Cost", Path(__file__).with_name("cost.html.j2"), read)
