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
from collections.abc import Sequence
from dataclasses import dataclass


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
