"""Gate criteria as data: a YAML file of metric, operator and threshold, each with its reason."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from raysae.config import NULLS, Section, read_yaml, validate
from raysae.errors import UserError
from raysae.evaluate.nulls import ELSEWHERE

OPERATORS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
METRICS = (
    "fvu", "explained_variance", "l0", "l0_fraction", "l1", "dead_fraction", "never_fired_fraction", "dense_fraction",
    "l2_ratio", "relative_reconstruction_bias", "cosine", "ce_delta", "ce_loss_recovered", "ce_recovered_mean", "kl",
    "stability_mmcs", "stability_recurring_fraction", "stability_recurring_variance",
    "d_sae", "expansion_factor", "n_rows", "n_scored_tokens",
)  # fmt: skip
SPARSITY = ("l0", "l0_fraction")
CODES = ("pca", "ica", "shuffled_rows", "untrained_model")
"""Kinds of null that may be good codes, so that one is beaten only at an L0 that is no lower than the SAE's (to 5 %)."""
OF_THE_MODEL = ("ce_delta", "ce_loss_recovered", "ce_recovered_mean", "kl", "n_scored_tokens")
MOST_ACTIVE = 0.5
"""An SAE that fires more than this share of its latents on a token is dense: it meets no upper bound on L0, however lax."""


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
    confidence: Literal["point", "interval"] = "point"
    """What must stand so: the value, or every point of its interval (of `evaluation.confidence`, 95% by default)."""
    must_beat: Annotated[str, Field(min_length=1)] | None = None
    """Kind of null (`evaluation.nulls`), such as `untrained`, each of which at its site an SAE must also beat in this
    metric; of kinds that are codes in their own right, such as `pca`, the sparsest that is no sparser than it."""
    mandatory: bool = True
    """Whether missing it stops the phase; others are reported only."""
    why: str
    """The reason for the bound."""

    @property
    def below(self) -> bool:
        """Whether less is better."""
        return self.op in ("<=", "<")


class Assumption(Section):
    """Something that the phase takes for granted: one line of its assumption log."""

    assumption: Annotated[str, Field(min_length=1)]
    """What is assumed."""
    if_wrong: Annotated[str, Field(min_length=1)]
    """What would then not hold."""
    checked_by: Annotated[str, Field(min_length=1)]
    """What would show that it is wrong: a number of the run, a test, or that nothing does yet."""


class Gate(Section):
    """A phase's gate: every mandatory criterion must hold."""

    name: str
    """Name of the gate, such as the phase."""
    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1)]
    """What must hold."""
    assumptions: tuple[Assumption, ...] = ()
    """What is taken for granted; carried into decision.json and the report, and judged by nobody but the reader."""

    @model_validator(mode="after")
    def _words_differ(self) -> Gate:
        words = [c.criterion for c in self.criteria]
        if len(set(words)) < len(words):
            raise ValueError(
                f"criteria must differ in their words, got {words}: waivers and reports name them by these"
            )
        return self


class Measured(NamedTuple):
    """A metric of one SAE with its interval; NaN where it is missing."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """A criterion applied to one SAE: the value with its interval, and whether it holds. A missing value never does."""

    phase: str
    criterion: str
    metric: str
    op: str
    threshold: float
    confidence: str
    must_beat: str | None
    mandatory: bool
    why: str
    value: float
    low: float
    high: float
    n: int
    baseline_value: float | None
    """The best value among the controls of `must_beat`; None where there are none."""
    verdict: Literal["pass", "fail", "waived"]
    """waived: it does not hold, and a waiver says that this does not stop the run."""
    reason: str
    """Why it does not hold; empty for a pass."""

    @property
    def stops(self) -> bool:
        """Whether the SAE fails the gate by it."""
        return self.mandatory and self.verdict == "fail"

    @property
    def shortfall(self) -> float:
        """How far the value misses, relative to the threshold and to the controls' best; 0 for a pass."""
        if self.verdict == "pass":
            return 0.0
        below = self.op in ("<=", "<")
        by_value = self.confidence == "point" or not math.isfinite(self.value)
        decisive = self.value if by_value else self.high if below else self.low
        asked = [(decisive, self.threshold)]
        if self.must_beat is not None:
            asked.append((self.value, math.nan if self.baseline_value is None else self.baseline_value))
        missed = [(found - bound if below else bound - found) / max(abs(bound), 1e-9) for found, bound in asked]
        return sum(max(m, 0.0) if math.isfinite(m) else math.inf for m in missed)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def load_gate(path: Path) -> Gate:
    """The gate in a YAML file, or one line that names the file and the field.

    A relative path that is not there from the current folder is looked for in the checkout, so that the shipped gates are
    found from a notebook anywhere. A gate that bounds no L0 is refused: a dense SAE is faithful and says nothing.
    """
    if not path.is_absolute() and not path.exists():
        shipped = Path(__file__).resolve().parents[2] / path
        path = shipped if shipped.exists() else path
    gate = validate(Gate, read_yaml("gate", path), where=str(path))
    if not bounds_l0(gate):
        raise UserError(
            "criteria: none is a mandatory upper bound on l0 or l0_fraction, so that a dense SAE could pass; add one, such "
            f"as metric l0_fraction, op <=, threshold 0.1 (in {path})"
        )
    return gate


def check_must_beat(gate: Gate, nulls: Collection[str], path: Path) -> None:
    """UserError for a `must_beat` that could never hold: of a kind that is not measured, or not in this metric."""
    for c in gate.criteria:
        if c.must_beat is None:
            continue
        asked = f"criterion {c.criterion!r} has must_beat {c.must_beat}"
        if c.must_beat not in nulls:
            known = c.must_beat in NULLS
            mend = "add it" if known else f"must_beat must be one of {', '.join(NULLS)}"
            raise UserError(
                f"evaluation.nulls: {', '.join(nulls)} lacks {c.must_beat}, but {asked}; {mend} (in {path})"
            )
        if c.must_beat == ELSEWHERE and c.metric in OF_THE_MODEL:
            raise UserError(
                f"must_beat: {asked}, whose {c.metric} is not measured: its model predicts nothing (in {path})"
            )


def kind_of(control: str) -> str:
    """The kind of `control-<kind>-<architecture>-<d_sae>-<site>`."""
    return control.split("-", 2)[1] if control.count("-") > 1 else ""


def bounds_l0(gate: Gate, waived: Collection[str] = ()) -> bool:
    """Whether a mandatory criterion that is not waived bounds L0 from above."""
    return any(c.mandatory and c.metric in SPARSITY and c.below and c.criterion not in waived for c in gate.criteria)


def apply(
    gate: Gate,
    metrics: Mapping[str, Any],
    controls: Mapping[str, Mapping[str, Any]] | None = None,
    waived: Collection[str] = (),
) -> list[Verdict]:
    """Every criterion of `gate` against one SAE's metrics (a row of the table).

    controls: metrics of the run's controls by their names, `control-<kind>-...`, for `must_beat`. waived: criteria, by
    their words, that need not hold.
    """
    n = _number(metrics, "n_rows")
    verdicts = []
    for c in gate.criteria:
        found = measured(metrics, c.metric)
        rivals = {name: measured(control, c.metric) for name, control in _rivals(c, metrics, controls or {}).items()}
        reasons = [r for r in (_misses_bound(c, found), _is_dense(c, metrics), _misses_controls(c, found, rivals)) if r]
        baselines = [rival.value for rival in rivals.values()]
        verdicts.append(
            Verdict(
                phase=gate.name,
                **found._asdict(),
                n=int(n) if math.isfinite(n) else 0,
                baseline_value=(min if c.below else max)(baselines, default=None),
                verdict="pass" if not reasons else "waived" if c.criterion in waived else "fail",
                reason="; ".join(reasons),
                **c.model_dump(),
            )
        )
    return verdicts


def _rivals(
    c: Criterion, metrics: Mapping[str, Any], controls: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The controls that `must_beat` is about: of its kind and site; of CODES the sparsest that is as dense as the SAE.

    A code with more latents on is nearer to the activations, so to beat one that is denser is to beat one at equal L0.
    """
    found = {i: m for i, m in controls.items() if kind_of(i) == c.must_beat and m.get("site") == metrics.get("site")}
    if c.must_beat not in CODES:
        return found
    dense = {i: m for i, m in found.items() if _number(m, "l0") >= 0.95 * _number(metrics, "l0")}
    sparsest = min((_number(m, "l0") for m in dense.values()), default=math.nan)
    return {i: m for i, m in dense.items() if _number(m, "l0") == sparsest}


def measured(metrics: Mapping[str, Any], metric: str) -> Measured:
    """A metric of an SAE with its interval; l0_fraction from L0 and d_sae."""
    name, unit = ("l0", _number(metrics, "d_sae") or math.nan) if metric == "l0_fraction" else (metric, 1.0)
    return Measured(*(_number(metrics, f"{name}{end}") / unit for end in ("", "_low", "_high")))


def _misses_bound(c: Criterion, found: Measured) -> str:
    """Why the value, or its interval, does not stand to the threshold as it must; empty if it does."""
    value, low, high = found
    holds = OPERATORS[c.op]
    if not (math.isfinite(value) and holds(value, c.threshold)):
        return f"{c.metric} {value:.4g}, must be {c.op} {c.threshold:g}"
    if c.confidence == "point" or all(math.isfinite(end) and holds(end, c.threshold) for end in (low, high)):
        return ""
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{c.metric} {value:.4g} has no interval, all of which must be {c.op} {c.threshold:g}"
    return f"{c.metric} {value:.4g} [{low:.4g}, {high:.4g}], the whole interval must be {c.op} {c.threshold:g}"


def _is_dense(c: Criterion, metrics: Mapping[str, Any]) -> str:
    """Why no upper bound on L0 holds for a dense SAE; empty for other criteria and SAEs."""
    share = measured(metrics, "l0_fraction").value
    if c.metric in SPARSITY and c.below and share > MOST_ACTIVE:
        return f"dense: {share:.0%} of the latents are active on a token, over {MOST_ACTIVE:.0%}"
    return ""


def _misses_controls(c: Criterion, found: Measured, rivals: Mapping[str, Measured]) -> str:
    """Why the value is not better than that of every rival; empty if it is, or need not be.

    Better is by intervals that do not overlap where both have one, else by value.
    """
    if c.must_beat is None:
        return ""
    if not rivals:
        at_l0 = " at its L0 or above" if c.must_beat in CODES else ""
        return f"{c.metric} must beat that of an SAE of kind {c.must_beat}, but no such control was measured{at_l0}"
    for name, rival in rivals.items():
        by_interval = all(math.isfinite(end) for end in (*found, *rival))
        mine, theirs = found.value, rival.value
        if by_interval:
            mine, theirs = (found.high, rival.low) if c.below else (found.low, rival.high)
        if not (mine < theirs if c.below else mine > theirs):
            what = "'s interval does not clear" if by_interval else " is not better than"
            return f"{c.metric} {found.value:.4g}{what} {rival.value:.4g} of {name}"
    return ""


def _number(metrics: Mapping[str, Any], name: str) -> float:
    """A metric as a float; NaN where it is missing."""
    value = metrics.get(name)
    return math.nan if value is None else float(value)


def passes(verdicts: list[Verdict]) -> bool:
    """Whether every mandatory criterion holds or is waived."""
    return not any(v.stops for v in verdicts)
