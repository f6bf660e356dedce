"""Gate criteria as data: a YAML file of metric, operator and threshold, each with its reason."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from raysae.config import NULLS, Section, read_yaml, validate
from raysae.errors import UserError
from raysae.evaluate.fidelity import RECOVERED
from raysae.evaluate.nulls import ELSEWHERE, TRAINED

OPERATORS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
METRICS = (
    "fvu", "explained_variance", "fvu_without_top_norms", "l0", "l0_fraction", "l0_per_dim", "l0_effective", "l1",
    "dead_fraction", "never_fired_fraction", "dense_fraction", "effective_latents",
    "l2_ratio", "relative_reconstruction_bias", "cosine", "ce_delta", "ce_loss_recovered", "ce_recovered_mean", "kl",
    "stability_mmcs", "stability_recurring_fraction", "stability_recurring_variance",
    "d_sae", "expansion_factor", "n_rows", "n_scored_tokens",
)  # fmt: skip
SHARES = {
    "l0_per_dim": "of the dimensions of its input",
    "l0_fraction": "of its live latents",
    "l0_effective": "of the latents in use",
}
"""L0 by what it is a share of: d_in; d_sae without dead and never-used latents; the number of latents that are as spread
out if they fire equally often (`fidelity.effective_latents`), to which those that hardly ever fire add next to nothing."""
SPARSITY = ("l0", *SHARES)
AS_DENSE = 0.95
"""A null is compared with an SAE if its L0 is no lower, to so much: more latents on bring it nearer to the activations."""
OF_THE_MODEL = ("ce_delta", "ce_loss_recovered", "ce_recovered_mean", "kl", "n_scored_tokens")
OF_TRAINING = ("dead_fraction",)
OF_LATENTS = ("stability_mmcs", "stability_recurring_fraction")
FACTS = ("d_in", "d_sae", "expansion_factor")
ENOUGH_GROUPS = 20
"""Groups of equal size below which intervals miss the truth too often (`benchmarks/coverage.py`), so that none decides."""
MOST_ACTIVE = 0.5
"""An SAE whose L0 is more than this share of d_in, or of its latents (SHARES), is dense: it meets no upper bound on L0,
however lax. With as many latents on as its input has dimensions, any change of basis is faithful."""
Difference = Callable[[str, str, str], tuple[float, float, float] | None]
"""metric(one) - metric(other) with its interval, paired by group (`fidelity.Paired`); None where it was not measured."""


class Bound(Section):
    """How a metric must stand to a number."""

    metric: Literal[METRICS]  # type: ignore[valid-type]
    """Column of the table, or a share of L0 (SHARES)."""
    op: Literal["<=", "<", ">=", ">"]
    """How the value must stand to the threshold."""
    threshold: Annotated[float, Field(allow_inf_nan=False)]
    """The bound."""

    @property
    def below(self) -> bool:
        """Whether less is better."""
        return self.op in ("<=", "<")


class Criterion(Bound):
    """One line of a gate."""

    criterion: str
    """What is asked, in words."""
    confidence: Literal["point", "interval"] = "point"
    """What must stand so: the value, or every point of its interval (of `evaluation.confidence`, 95% by default)."""
    must_beat: Annotated[str, Field(min_length=1)] | None = None
    """Kind of null (`evaluation.nulls`), such as `random_encoder`, that an SAE must also beat in this metric, clear by the
    interval of the difference: the null that was made beside it, or else the sparsest at its site that is no sparser."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """By how much, as a share of what the null lacks to be perfect: two random encoders differ too, by a few percent."""
    fallback: Bound | None = None
    """What is asked in its place, of the value or the interval and against the same null, where an SAE has no such metric,
    as CE recovered where ablation costs the model nothing."""
    mandatory: bool = True
    """Whether missing it stops the phase; others are reported only."""
    why: str
    """The reason for the bound."""

    def asked(self, metrics: Mapping[str, Any]) -> Criterion:
        """This criterion, or its fallback where `metrics` have no such number."""
        if self.fallback is None or math.isfinite(measured(metrics, self.metric).value):
            return self
        return self.model_copy(update=self.fallback.model_dump() | {"fallback": None})


class Assumption(Section):
    """Something that the phase takes for granted: one line of its assumption log."""

    assumption: Annotated[str, Field(min_length=1)]
    """What is assumed."""
    if_wrong: Annotated[str, Field(min_length=1)]
    """What would then not hold."""
    checked_by: Annotated[str, Field(min_length=1)]
    """What would show that it is wrong: a number of the run, a test, or that nothing does yet."""


class Unmeasured(Section):
    """Something that the phase is about and that no criterion measures yet."""

    subject: Annotated[str, Field(min_length=1)]
    """What is not measured, in words."""
    why: Annotated[str, Field(min_length=1)]
    """Why it is not, or what says that it matters."""
    mandatory: bool = True
    """Whether the phase cannot be a go without it: its verdict is then `incomplete`."""


class Choose(Section):
    """Which of the SAEs that pass is handed over, at each site."""

    rule: Literal["knee", "sparsest", "most_faithful", "matched_l0"] = "knee"
    """knee: the least error · L0^a; sparsest: the least L0; most_faithful: the least error; matched_l0: the least error of
    those at an L0."""
    error: Literal["fvu", "ce_delta"] = "fvu"
    """What is traded against L0."""
    a: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Exponent of the knee: twice the L0 must divide the error by at least 2^a."""
    matched_l0: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The L0 of the rule matched_l0, to 10 %."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        """`sparsest` for {rule: sparsest}, and {matched_l0: 32} for {rule: matched_l0, matched_l0: 32}."""
        if isinstance(given, str):
            return {"rule": given}
        if isinstance(given, Mapping) and given.get("matched_l0") is not None:
            return {"rule": "matched_l0", **given}
        return given

    @model_validator(mode="after")
    def _one_rule(self) -> Choose:
        if (self.rule == "matched_l0") != (self.matched_l0 is not None):
            raise ValueError("choose: the rule matched_l0 and its number go together, such as choose: {matched_l0: 32}")
        return self


class Gate(Section):
    """A phase's gate: every mandatory criterion must hold."""

    name: str
    """Name of the gate, such as the phase."""
    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1)]
    """What must hold."""
    choose: Choose = Choose()
    """Which of those that pass is chosen."""
    unmeasured: tuple[Unmeasured, ...] = ()
    """What the phase is about and nothing here measures: a gate with a mandatory one says incomplete in place of go."""
    assumptions: tuple[Assumption, ...] = ()
    """What is taken for granted; carried into decision.json and the report, and judged by nobody but the reader."""

    @model_validator(mode="after")
    def _words_differ(self) -> Gate:
        words = [*(c.criterion for c in self.criteria), *(u.subject for u in self.unmeasured)]
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
    margin: float
    mandatory: bool
    why: str
    value: float
    low: float
    high: float
    n: int
    """What the metric rests on: rows, scored tokens, training tokens (dead latents), or latents (their stability)."""
    n_groups: int
    """Groups that these are of; 0 where the metric's interval is not over groups."""
    baseline_value: float | None
    """The best value among the controls of `must_beat`; None where there are none."""
    verdict: Literal["pass", "fail", "waived"]
    """waived: it does not hold, and a waiver says that this does not stop the run."""
    reason: str
    """Why it does not hold; empty for a pass."""
    instead_of: str | None = None
    """Why it is not the metric that the gate asks for first; None where it is."""

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
            f"criteria: none is a mandatory upper bound on {', '.join(SPARSITY[:-1])} or {SPARSITY[-1]}, so that a dense "
            f"SAE could pass; add one, such as metric l0_per_dim, op <=, threshold 0.25 (in {path})"
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
        if c.must_beat == ELSEWHERE and {c.metric, getattr(c.fallback, "metric", None)} & {*OF_THE_MODEL}:
            raise UserError(
                f"must_beat: {asked}, whose {c.metric} is not measured: its model predicts nothing (in {path})"
            )


def kind_of(control: str) -> str:
    """The kind of `control-<kind>-...`."""
    return control.split("-", 2)[1] if control.count("-") > 1 else ""


def bounds_l0(gate: Gate, waived: Collection[str] = ()) -> bool:
    """Whether a mandatory criterion that is not waived bounds L0 from above."""
    return any(c.mandatory and c.metric in SPARSITY and c.below and c.criterion not in waived for c in gate.criteria)


def apply(
    gate: Gate,
    metrics: Mapping[str, Any],
    controls: Mapping[str, Mapping[str, Any]] | None = None,
    waived: Collection[str] = (),
    difference: Difference | None = None,
) -> list[Verdict]:
    """Every criterion of `gate` against one SAE's metrics (a row of the table).

    controls: metrics of the nulls on the same split by their names, `control-<kind>-...`, for `must_beat`. waived:
    criteria, by their words, that need not hold. difference: of two SAEs by their ids, `sae_id` in the metrics; without
    it intervals must not overlap.
    """
    verdicts = []
    for given in gate.criteria:
        c = given.asked(metrics)
        found = measured(metrics, c.metric)
        rivals = {name: measured(control, c.metric) for name, control in _rivals(c, metrics, controls or {}).items()}
        apart = _differences(c, metrics, rivals, difference)
        misses = (
            _misses_bound(c, found, metrics), _wants_groups(c, metrics), _is_dense(c, metrics),
            _misses_controls(c, found, rivals, apart),
        )  # fmt: skip
        reasons = [reason for reason in misses if reason]
        baselines = [rival.value for rival in rivals.values()]
        verdicts.append(
            Verdict(
                phase=gate.name,
                **found._asdict(),
                n=_count(metrics, rests_on(c.metric)[0]),
                n_groups=_count(metrics, rests_on(c.metric)[1]),
                baseline_value=(min if c.below else max)(baselines, default=None),
                verdict="pass" if not reasons else "waived" if c.criterion in waived else "fail",
                reason="; ".join(reasons),
                instead_of=None if c is given else _undefined(given, metrics),
                **c.model_dump(exclude={"fallback"}),
            )
        )
    return verdicts


def beside(metrics: Mapping[str, Any]) -> set[str]:
    """Ids of the SAEs that a null was made beside; an SAE's own."""
    of = metrics.get("beside", metrics.get("sae_id"))
    return {of} if isinstance(of, str) else set(of or ())


def _rivals(
    c: Criterion, metrics: Mapping[str, Any], controls: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The controls that `must_beat` is about: of its kind and site, as dense as the SAE (AS_DENSE), and made beside it; if
    none is, the sparsest."""
    dense = {
        i: m
        for i, m in controls.items()
        if kind_of(i) == c.must_beat
        and m.get("site") == metrics.get("site")
        and _number(m, "l0") >= AS_DENSE * _number(metrics, "l0")
    }
    own = {i: m for i, m in dense.items() if beside(m) & beside(metrics)}
    sparsest = min((_number(m, "l0") for m in (own or dense).values()), default=math.nan)
    return {i: m for i, m in (own or dense).items() if _number(m, "l0") == sparsest}


def rivals(gate: Gate, metrics: Mapping[str, Any], controls: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The controls that an SAE is held against: those made beside it, and those that `must_beat` is about."""
    own = {i for i, m in controls.items() if beside(m) & beside(metrics)}
    return own.union(*(_rivals(c.asked(metrics), metrics, controls) for c in gate.criteria if c.must_beat))


def voids(null: str, metrics: Mapping[str, Any], chosen: Collection[str]) -> bool:
    """Whether a null that passes the gate makes it void for the chosen SAEs: it is as near to one as a null can be made.

    One that stands beside others, at another L0 or size, does not; nor does one of an untrained model, which was measured
    on other activations. Those that train stand beside one SAE for all of their site.
    """
    kind = kind_of(null)
    return kind != ELSEWHERE and (kind in TRAINED or not beside(metrics) - {null} or bool(beside(metrics) & {*chosen}))


def _differences(
    c: Criterion, metrics: Mapping[str, Any], rivals: Collection[str], difference: Difference | None
) -> dict[str, Measured]:
    """The metric less that of each rival, by group, where that is known."""
    if difference is None or not isinstance(metrics.get("sae_id"), str):
        return {}
    found = {name: difference(metrics["sae_id"], name, c.metric) for name in rivals}
    return {name: Measured(*d) for name, d in found.items() if d is not None}


def measured(metrics: Mapping[str, Any], metric: str) -> Measured:
    """A metric of an SAE with its interval; SHARES from L0 and what it is a share of."""
    name, unit = ("l0", _whole(metrics, metric) or math.nan) if metric in SHARES else (metric, 1.0)
    return Measured(*(_number(metrics, f"{name}{end}") / unit for end in ("", "_low", "_high")))


def _whole(metrics: Mapping[str, Any], share: str) -> float:
    """What L0 is a share of. A linear code is judged at `latents`, those of the SAE that it stands beside."""
    d_sae = _number(metrics, "d_sae")
    if share == "l0_per_dim":
        d_in = _number(metrics, "d_in")
        return d_in if math.isfinite(d_in) else d_sae / (_number(metrics, "expansion_factor") or math.nan)
    latents = _number(metrics, "latents")
    if math.isfinite(latents):
        return latents
    if share == "l0_effective":
        return _number(metrics, "effective_latents")
    silent = (_number(metrics, "dead_fraction"), _number(metrics, "never_fired_fraction"))
    return d_sae * (1 - max((part for part in silent if math.isfinite(part)), default=0.0))


def _undefined(c: Criterion, metrics: Mapping[str, Any]) -> str:
    """Why an SAE lacks the metric of a criterion."""
    gap = measured(metrics, RECOVERED.get(c.metric, ""))
    if not math.isfinite(gap.value):
        return f"{c.metric} was not measured"
    return (
        f"{c.metric} is not defined here: ablation costs the model {gap.value:.3g} [{gap.low:.3g}, {gap.high:.3g}] nats, "
        "which is not clearly above 0"
    )


def _misses_bound(c: Criterion, found: Measured, metrics: Mapping[str, Any]) -> str:
    """Why the value, or its interval, does not stand to the threshold as it must; empty if it does."""
    value, low, high = found
    holds = OPERATORS[c.op]
    if c.metric in RECOVERED and not math.isfinite(value) and RECOVERED[c.metric] in metrics:
        return _undefined(c, metrics)
    if not (math.isfinite(value) and holds(value, c.threshold)):
        return f"{c.metric} {value:.4g}, must be {c.op} {c.threshold:g}"
    if c.confidence == "point" or all(math.isfinite(end) and holds(end, c.threshold) for end in (low, high)):
        return ""
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{c.metric} {value:.4g} has no interval, all of which must be {c.op} {c.threshold:g}"
    return f"{c.metric} {value:.4g} [{low:.4g}, {high:.4g}], the whole interval must be {c.op} {c.threshold:g}"


def rests_on(metric: str) -> tuple[str, str]:
    """Columns that count what a metric rests on, and its groups; empty where nothing is counted."""
    if metric in FACTS:
        return "", ""
    if metric in OF_TRAINING:
        return "dead_window_tokens", ""
    if metric in OF_LATENTS:
        return "stability_latents", ""
    return ("n_scored_tokens", "n_scored_groups") if metric in OF_THE_MODEL else ("n_rows", "n_groups")


def _wants_groups(c: Criterion, metrics: Mapping[str, Any]) -> str:
    """Why the metric's interval decides nothing, for want of groups; empty if it may, or need not.

    Unequal groups count as fewer (`statistics.effective_groups`).
    """
    counted = rests_on(c.metric)[1]
    if c.confidence == "point" or not counted:
        return ""
    groups = _number(metrics, counted)
    effective = _number(metrics, counted.replace("n_", "effective_"))
    if not min(groups, effective) < ENOUGH_GROUPS:
        return ""
    alike = "" if round(effective) == groups else f", which count as {effective:.0f} of equal size"
    return f"for want of groups: {c.metric} rests on {groups:.0f}{alike}, and an interval takes {ENOUGH_GROUPS}"


def _is_dense(c: Criterion, metrics: Mapping[str, Any]) -> str:
    """Why no upper bound on L0 holds for a dense SAE; empty for other criteria and SAEs."""
    if c.metric in SPARSITY and c.below:
        for share, of_what in SHARES.items():
            active = measured(metrics, share).value
            if active > MOST_ACTIVE:
                return f"dense: L0 {_number(metrics, 'l0'):.4g} is {active:.0%} {of_what}, over {MOST_ACTIVE:.0%}"
    return ""


def _misses_controls(
    c: Criterion, found: Measured, rivals: Mapping[str, Measured], apart: Mapping[str, Measured]
) -> str:
    """Why the value is not better than that of every rival; empty if it is, or need not be.

    Better is by the interval of the difference (`apart`); where there is none by intervals that do not overlap; where one
    has none by value.
    """
    if c.must_beat is None:
        return ""
    if not rivals:
        asked = f"{c.metric} must beat that of an SAE of kind {c.must_beat}"
        return f"{asked}, but no such control was measured at its L0 or above"
    for name, rival in rivals.items():
        lead = c.margin * (abs(rival.value) if c.below else abs(1 - rival.value))  # 0, or 1, is perfect
        by = f" by {lead:.2g}" if lead else ""
        mine, theirs, what = found.value, rival.value, f" is not better{by} than"
        if name in apart:
            d = apart[name]
            mine, theirs = (d.high, 0.0) if c.below else (d.low, 0.0)
            what = f" is not clearly better{by} (by {d.value:.2g} [{d.low:.2g}, {d.high:.2g}], paired by group) than"
        elif all(math.isfinite(end) for end in (*found, *rival)):
            mine, theirs = (found.high, rival.low) if c.below else (found.low, rival.high)
            what = f"'s interval does not clear{by}"
        if not (mine < theirs - lead if c.below else mine > theirs + lead):
            return f"{c.metric} {found.value:.4g}{what} {rival.value:.4g} of {name}"
    return ""


def _number(metrics: Mapping[str, Any], name: str) -> float:
    """A metric as a float; NaN where it is missing."""
    value = metrics.get(name)
    return math.nan if value is None else float(value)


def _count(metrics: Mapping[str, Any], name: str) -> int:
    """A count; 0 where it is missing."""
    n = _number(metrics, name)
    return int(n) if math.isfinite(n) else 0


def passes(verdicts: list[Verdict]) -> bool:
    """Whether every mandatory criterion holds or is waived."""
    return not any(v.stops for v in verdicts)
