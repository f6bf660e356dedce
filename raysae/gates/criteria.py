"""Gate criteria as data: a YAML file of metric, operator and threshold, each with its reason."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from raysae.config import Section, read_yaml, validate

OPERATORS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
METRICS = (
    "fvu", "explained_variance", "l0", "l0_fraction", "l1", "dead_fraction", "never_fired_fraction", "dense_fraction",
    "l2_ratio", "relative_reconstruction_bias", "cosine", "ce_delta", "ce_loss_recovered", "ce_recovered_mean", "kl",
    "d_sae", "expansion_factor", "n_rows", "n_scored_tokens",
)  # fmt: skip


class Criterion(Section):
    """One line of a gate."""

    criterion: str
    """What is asked, in words."""
    metric: Literal[METRICS]  # type: ignore[valid-type]
    """Column of the table; l0_fraction is L0 / d_sae."""
    op: Literal["<=", "<", ">=", ">"]
    """How the value must stand to the threshold."""
    threshold: Annotated[float, Field(allow_inf_nan=False)]
    """The bound."""
    mandatory: bool = True
    """Whether missing it stops the phase; others are reported only."""
    why: str
    """The reason for the bound."""


class Gate(Section):
    """A phase's gate: every mandatory criterion must hold."""

    name: str
    """Name of the gate, such as the phase."""
    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1)]
    """What must hold."""


@dataclass(frozen=True)
class Verdict:
    """A criterion applied to one SAE: the value with its interval, and whether it holds. A missing value never does."""

    phase: str
    criterion: str
    metric: str
    op: str
    threshold: float
    mandatory: bool
    why: str
    value: float
    low: float
    high: float
    n: int
    verdict: Literal["pass", "fail"]

    @property
    def in_words(self) -> str:
        return f"{self.metric} {self.value:.4g}, must be {self.op} {self.threshold:g}"

    @property
    def shortfall(self) -> float:
        """How far the value misses, relative to the threshold; 0 for a pass."""
        if self.verdict == "pass":
            return 0.0
        return (
            abs(self.value - self.threshold) / max(abs(self.threshold), 1e-9) if math.isfinite(self.value) else math.inf
        )

    def record(self) -> dict[str, Any]:
        return asdict(self)


def load_gate(path: Path) -> Gate:
    """The gate in a YAML file, or one line that names the file and the field.

    A relative path that is not there from the current folder is looked for in the checkout, so that the shipped gates are
    found from a notebook anywhere.
    """
    if not path.is_absolute() and not path.exists():
        shipped = Path(__file__).resolve().parents[2] / path
        path = shipped if shipped.exists() else path
    return validate(Gate, read_yaml("gate", path), where=str(path))


def apply(gate: Gate, metrics: Mapping[str, Any]) -> list[Verdict]:
    """Every criterion of `gate` against one SAE's metrics (a row of the table)."""
    width = _number(metrics, "d_sae") or math.nan
    values = {**metrics, **{f"l0_fraction{end}": _number(metrics, f"l0{end}") / width for end in ("", "_low", "_high")}}
    n = _number(values, "n_rows")
    verdicts = []
    for c in gate.criteria:
        value = _number(values, c.metric)
        holds = math.isfinite(value) and OPERATORS[c.op](value, c.threshold)
        verdicts.append(
            Verdict(
                phase=gate.name,
                value=value,
                low=_number(values, f"{c.metric}_low"),
                high=_number(values, f"{c.metric}_high"),
                n=int(n) if math.isfinite(n) else 0,
                verdict="pass" if holds else "fail",
                **c.model_dump(),
            )
        )
    return verdicts


def _number(metrics: Mapping[str, Any], name: str) -> float:
    """A metric as a float; NaN where it is missing."""
    value = metrics.get(name)
    return math.nan if value is None else float(value)


def passes(verdicts: list[Verdict]) -> bool:
    """Whether every mandatory criterion holds."""
    return all(v.verdict == "pass" for v in verdicts if v.mandatory)
