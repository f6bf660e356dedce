"""How often the test rows of a data set were looked at: `<output>/looks/<records>.json`, across all runs of an output.

A split depends on the data and the seed alone, so later runs are measured on the same test rows. Whoever looks often
enough finds an SAE that does well there by luck: the number of looks says how untouched a test split is.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from raysae.artifacts import fingerprint, lock_of
from raysae.errors import Damaged
from raysae.files import read_json, write_json


def look(root: Path, records: str, by: str, run: str, what: Any) -> dict[str, Any]:
    """Count a look at the test split of the stage `records`, once for the same `what`; returns how many there were.

    by: `choice` or `probes`. run: name of the run's folder. what: what was looked at: a run's identity and its SAEs.

    Raises Damaged for a file that is no such ledger.

    Returns `test_split` (the records), `number` of this look, and `earlier`, the looks before it (at, by, run).
    """
    file = root / "looks" / f"{records}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    key = fingerprint({"by": by, "what": what})
    with lock_of(root, f"looks-{records}"):
        seen: list[dict[str, Any]] = read_json(file, list) if file.is_file() else []
        if not all(isinstance(entry, dict) and {"at", "by", "run", "what"} <= entry.keys() for entry in seen):
            raise Damaged(file, "is no ledger of looks", "delete it, and looks are counted anew")
        keys = [entry["what"] for entry in seen]
        if key not in keys:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            write_json(file, [*seen, {"at": now, "by": by, "run": run, "what": key}])
        number = keys.index(key) if key in keys else len(seen)
    earlier = [{name: entry[name] for name in ("at", "by", "run")} for entry in seen[:number]]
    return {"test_split": records, "number": number + 1, "earlier": earlier}
