"""Gate criteria as data: a YAML file of metric, operator and threshold, each with its reason."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from raysae.config.load import locate, read_yaml, validate
from raysae.config.sections import NULLS, Section
from raysae.errors import UserError
from raysae.evaluate.fidelity import RECOVERED
from raysae.evaluate.nulls import ELSEWHERE, TRAINED
from raysae.gates.metrics import METRICS, known

OPERATORS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
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
ENOUGH_GROUPS = 20
"""Groups of equal size below which intervals miss the truth too often (`benchmarks/coverage.py`), so that none decides."""
MOST_ACTIVE = 0.5
"""An SAE whose L0 is more than this share of d_in, or of its latents (SHARES), is dense: it meets no upper bound on L0,
however lax. With as many latents on as its input has dimensions, any change of basis is faithful."""
Subtract = Callable[[str, str, Callable[[Any], Any]], "tuple[float, float, float] | None"]
"""What a statistic of two SAEs' metrics (a table, with a column each) differs by, first less second, with its interval over
the groups that both were measured on; None where there is none (`evaluate.fidelity.Paired.difference`). KeyError where a
metric has no resamples."""


class Bound(Section):
    """How a metric must stand to a number."""

    metric: Annotated[str, AfterValidator(known)]
    """One of METRICS: a column of the table, a share of L0 (SHARES), or what a study has registered."""
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

    @model_validator(mode="after")
    def _beats_by_what_is_better(self) -> Criterion:
        for bound in (self, self.fallback):
            better = METRICS[bound.metric].direction if bound and self.must_beat else None
            if bound and better and bound.below != (better == "lower"):
                raise ValueError(
                    f"op {bound.op}: with must_beat it must say what is better, {better} {bound.metric} is"
                )
        return self

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
    choose: Choose | None = Choose()
    """Which of the SAEs that pass is chosen; null: none is, since the gate judges something else, such as a study's result.
    It may then bound no L0, and nulls are beaten whatever theirs is."""
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
        missed = [(value - bound if below else bound - value) / max(abs(bound), 1e-9) for value, bound in asked]
        return sum(max(m, 0.0) if math.isfinite(m) else math.inf for m in missed)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def load_gate(path: Path) -> Gate:
    """The gate in a YAML file, or one line that names the file and the field.

    Where there is no such file, the shipped gate of that name. A gate that chooses an SAE and bounds no L0 is refused: a
    dense SAE is faithful and says nothing.
    """
    path = locate("gate", path)
    gate = validate(Gate, read_yaml("gate", path), where=str(path))
    if not keeps_dense_out(gate):
        raise UserError(
            f"criteria: none is a mandatory upper bound on {', '.join(SPARSITY[:-1])} or {SPARSITY[-1]}, so that a dense "
            f"SAE could pass; add one, such as metric l0_per_dim, op <=, threshold 0.25, or choose: null where the gate "
            f"chooses no SAE (in {path})"
        )
    return gate


def check_can_choose(gate: Gate, nulls: Collection[str], path: Path) -> None:
    """UserError for a gate that no sweep could pass: it chooses no SAE, or has a `must_beat` that could never hold, of a
    kind that is not measured, or not in this metric."""
    if gate.choose is None:
        raise UserError(f"choose: null, but a sweep's gate must choose an SAE; give a rule, such as knee (in {path})")
    for c in gate.criteria:
        if c.must_beat is None:
            continue
        asked = f"criterion {c.criterion!r} has must_beat {c.must_beat}"
        if c.must_beat not in nulls:
            mend = "add it" if c.must_beat in NULLS else f"must_beat must be one of {', '.join(NULLS)}"
            raise UserError(
                f"evaluation.nulls: {', '.join(nulls)} lacks {c.must_beat}, but {asked}; {mend} (in {path})"
            )
        of_model = any(b and METRICS[b.metric].count == "n_scored_tokens" for b in (c, c.fallback))
        if c.must_beat == ELSEWHERE and of_model:
            raise UserError(
                f"must_beat: {asked}, whose {c.metric} is not measured: its model predicts nothing (in {path})"
            )


def keeps_dense_out(gate: Gate, waived: Collection[str] = ()) -> bool:
    """Whether a gate that chooses an SAE bounds L0 from above, by a mandatory criterion that is not waived."""
    return gate.choose is None or any(
        c.mandatory and c.metric in SPARSITY and c.below and c.criterion not in waived for c in gate.criteria
    )


def judge(
    gate: Gate,
    metrics: Mapping[str, Any],
    nulls: Mapping[str, Mapping[str, Any]] | None = None,
    waived: Collection[str] = (),
    subtract: Subtract | None = None,
) -> list[Verdict]:
    """Every criterion of `gate` against metrics by name: an SAE's row of the table, or what a study measured.

    nulls: metrics of the nulls on the same split by their names, each with its `kind`, for `must_beat`. waived: criteria,
    by their words, that need not hold. subtract: two SAEs by their ids, `sae_id` in the metrics; without it intervals must
    not overlap.
    """
    verdicts = []
    for given in gate.criteria:
        c = given.asked(metrics)
        value = measured(metrics, c.metric)
        null_values = {name: measured(null, c.metric) for name, null in _to_beat(gate, c, metrics, nulls or {}).items()}
        apart = _differences(c, metrics, null_values, subtract)
        misses = (
            _misses_bound(c, value, metrics), _wants_groups(c, metrics), _is_dense(c, metrics),
            _misses_nulls(gate, c, value, null_values, apart),
        )  # fmt: skip
        reasons = [reason for reason in misses if reason]
        baselines = [null.value for null in null_values.values()]
        rests_on = METRICS[c.metric]
        verdicts.append(
            Verdict(
                phase=gate.name,
                **value._asdict(),
                n=_count(metrics, rests_on.count),
                n_groups=_count(metrics, rests_on.groups),
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
    ids = metrics.get("beside", metrics.get("sae_id"))
    return {ids} if isinstance(ids, str) else set(ids or ())


def _to_beat(
    gate: Gate, c: Criterion, metrics: Mapping[str, Any], nulls: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The nulls that `must_beat` is about: of its kind and site; where an SAE is judged, those as dense as it (AS_DENSE)
    that were made beside it, or if none was, the sparsest."""
    rivals = {
        name: null
        for name, null in nulls.items()
        if c.must_beat is not None and null.get("kind") == c.must_beat and null.get("site") == metrics.get("site")
    }
    if gate.choose is None:
        return rivals
    dense = {i: null for i, null in rivals.items() if _number(null, "l0") >= AS_DENSE * _number(metrics, "l0")}
    own = {i: null for i, null in dense.items() if beside(null) & beside(metrics)}
    sparsest = min((_number(null, "l0") for null in (own or dense).values()), default=math.nan)
    return {i: null for i, null in (own or dense).items() if _number(null, "l0") == sparsest}


def rivals(gate: Gate, metrics: Mapping[str, Any], nulls: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The nulls that an SAE is held against: those made beside it, and those that `must_beat` is about."""
    own = {i for i, null in nulls.items() if beside(null) & beside(metrics)}
    return own.union(*(_to_beat(gate, c.asked(metrics), metrics, nulls) for c in gate.criteria))


def voids(name: str, null: Mapping[str, Any], chosen: Collection[str]) -> bool:
    """Whether a null that passes the gate makes it void for the chosen SAEs: it is as near to one as a null can be made.

    One that stands beside others, at another L0 or size, does not; nor does one of an untrained model, which was measured
    on other activations. Those that train stand beside one SAE for all of their site.
    """
    kind, stands = null.get("kind"), beside(null)
    return kind != ELSEWHERE and (kind in TRAINED or not stands - {name} or bool(stands & {*chosen}))


def _differences(
    c: Criterion, metrics: Mapping[str, Any], nulls: Collection[str], subtract: Subtract | None
) -> dict[str, Measured]:
    """The metric less that of each null, by group, where that is known."""
    apart = {}
    if subtract is not None and isinstance(metrics.get("sae_id"), str):
        for name in nulls:
            with suppress(KeyError):  # a metric without resamples
                if difference := subtract(metrics["sae_id"], name, lambda m: m[c.metric]):
                    apart[name] = Measured(*difference)
    return apart


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


def _misses_bound(c: Criterion, interval: Measured, metrics: Mapping[str, Any]) -> str:
    """Why the value, or its interval, does not stand to the threshold as it must; empty if it does."""
    value, low, high = interval
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


def _wants_groups(c: Criterion, metrics: Mapping[str, Any]) -> str:
    """Why the metric's interval decides nothing, for want of groups; empty if it may, or need not.

    Unequal groups count as fewer (`statistics.effective_groups`).
    """
    key = METRICS[c.metric].groups
    groups, effective = (_number(metrics, name) for name in (key, key.replace("n_", "effective_", 1)))
    effective = effective if math.isfinite(effective) else groups
    if c.confidence == "point" or not key or not min(groups, effective) < ENOUGH_GROUPS:
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


def _misses_nulls(
    gate: Gate, c: Criterion, value: Measured, nulls: Mapping[str, Measured], apart: Mapping[str, Measured]
) -> str:
    """Why the value is not better than that of every null to beat; empty if it is, or need not be.

    Better is by the interval of the difference (`apart`); where there is none by intervals that do not overlap; where one
    has none by value.
    """
    if c.must_beat is None:
        return ""
    if not nulls:
        what, where = ("an SAE", " at its L0 or above") if gate.choose else ("a null", "")
        return f"{c.metric} must beat that of {what} of kind {c.must_beat}, but no such control was measured{where}"
    for name, null in nulls.items():
        lead = c.margin * (abs(null.value) if c.below else abs(1 - null.value))  # 0, or 1, is perfect
        by = f" by {lead:.2g}" if lead else ""
        mine, theirs, what = value.value, null.value, f" is not better{by} than"
        if name in apart:
            d = apart[name]
            mine, theirs = (d.high, 0.0) if c.below else (d.low, 0.0)
            what = f" is not clearly better{by} (by {d.value:.2g} [{d.low:.2g}, {d.high:.2g}], paired by group) than"
        elif all(math.isfinite(end) for end in (*value, *null)):
            mine, theirs = (value.high, null.low) if c.below else (value.low, null.high)
            what = f"'s interval does not clear{by}"
        if not (mine < theirs - lead if c.below else mine > theirs + lead):
            return f"{c.metric} {value.value:.4g}{what} {null.value:.4g} of {name}"
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
