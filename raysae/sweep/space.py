"""The search space: which SAEs a sweep trains, and which of their coefficients are left to Optuna.

A sweep is a list of proposals, one per (site, architecture, expansion factor, sample), each trained once per seed. In a
grid every coefficient is given; in a search Optuna chooses it. The list runs through all expansion factors before it
comes back to the first, so each is sampled equally often, however far the sweep gets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from raysae.sae.architectures import ARCHITECTURES, SAEConfig
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


def members(
    proposal: Proposal,
    coefficient: float,
    d_in: int,
    seeds: Sequence[int],
    learning_rate: float | None,
    base_learning_rate: float,
) -> list[Member]:
    """The SAEs of a proposal, one per seed. Learning rate ∝ 1/sqrt(d_sae) from its base at 16384, unless given."""
    d_sae = max(1, round(proposal.expansion_factor * d_in))
    rate = learning_rate if learning_rate is not None else base_learning_rate * math.sqrt(2**14 / d_sae)
    name = COEFFICIENT[proposal.architecture]
    value = min(int(coefficient), d_sae) if name == "k" else float(coefficient)
    shown = f"k{value}" if name == "k" else f"l1_{value:.3g}"
    kind = f"{proposal.index:03d}-{proposal.architecture}-x{proposal.expansion_factor:g}-{shown}"
    made = []
    for seed in seeds:
        options: dict[str, Any] = {name: value, "seed": seed}
        made.append(Member(f"{kind}-s{seed}", SAEConfig(proposal.architecture, d_in, d_sae, **options), rate))
    return made


def recipe(
    tokens: int,
    batch_size: int,
    warmup_fraction: float,
    decay_fraction: float,
    l1_warmup_fraction: float,
    dead_after_tokens: int,
) -> Recipe:
    """The recipe in steps. In a run too short for `dead_after_tokens`, silence for half of its tokens is death."""
    steps = max(1, tokens // batch_size)
    return Recipe(
        steps=steps,
        batch_size=batch_size,
        warmup_steps=round(warmup_fraction * steps),
        decay_steps=round(decay_fraction * steps),
        l1_warmup_steps=round(l1_warmup_fraction * steps),
        dead_after_tokens=min(dead_after_tokens, max(batch_size, steps * batch_size // 2)),
    )
