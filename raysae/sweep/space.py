"""The search space: which SAEs a sweep trains, and which of their coefficients are left to Optuna.

A sweep is a list of proposals, one per (site, architecture, expansion factor, sample), each trained once per seed. In a
grid every coefficient is given; in a search Optuna chooses it. The list runs through all expansion factors before it
comes back to the first, so each is sampled equally often, however far the sweep gets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from raysae.sae.architectures import ARCHITECTURES, SAEConfig
from raysae.sae.conventions import l1_in_unit_norm
from raysae.sae.losses import Losses
from raysae.sae.train import Member, Recipe

COEFFICIENT = {name: architecture.coefficient for name, architecture in ARCHITECTURES.items()}
"""The sparsity hyper-parameter of each architecture."""


@dataclass(frozen=True)
class Proposal:
    """One point of the space. `coefficient` is None where Optuna is to choose it."""

    index: int
    site: str
    architecture: str
    expansion_factor: float
    coefficient: float | None


def proposals(
    widths: Mapping[str, int],
    architectures: Sequence[str],
    expansion_factors: Sequence[float],
    coefficients: Mapping[str, Sequence[float]] | None,
    samples: int,
) -> list[Proposal]:
    """All proposals of a sweep over sites of these widths (d_in by site).

    coefficients: by architecture, for a grid; None for a search with `samples` draws per point.
    """
    points: list[tuple[str, str, float, float | None]] = []
    rounds = range(samples if coefficients is None else max(len(coefficients[a]) for a in architectures))
    for i, site, architecture, expansion in product(rounds, widths, architectures, expansion_factors):
        if coefficients is None:
            points.append((site, architecture, expansion, None))
        elif i < len(coefficients[architecture]):
            points.append((site, architecture, expansion, coefficients[architecture][i]))
    return [Proposal(i, *point) for i, point in enumerate(points)]


@dataclass(frozen=True)
class Common:
    """What the SAEs of a sweep have in common beside the recipe."""

    learning_rate: float | None = None
    """Of every width; None: base_learning_rate · sqrt(16384 / d_sae)."""
    base_learning_rate: float = 2e-4
    losses: Losses = field(default_factory=Losses)
    l1_units: str = "unit_norm"
    """In which L1 coefficients are stated (`conventions.L1_UNITS`)."""


SHOWN = {"k": "k", "l1_coefficient": "l1_", "target_l0": "target", "l0_coefficient": "l0_"}
"""How a coefficient is named in an SAE's id."""


def members(proposal: Proposal, coefficient: float, d_in: int, seeds: Sequence[int], common: Common) -> list[Member]:
    """The SAEs of a proposal, one per seed."""
    d_sae = max(1, round(proposal.expansion_factor * d_in))
    rate = common.learning_rate
    rate = rate if rate is not None else common.base_learning_rate * math.sqrt(2**14 / d_sae)
    name = COEFFICIENT[proposal.architecture]
    value: float = min(int(coefficient), d_sae) if name == "k" else float(coefficient)
    if name == "l1_coefficient":
        value = l1_in_unit_norm(value, common.l1_units, d_in, d_sae)
    if name == "target_l0":
        value = min(value, d_sae)
    shown = f"{SHOWN[name]}{value:.3g}" if name != "k" else f"k{value}"
    kind = f"{proposal.index:03d}-{proposal.architecture}-x{proposal.expansion_factor:g}-{shown}"
    made = []
    for seed in seeds:
        options: dict[str, Any] = {name: value, "seed": seed}
        config = SAEConfig(proposal.architecture, d_in, d_sae, **options)
        made.append(Member(f"{kind}-s{seed}", config, rate, common.losses))
    return made


def recipe(
    tokens: int,
    batch_size: int,
    warmup_fraction: float,
    decay_fraction: float,
    sparsity_warmup_fraction: float,
    dead_after_tokens: int,
    resample_at: Sequence[float] = (),
    precision: str = "float32",
) -> Recipe:
    """The recipe in steps. In a run too short for `dead_after_tokens`, silence for a twentieth of its tokens is death: with
    more, AuxK comes too late in it (BatchTopK, stories260K, 1M tokens: 8 % of the latents never fire, against 0.4 %).
    """
    steps = max(1, tokens // batch_size)
    return Recipe(
        steps=steps,
        batch_size=batch_size,
        warmup_steps=round(warmup_fraction * steps),
        decay_steps=round(decay_fraction * steps),
        sparsity_warmup_steps=round(sparsity_warmup_fraction * steps),
        dead_after_tokens=min(dead_after_tokens, max(batch_size, steps * batch_size // 20)),
        resample_steps=tuple(round(share * steps) for share in resample_at),
        precision=precision,
    )
