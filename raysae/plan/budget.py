"""What a run may cost beside what it has cost: device-hours, tokens and gigabytes, none of them an estimate.

Stages that the run takes from earlier runs count as spent, and are also stated apart: the budget is for what a result
stands on, whoever paid for it first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raysae.errors import UserError

ITEMS = ("device_hours", "tokens", "gigabytes")
FIXES = {
    "device_hours": "train fewer SAEs or fewer tokens each",
    "tokens": "lower training.tokens, sweep.samples or the number of seeds and widths",
    "gigabytes": "lower data.examples, capture fewer sites, or train fewer or narrower SAEs",
}


def spending(stages: Sequence[Mapping[str, Any]], limits: Mapping[str, float | None]) -> dict[str, Any]:
    """The ledger's `budget`: for each of ITEMS `spent`, of that `before` (by reused stages), `limit` and `share`.

    Device-hours are GPU-hours held where the stages held any GPU, and CPU-hours held otherwise (`device` says which);
    tokens are those of all stages, an SAE's training tokens counted for each SAE; gigabytes (10^9 bytes) are on disk,
    `activations` of them in stores. A limit of None is none.
    """
    device = "GPU" if any(s["gpu_seconds"] for s in stages) else "CPU"
    held = "gpu_seconds" if device == "GPU" else "cpu_seconds"

    def total(key: str, unit: float, of: Sequence[Mapping[str, Any]] = stages) -> float:
        return sum(s[key] for s in of) / unit

    found: dict[str, Any] = {"device": device}
    for item, key, unit in zip(ITEMS, (held, "tokens", "bytes"), (3600, 1, 1e9), strict=True):
        spent, limit = total(key, unit), limits.get(item)
        before = total(key, unit, [s for s in stages if s["reused"]])
        share = None if limit is None else spent / limit
        found[item] = {"spent": spent, "before": before, "limit": limit, "share": share}
    found["gigabytes"]["activations"] = total("bytes", 1e9, [s for s in stages if s["stage"] == "store"])
    return found


def refuse_overspending(certain: Mapping[str, float], limits: Mapping[str, float | None], what: str) -> None:
    """UserError if what the run is certain to ask for, by item, is more than its limit. `what` says what was counted."""
    for item, needed in certain.items():
        limit = limits.get(item)
        if limit is not None and needed > limit:
            raise UserError(
                f"budget.{item}: {what} take {_amount(item, needed)}, the budget is {_amount(item, limit)}; "
                f"{FIXES[item]}, or raise budget.{item}"
            )


def _amount(item: str, value: float) -> str:
    return f"{value:,.0f}" if item == "tokens" else f"{value:.3g} GB" if item == "gigabytes" else f"{value:.3g} h"
