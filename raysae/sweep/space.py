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

from raysae.errors import UserError
from raysae.sae.architectures import ARCHITECTURES, SAEConfig
from raysae.sae.conventions import l1_in_unit_norm
from raysae.sae.losses import Losses
from raysae.sae.train import Member, Recipe

COEFFICIENT = {name: architecture.coefficient for name, architecture in ARCHITECTURES.items()}
"""The sparsity hyper-parameter of each architecture."""
COUNTS = ("k", "target_l0")
"""Those that count latents, of which an SAE has d_sae."""


@dataclass(frozen=True)
class Proposal:
    """One point of the space. `coefficient` is None where Optuna is to choose it."""

    index: int
    site: str
    architecture: str
    expansion_factor: float
    coefficient: float | None


def width(expansion_factor: float, d_in: int) -> int:
    """d_sae."""
    return max(1, round(expansion_factor * d_in))


def range_at(architecture: str, given: tuple[float, float], d_sae: int) -> tuple[float, float]:
    """The part of a range that SAEs of this width can have: a count of latents ends at d_sae."""
    low, high = given
    return low, min(high, d_sae) if COEFFICIENT[architecture] in COUNTS else high


def check_space(
    widths: Mapping[str, int],
    architectures: Sequence[str],
    expansion_factors: Sequence[float],
    given: Mapping[str, tuple[str, Sequence[float]]],
    samples: int | None,
) -> list[str]:
    """Refuse a space with points that cannot be or that are the same SAE; returns which ranges end early, in words.

    widths: d_in by site. given: by architecture, the field that states its coefficients and what it states: the values of
    a grid, or (low, high) of a search with `samples` draws per point. Raises UserError, one line.
    """
    cut: dict[str, None] = {}
    for site, d_in in widths.items():
        by_width: dict[int, float] = {}
        for factor in expansion_factors:
            d_sae = width(min(factor, 2**40), d_in)
            if d_sae >= 2**31:
                raise UserError(
                    f"sweep.expansion_factors: {factor:g} makes {d_sae:.3g} latents at {site} (d_in {d_in})"
                )
            if by_width.setdefault(d_sae, factor) != factor:
                raise UserError(
                    f"sweep.expansion_factors: {by_width[d_sae]:g} and {factor:g} are both d_sae {d_sae} at {site} "
                    f"(d_in {d_in}); keep one"
                )
        for architecture in architectures:
            field, values = given[architecture]
            name = COEFFICIENT[architecture]
            if name == "k" and any(value != int(value) for value in values):
                raise UserError(f"sweep.{field}: {list(values)} must be whole numbers: {architecture} keeps k latents")
            for d_sae, factor in by_width.items():
                at = f"the {d_sae} latents of an SAE of expansion factor {factor:g} at {site}"
                above = [value for value in values if name in COUNTS and value > d_sae]
                if samples is None or len(above) == 2:
                    if above:
                        shown = ", ".join(f"{value:g}" for value in above)
                        raise UserError(f"sweep.{field}: {shown} is above {at} (d_in {d_in}); leave it out, or widen")
                    continue
                low, high = range_at(architecture, (values[0], values[1]), d_sae)
                there = high - low + 1 if name == "k" else 1 if low == high else math.inf
                if samples > there:
                    raise UserError(
                        f"sweep.samples: {samples} {architecture} SAEs are asked at each point, but {field} holds "
                        f"{there:g} values of {name} for {at}; lower samples, or widen the range"
                    )
                if above:
                    cut[f"sweep: {field} [{values[0]:g}, {values[1]:g}] ends at {at}"] = None
    return list(cut)


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
    offsets: Mapping[str, float] = field(default_factory=dict)
    """By site, for those units: `Store.offset`, 1 where it is not given."""


SHOWN = {"k": "k", "l1_coefficient": "l1_", "target_l0": "target", "l0_coefficient": "l0_"}
"""How a coefficient is named in an SAE's id."""


def members(proposal: Proposal, coefficient: float, d_in: int, seeds: Sequence[int], common: Common) -> list[Member]:
    """The SAEs of a proposal, one per seed."""
    d_sae = width(proposal.expansion_factor, d_in)
    rate = common.learning_rate
    rate = rate if rate is not None else common.base_learning_rate * math.sqrt(2**14 / d_sae)
    name = COEFFICIENT[proposal.architecture]
    value: float = min(int(coefficient), d_sae) if name == "k" else float(coefficient)
    if name == "l1_coefficient":
        value = l1_in_unit_norm(value, common.l1_units, d_in, d_sae, common.offsets.get(proposal.site, 1.0))
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
