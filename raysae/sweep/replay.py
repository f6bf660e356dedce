"""A sweep's trained points as a plan, so that it can be trained again SAE by SAE.

Neither a search nor pruning can be repeated from the config alone: Optuna's next proposal and the SAEs that dominate
depend on which trial reports first. What was trained can be: every point's coefficient and seeds, and the rung at which it
was stopped, are in the table. An SAE does not depend on its neighbours, in a pack or in the cluster.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from raysae.artifacts import fingerprint
from raysae.sweep.prune import Stop
from raysae.sweep.space import COEFFICIENT, Proposal

ID = re.compile(r"(?P<index>\d+)-(?P<architecture>[a-z0-9_]+)-x(?P<expansion>[0-9.e+-]+)-")
"""How an SAE's id begins: see `space.members`."""


@dataclass(frozen=True)
class Replay:
    """What to train: proposals with their coefficients (L1 in units of unit_norm), and where which SAE is stopped."""

    plan: tuple[Proposal, ...]
    stops: dict[str, Stop]

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            {"plan": [asdict(p) for p in self.plan], "stops": {i: asdict(s) for i, s in self.stops.items()}}
        )


def replay(table: pd.DataFrame) -> Replay:
    """The replay of a training table: its points in their order, and the stops of those that were pruned.

    One that failed with an error is tried again; one that diverged will diverge.
    """
    points: dict[int, Proposal] = {}
    stops: dict[str, Stop] = {}
    for row in table.to_dict("records"):
        found = _parts(str(row["sae_id"]))
        value = float(row[COEFFICIENT[found["architecture"]]])
        index = int(found["index"])
        points[index] = Proposal(index, str(row["site"]), found["architecture"], float(found["expansion"]), value)
        if row["status"] == "pruned":
            stops[str(row["sae_id"])] = Stop(int(row["tokens"]), str(row["status_reason"]))
    return Replay(tuple(points[i] for i in sorted(points)), stops)


def _parts(sae_id: str) -> dict[str, Any]:
    found = ID.match(sae_id)
    if found is None or found["architecture"] not in COEFFICIENT:
        raise ValueError(f"{sae_id!r} is no id that a sweep gives")
    return found.groupdict()
