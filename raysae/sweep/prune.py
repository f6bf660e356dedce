"""Which SAEs to stop early. Never by raw loss: while λ or the learning rate warms up, losses do not compare, and a low λ
always looks better (its loss holds less penalty). After warm-up an SAE is stopped when it

- diverged: its loss is no longer finite;
- collapsed: it reconstructs no better than the mean (FVU ≥ 1), or fires (almost) nothing (L0 < 0.1);
- is dominated: another SAE of its architecture and width has both L0 and FVU lower by a relative margin, at the same
  number of tokens. Other widths do not dominate: wide SAEs learn more slowly, and one that trails a narrow one half-way
  (as seen on stories260K: L0 89 against 66, FVU 0.021 against 0.016) can lead at the end. Nor do other architectures,
  since L1's shrinkage would have TopK stop every ReLU SAE and leave nothing to compare.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysae.sweep import collect


@dataclass(frozen=True)
class Standing:
    """An SAE at a rung: validation FVU and L0 after the same tokens as its peers."""

    sae_id: str
    architecture: str
    d_sae: int
    fvu: float
    l0: float


def reason_to_stop(sae: Standing, peers: Sequence[Standing], margin: float) -> str | None:
    """Why `sae` should be stopped, in words, or None."""
    if not (math.isfinite(sae.fvu) and math.isfinite(sae.l0)):
        return "diverged"
    if sae.fvu >= 1 or sae.l0 < 0.1:
        return f"collapsed (FVU {sae.fvu:.3g}, L0 {sae.l0:.3g})"
    for peer in peers:
        comparable = peer.architecture == sae.architecture and peer.d_sae == sae.d_sae
        if comparable and peer.fvu < sae.fvu * (1 - margin) and peer.l0 < sae.l0 * (1 - margin):
            return f"dominated by {peer.sae_id} (FVU {peer.fvu:.3g}, L0 {peer.l0:.3g})"
    return None


def standings(metrics: Mapping[str, Mapping[str, Any]]) -> list[Standing]:
    """Of SAEs by their metrics at a rung."""
    return [Standing(i, m["architecture"], m["d_sae"], m["fvu"], m["l0"]) for i, m in metrics.items()]


@dataclass(frozen=True)
class Stop:
    """That an SAE is stopped once it has seen so many tokens, and why."""

    tokens: int
    reason: str


@dataclass(frozen=True)
class Pruning:
    """Which SAEs of a sweep are stopped early."""

    margin: float | None = None
    """Of `reason_to_stop`; None: no SAE is judged."""
    after_tokens: float = 0.0
    """From which an SAE is judged."""
    stops: Mapping[str, Stop] = field(default_factory=dict)
    """Of a replay, by sae_id, in place of a margin."""

    def reasons(self, tokens: int, metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Why which SAEs of a pack are stopped at a rung: those that a replay says, and those that the pack's others
        dominate. One that is alone in its pack has no others."""
        due = {i: s.reason for i, s in self.stops.items() if i in metrics and tokens >= s.tokens}
        if len(metrics) == 1 or self.margin is None or tokens < self.after_tokens:
            return due
        peers = standings(metrics)
        return due | {s.sae_id: reason for s in peers if (reason := reason_to_stop(s, peers, self.margin))}


class Rungs:
    """Where all SAEs of a sweep stood at each rung, those of an earlier driver too: what packs are judged against."""

    def __init__(self, root: Path, pruning: Pruning) -> None:
        self.pruning = pruning
        self.at: dict[tuple[str, int], dict[str, Standing]] = defaultdict(dict)
        for rung in collect.history(root).to_dict("records") if pruning.margin is not None else ():
            self.at[rung["site"], rung["tokens"]] |= {s.sae_id: s for s in standings({str(rung["sae_id"]): rung})}

    def reasons(self, site: str, metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Take in a pack's rung, not its last; why each of its SAEs should stop where all of them should, else nothing."""
        if self.pruning.margin is None or not metrics:
            return {}
        tokens = next(iter(metrics.values()))["tokens"]
        peers = self.at[site, tokens]
        peers.update({s.sae_id: s for s in standings(metrics)})
        if tokens < self.pruning.after_tokens:
            return {}
        found = {i: reason_to_stop(peers[i], list(peers.values()), self.pruning.margin) for i in metrics}
        return {i: reason for i, reason in found.items() if reason} if all(found.values()) else {}
