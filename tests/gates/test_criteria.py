"""Gates as data: what is missing never passes, and a mistake in the file is one line that names file and field."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from raysae.config.sections import NULLS
from raysae.errors import UserError
from raysae.gates.criteria import SHARES, SPARSITY, Gate, check_can_choose, judge, load_gate, measured, passes
from raysae.gates.metrics import METRICS, Metric, register, split_of
from raysae.sae.architectures import ARCHITECTURES, SAEConfig, initial_parameters
from raysae.sae.metrics import RowSums
from raysae.sae.sae import SAE

SHIPPED = sorted((Path(__file__).parents[2] / "configs/gates").glob("*.yaml"))


COUNTS = {
    "n_rows": 70.0, "n_groups": 7, "n_scored_tokens": 50, "n_scored_groups": 5, "dead_window_tokens": 900,
    "stability_latents": 30,
}  # fmt: skip


def gate_of(*criteria):
    """A gate of (metric, op, threshold[, mandatory])."""
    names = ("metric", "op", "threshold", "mandatory")
    lines = [{"criterion": f"{c[0]} is right", "why": "so", **dict(zip(names, c, strict=False))} for c in criteria]
    return Gate.model_validate({"name": "toy", "criteria": lines})


def holds(criterion, metrics):
    return passes(judge(gate_of(criterion), metrics))


@pytest.mark.parametrize(
    "op,below,at,above",
    [("<=", True, True, False), ("<", True, False, False), (">=", False, True, True), (">", False, False, True)],
)
def test_operators(op, below, at, above):
    assert [holds(("fvu", op, 0.5), {"fvu": v}) for v in (0.4, 0.5, 0.6)] == [below, at, above]


@pytest.mark.parametrize("op", ["<=", "<", ">=", ">"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_a_finite_number_never_passes(op, value):
    assert not holds(("fvu", op, 0.0), {"fvu": value})
    assert not holds(("fvu", op, 0.0), {"l0": 1.0})


@pytest.mark.parametrize(
    "missing",
    [
        {},
        {"l0": 1.0},
        {"d_sae": 64},
        {"l0": math.nan, "d_sae": 64},
        {"l0": None, "d_sae": None},
        {"l0": 1.0, "d_sae": 0},
    ],
)
def test_l0_fraction_needs_both_of_its_parts(missing):
    assert not holds(("l0_fraction", "<=", 0.1), missing)
    assert holds(("l0_fraction", "<=", 0.1), {"l0": 6.4, "d_sae": 64})
    assert not holds(("l0_fraction", "<=", 0.1), {"l0": 6.5, "d_sae": 64})


def test_l0_fraction_has_the_interval_of_l0():
    (verdict,) = judge(gate_of(("l0_fraction", "<=", 0.1)), {"l0": 6.4, "l0_low": 3.2, "l0_high": 12.8, "d_sae": 64})
    assert (verdict.low, verdict.value, verdict.high) == pytest.approx((0.05, 0.1, 0.2))


def test_every_mandatory_criterion_must_hold_and_no_other():
    gate = gate_of(("fvu", "<=", 0.2), ("l0", "<=", 10.0), ("l2_ratio", ">=", 0.8, False))
    assert passes(judge(gate, {"fvu": 0.1, "l0": 5.0, "l2_ratio": 0.1}))
    assert passes(judge(gate, {"fvu": 0.1, "l0": 5.0}))
    assert not passes(judge(gate, {"fvu": 0.1, "l0": 50.0, "l2_ratio": 0.9}))
    assert [v.verdict for v in judge(gate, {"fvu": 0.3, "l0": 5.0})] == ["fail", "pass", "fail"]


def test_a_verdict_carries_its_value_interval_and_reason():
    (verdict,) = judge(gate_of(("fvu", "<=", 0.2)), {"fvu": 0.25, "fvu_low": 0.2, "fvu_high": 0.3} | COUNTS)
    assert verdict.record() == {
        "phase": "toy", "criterion": "fvu is right", "metric": "fvu", "op": "<=", "threshold": 0.2, "confidence": "point",
        "must_beat": None, "margin": 0.0, "mandatory": True, "why": "so", "value": 0.25, "low": 0.2, "high": 0.3,
        "n": 70, "n_groups": 7,
        "baseline_value": None, "verdict": "fail", "reason": "fvu 0.25, must be <= 0.2", "instead_of": None,
    }  # fmt: skip
    assert verdict.shortfall == pytest.approx(0.25)


def test_a_row_without_measurements_fails_and_does_not_crash():
    """As an SAE looks whose evaluation is missing: a table fills it with NaN."""
    (verdict,) = judge(gate_of(("fvu", "<=", 0.2)), {"fvu": math.nan, "n_rows": math.nan, "fvu_low": math.nan})
    assert verdict.verdict == "fail" and verdict.n == 0 and verdict.shortfall == math.inf


def judged(criterion, metrics, nulls=None, subtract=None, **gate):
    """The verdict of a gate of one criterion (its fields) beside nulls, the kind of each by its name."""
    fields = {"criterion": "c", "op": "<=", "threshold": 0.2, "why": "so", **criterion}
    gate = Gate.model_validate({"name": "toy", "criteria": [fields], **gate})
    nulls = {name: {"kind": name.split("-")[1], **null} for name, null in (nulls or {}).items()}
    (verdict,) = judge(gate, metrics, nulls, (), subtract)
    return verdict


def around(metric, value, by, site="s"):
    return {"l0": 8.0, metric: value, f"{metric}_low": value - by, f"{metric}_high": value + by, "site": site}


# ----------------------------------------------------------------------------------------------------------------------
# Confidence


@pytest.mark.parametrize(
    "metric,n,n_groups",
    [("fvu", 70, 7), ("ce_delta", 50, 5), ("dead_fraction", 900, 0), ("stability_mmcs", 30, 0), ("d_sae", 0, 0)],
)
def test_a_verdict_counts_what_its_metric_rests_on(metric, n, n_groups):
    verdict = judged({"metric": metric}, COUNTS)
    assert (verdict.n, verdict.n_groups) == (n, n_groups)


@pytest.mark.parametrize(
    "groups,effective,said",
    [
        (20, 20.0, ""),
        (19, 19.0, "for want of groups: fvu rests on 19, and an interval takes 20"),
        (300, 12.4, "rests on 300, which count as 12 of equal size"),
    ],
)
def test_an_interval_of_few_or_unequal_groups_decides_nothing(groups, effective, said):
    metrics = around("fvu", 0.1, 0.01) | {"n_groups": groups, "effective_groups": effective}
    verdict = judged({"metric": "fvu", "confidence": "interval"}, metrics)
    assert said in verdict.reason and verdict.verdict == ("fail" if said else "pass")
    assert judged({"metric": "fvu"}, metrics).verdict == "pass"  # a point asks for none


def test_what_is_scored_has_groups_of_its_own():
    metrics = around("ce_delta", 0.1, 0.01) | {"n_groups": 300, "effective_groups": 300.0}
    metrics |= {"n_scored_groups": 25, "effective_scored_groups": 9.0}
    scored = judged({"metric": "ce_delta", "confidence": "interval"}, metrics)
    assert "rests on 25, which count as 9" in scored.reason and scored.verdict == "fail"
    assert judged({"metric": "fvu", "confidence": "interval"}, metrics | around("fvu", 0.1, 0.01)).verdict == "pass"


@pytest.mark.parametrize(
    "metric,op,metrics,holds,said",
    [
        ("fvu", "<=", around("fvu", 0.19, 0.01), True, ""),
        ("fvu", "<=", around("fvu", 0.19, 0.02), False, "[0.17, 0.21], the whole interval must be <= 0.2"),
        ("fvu", ">=", around("fvu", 0.22, 0.01), True, ""),
        ("fvu", ">=", around("fvu", 0.21, 0.02), False, "[0.19, 0.23]"),
        ("fvu", "<=", {"fvu": 0.1}, False, "has no interval"),
        ("fvu", "<=", {"fvu": 0.1, "fvu_low": 0.1, "fvu_high": math.nan}, False, "has no interval"),
        ("fvu", "<=", {"fvu": math.nan, "fvu_low": 0.1, "fvu_high": 0.1}, False, "fvu nan, must be <= 0.2"),
        ("l0_fraction", "<=", {**around("l0", 19, 1), "d_sae": 100}, True, ""),
        ("l0_fraction", "<=", {**around("l0", 19, 2), "d_sae": 100}, False, "[0.17, 0.21]"),
    ],
)
def test_under_confidence_interval_the_whole_interval_must_hold(metric, op, metrics, holds, said):
    verdict = judged({"metric": metric, "op": op, "confidence": "interval"}, metrics)
    assert (verdict.verdict == "pass") is holds and said in verdict.reason
    assert bool(verdict.reason) is not holds


def test_the_shortfall_of_an_interval_is_that_of_its_end():
    metrics = around("fvu", 0.19, 0.03)
    assert judged({"metric": "fvu", "confidence": "interval"}, metrics).shortfall == pytest.approx(0.1)
    upwards = {"metric": "fvu", "op": ">=", "confidence": "interval", "threshold": 0.18}
    assert judged(upwards, metrics).shortfall == pytest.approx(0.02 / 0.18)
    assert judged(upwards, metrics | {"fvu": math.nan}).shortfall == math.inf


# ----------------------------------------------------------------------------------------------------------------------
# Controls

BEATS = {"metric": "fvu", "threshold": 0.9, "must_beat": "untrained"}
UNTRAINED = "control-untrained-relu-64-s"


@pytest.mark.parametrize(
    "mine,control,holds",
    [
        (around("fvu", 0.5, 0.1), around("fvu", 0.8, 0.1), True),
        (around("fvu", 0.5, 0.125), around("fvu", 0.75, 0.125), False),  # the intervals touch
        (around("fvu", 0.5, 0.1), {"fvu": 0.51, "l0": 8.0, "site": "s"}, True),  # one interval: by value
        ({"fvu": 0.5, "l0": 8.0, "site": "s"}, around("fvu", 0.51, 0.1), True),
        ({"fvu": 0.5, "l0": 8.0, "site": "s"}, {"fvu": 0.5, "l0": 8.0, "site": "s"}, False),
        ({"fvu": 0.5, "l0": 8.0, "site": "s"}, {"fvu": math.nan, "l0": 8.0, "site": "s"}, False),
        ({"fvu": 0.5, "l0": 8.0, "site": "s"}, {"l0": 8.0, "site": "s"}, False),
    ],
)
def test_a_control_is_beaten_by_intervals_apart_or_else_by_value(mine, control, holds):
    verdict = judged(BEATS, mine, {UNTRAINED: control})
    assert (verdict.verdict == "pass") is holds
    assert holds or (UNTRAINED in verdict.reason and "fvu" in verdict.reason)


def test_better_is_the_direction_of_the_operator():
    upwards = {"metric": "ce_loss_recovered", "op": ">=", "threshold": 0.1, "must_beat": "untrained"}
    controls = {UNTRAINED: around("ce_loss_recovered", 0.6, 0.1)}
    found = [judged(upwards, around("ce_loss_recovered", v, 0.1), controls).verdict for v in (0.3, 0.75, 0.9)]
    assert found == ["fail", "fail", "pass"]


def test_every_control_of_the_kind_and_site_must_be_beaten_and_no_other():
    weak, strong = around("fvu", 0.95, 0.01), around("fvu", 0.4, 0.01)
    mine = around("fvu", 0.5, 0.01)
    also = "control-untrained-topk-64-s"
    assert judged(BEATS, mine, {UNTRAINED: weak, also: weak}).verdict == "pass"
    verdict = judged(BEATS, mine, {UNTRAINED: weak, also: strong})
    assert verdict.verdict == "fail" and verdict.baseline_value == 0.4 and also in verdict.reason
    assert verdict.shortfall == pytest.approx(0.1 / 0.4)
    elsewhere = {UNTRAINED: weak, "control-untrained-topk-64-t": {**strong, "site": "t"}, "control-pca-64-s": strong}
    assert judged(BEATS, mine, elsewhere).verdict == "pass"


def test_a_code_is_beaten_at_an_l0_no_lower_than_the_sae_s():
    """PCA with many components is near to the activations: only one as dense as the SAE says anything of it."""
    beats = {"metric": "fvu", "threshold": 0.9, "must_beat": "pca"}
    codes = {
        f"control-pca-{name}-8-s": around("fvu", fvu, 0.01) | {"l0": l0}
        for name, fvu, l0 in (("topk", 0.6, 4.0), ("gated", 0.3, 10.0), ("relu", 0.1, 40.0))
    }
    verdicts = {l0: judged(beats, around("fvu", 0.4, 0.01) | {"l0": l0}, codes) for l0 in (3.0, 4.1, 5.0, 20.0, 60.0)}
    assert [v.verdict for v in verdicts.values()] == ["pass", "pass", "fail", "fail", "fail"]
    assert [v.baseline_value for v in verdicts.values()] == [0.6, 0.6, 0.3, 0.1, None]
    assert "no such control was measured at its L0 or above" in verdicts[60.0].reason
    assert judged(beats, around("fvu", 0.4, 0.01), codes).verdict == "fail", "an SAE without an L0 is at no L0"
    assert all(judged(beats, code, codes).verdict == "fail" for code in codes.values()), "no code beats itself"


def test_a_gate_that_asks_for_a_null_that_is_not_measured_is_refused():
    def gate(**fields):
        criterion = {"criterion": "good", "metric": "fvu", "op": "<=", "threshold": 0.2, "why": "so", **fields}
        return Gate.model_validate({"name": "toy", "criteria": [criterion]})

    path = Path("g.yaml")
    check_can_choose(gate(), ("untrained",), path)
    check_can_choose(gate(must_beat="pca"), ("untrained", "pca"), path)
    check_can_choose(gate(must_beat="untrained_model"), NULLS, path)
    for fields, words in (
        (
            {"must_beat": "pca"},
            ("evaluation.nulls: untrained, ica lacks pca", "'good' has must_beat pca; add it", "g.yaml"),
        ),
        (
            {"must_beat": "pcb", "mandatory": False},
            ("evaluation.nulls", "must_beat must be one of untrained, random_encoder, permuted"),
        ),
    ):
        with pytest.raises(UserError) as raised:
            check_can_choose(gate(**fields), ("untrained", "ica"), path)
        assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"^must_beat: .*whose ce_delta is not measured"):
        check_can_choose(gate(must_beat="untrained_model", metric="ce_delta"), NULLS, path)


def test_the_null_to_beat_is_the_one_beside_the_sae_at_its_l0():
    """Not one at another width, nor a denser one; where its own is sparser than it, the sparsest that is not."""
    mine = around("fvu", 0.5, 0.01) | {"sae_id": "a"}
    own, other = around("fvu", 0.6, 0.01) | {"beside": ["b", "a"]}, around("fvu", 0.4, 0.01) | {"beside": ["b"]}
    denser = around("fvu", 0.3, 0.01) | {"l0": 20.0, "beside": ["c"]}
    controls = {"control-untrained-1": own, "control-untrained-2": other, "control-untrained-3": denser}
    controls = {name: null | {"sae_id": name} for name, null in controls.items()}
    assert judged(BEATS, mine, controls).verdict == "pass"
    assert judged(BEATS, mine | {"sae_id": "b"}, controls).reason.endswith("0.4 of control-untrained-2")
    short = {**controls, "control-untrained-1": own | {"l0": 7.0}}
    assert judged(BEATS, mine, short).reason.endswith("0.4 of control-untrained-2")
    assert judged(BEATS, mine | {"l0": 30.0}, controls).reason.endswith("at its L0 or above")
    code = around("fvu", 0.35, 0.001) | {
        "sae_id": "control-pca",
        "beside": ["a"],
    }  # judged by what stands beside "a" too
    assert judged(BEATS, code, controls).baseline_value == 0.6


def test_a_difference_by_group_decides_where_there_is_one():
    mine = around("fvu", 0.5, 0.2) | {"sae_id": "a"}
    rival = {UNTRAINED: around("fvu", 0.6, 0.2)}
    assert judged(BEATS, mine, rival).verdict == "fail"
    asked = []

    def paired(low, high):
        def subtract(one, other, statistic):
            asked.append((one, other, statistic({"fvu": "fvu", "ce_loss_recovered": "ce"})))
            return ((low + high) / 2, low, high)

        return subtract

    assert judged(BEATS, mine, rival, subtract=paired(-0.15, -0.05)).verdict == "pass"
    assert asked == [("a", UNTRAINED, "fvu")]
    verdict = judged(BEATS, mine, rival, subtract=paired(-0.2, 0.01))
    assert (
        "not clearly better (by -0.095 [-0.2, 0.01], paired by group) than 0.6 of control-untrained" in verdict.reason
    )
    apart = {UNTRAINED: around("fvu", 0.8, 0.01)}
    assert judged(BEATS, around("fvu", 0.5, 0.01) | {"sae_id": "a"}, apart, subtract=lambda *_: None).verdict == "pass"
    upwards = {"metric": "ce_loss_recovered", "op": ">=", "threshold": 0.1, "must_beat": "untrained"}
    more = around("ce_loss_recovered", 0.9, 0.2) | {"sae_id": "a"}
    rival = {UNTRAINED: around("ce_loss_recovered", 0.8, 0.2)}
    found = [judged(upwards, more, rival, subtract=paired(*ends)).verdict for ends in ((0.05, 0.15), (-0.01, 0.2))]
    assert found == ["pass", "fail"]


def test_a_margin_is_a_share_of_what_the_null_lacks_to_be_perfect():
    """Random encoders of two seeds differ by a few percent, and a paired interval is narrow enough to tell them apart."""
    mine, rival = around("fvu", 0.19, 0.01) | {"sae_id": "a"}, {UNTRAINED: around("fvu", 0.2, 0.01)}
    narrow = {"subtract": lambda *_: (-0.01, -0.011, -0.009)}
    assert judged(BEATS, mine, rival, **narrow).verdict == "pass"
    verdict = judged(BEATS | {"margin": 0.1}, mine, rival, **narrow)
    assert "not clearly better by 0.02 (by -0.01 [-0.011, -0.009], paired by group) than 0.2" in verdict.reason
    assert judged(BEATS | {"margin": 0.1}, mine, rival, subtract=lambda *_: (-0.03, -0.04, -0.021)).verdict == "pass"
    upwards = {"metric": "ce_loss_recovered", "op": ">=", "threshold": 0.1, "must_beat": "untrained", "margin": 0.1}
    rival = {UNTRAINED: around("ce_loss_recovered", 0.9, 0.0)}
    found = [judged(upwards, around("ce_loss_recovered", v, 0.0), rival).verdict for v in (0.905, 0.909, 0.911)]
    assert found == ["fail", "fail", "pass"]


RECOVERED = {
    "metric": "ce_loss_recovered", "op": ">=", "threshold": 0.9, "confidence": "interval", "must_beat": "untrained",
}  # fmt: skip
FALLBACK = {"fallback": {"metric": "ce_delta", "op": "<=", "threshold": 0.1}}


def test_where_ablation_costs_nothing_the_share_of_it_fails_or_the_fallback_is_asked():
    helps = around("ce_zero_gap", -0.07, 0.02) | {"ce_loss_recovered": math.nan}
    verdict = judged(RECOVERED, helps | {"ce_delta": 0.0})
    assert verdict.verdict == "fail" and verdict.instead_of is None
    assert (
        "not defined here: ablation costs the model -0.07 [-0.09, -0.05] nats, which is not clearly above 0"
        in verdict.reason
    )
    rival = {UNTRAINED: helps | around("ce_delta", 0.5, 0.1)}
    verdicts = [
        judged(RECOVERED | FALLBACK, helps | around("ce_delta", delta, by), rival)
        for delta, by in ((0.02, 0.01), (0.02, 0.1), (1.54, 0.01))
    ]
    assert [v.verdict for v in verdicts] == ["pass", "fail", "fail"]
    for v in verdicts:
        assert (v.metric, v.op, v.threshold, v.confidence, v.must_beat) == (
            "ce_delta",
            "<=",
            0.1,
            "interval",
            "untrained",
        )
        assert v.baseline_value == 0.5 and "ce_loss_recovered is not defined here" in v.instead_of
    near = {UNTRAINED: helps | around("ce_delta", 0.03, 0.01)}
    assert "does not clear" in judged(RECOVERED | FALLBACK, helps | around("ce_delta", 0.02, 0.01), near).reason
    plain = judged(RECOVERED | FALLBACK, around("ce_loss_recovered", 0.5, 0.01) | {"ce_delta": 0.0}, rival)
    assert (plain.metric, plain.verdict, plain.instead_of) == ("ce_loss_recovered", "fail", None), (
        "defined, and too low"
    )
    assert judged(RECOVERED | FALLBACK, {"site": "s"}).verdict == "fail", "what was not measured passes nothing"


@pytest.mark.parametrize("controls", [None, {}, {"control-pca-64-s": around("fvu", 1.0, 0.0)}])
def test_without_a_control_of_the_kind_the_criterion_fails_and_says_so(controls):
    verdict = judged(BEATS, around("fvu", 0.0, 0.0), controls)
    assert verdict.verdict == "fail" and "untrained, but no such control was measured" in verdict.reason
    assert verdict.baseline_value is None and verdict.shortfall == math.inf


def test_a_control_does_not_beat_itself():
    assert judged(BEATS, around("fvu", 0.1, 0.0), {UNTRAINED: around("fvu", 0.1, 0.0)}).verdict == "fail"


def test_a_waived_criterion_is_measured_and_does_not_stop():
    gate = gate_of(("fvu", "<=", 0.2), ("l0", "<=", 10.0))
    fvu, l0 = judge(gate, {"fvu": 0.3, "l0": 5.0}, waived=["fvu is right", "l0 is right"])
    assert (fvu.verdict, fvu.reason, l0.verdict) == ("waived", "fvu 0.3, must be <= 0.2", "pass")
    assert passes([fvu, l0]) and not passes(judge(gate, {"fvu": 0.3, "l0": 5.0}, waived=["l0 is right"]))


# ----------------------------------------------------------------------------------------------------------------------
# What no gate may let through

WORST = {name: -1e9 if name.startswith(("ce_", "explained", "stability")) else 1e9 for name in METRICS} | {
    "site": "s", "kind": "random_encoder"
}  # fmt: skip
"""A control that every SAE beats."""


def exact(**metrics):
    """Metrics with intervals of width 0, at a site."""
    ends = {f"{name}{end}": value for name, value in metrics.items() for end in ("_low", "_high")}
    return {**metrics, **ends, "site": "s", "n_rows": 10_000, "n_scored_tokens": 10_000}


PERFECT = {
    "fvu": 0.0, "fvu_without_top_norms": 0.0, "explained_variance": 1.0, "dead_fraction": 0.0,
    "never_fired_fraction": 0.0, "dense_fraction": 0.0,
    "l2_ratio": 1.0, "cosine": 1.0, "ce_delta": 0.0, "ce_loss_recovered": 1.0, "ce_recovered_mean": 1.0, "kl": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
@pytest.mark.parametrize("d_sae", [64, 16_384])
def test_no_shipped_gate_lets_a_perfect_but_dense_sae_pass(path, d_sae):
    gate = load_gate(path)

    def passed(share):
        metrics = exact(**PERFECT, l0=share * d_sae, d_sae=d_sae, expansion_factor=4.0, effective_latents=d_sae)
        return passes(judge(gate, metrics, {"null": WORST}))

    assert passed(0.02), "or the next line says nothing"
    assert not any(passed(share) for share in (0.2, 0.51, 0.9, 1.0))


@pytest.mark.parametrize("metric", SPARSITY)
@pytest.mark.parametrize(
    "denser,of",
    [
        ({"l0": 60.0}, "94% of its live latents"),  # of 64 latents
        ({"l0": 30.0, "dead_fraction": 0.25}, "62% of its live latents"),
        ({"l0": 30.0, "dead_fraction": 0.0, "never_fired_fraction": 0.25}, "62% of its live latents"),
        ({"l0": 30.0, "d_sae": 4096, "d_in": 40}, "75% of the dimensions of its input"),
        ({"l0": 30.0, "d_sae": 4096, "d_in": None, "expansion_factor": 102.4}, "75% of the dimensions of its input"),
        ({"l0": 30.0, "d_sae": 4096, "effective_latents": 45.0}, "67% of the latents in use"),
    ],
)
def test_a_lax_bound_on_l0_lets_no_dense_sae_pass_either(metric, denser, of):
    """As many latents on as half the input's dimensions, or half the latents that live, or that do not fire once in a
    thousand tokens: whatever the rest of the width."""
    gate = gate_of((metric, "<=", 1e9))
    sparse = {"l0": 30.0, "d_sae": 64, "d_in": 256, "effective_latents": 60.0}
    assert passes(judge(gate, sparse))
    (verdict,) = judge(gate, sparse | denser)
    assert verdict.verdict == "fail" and f"dense: L0 {denser['l0']:.4g} is {of}, over 50%" in verdict.reason


def test_shares_of_l0_have_its_interval_and_the_wholes_that_they_say():
    sae = {"l0": 8.0, "l0_low": 4.0, "l0_high": 16.0, "d_sae": 64, "expansion_factor": 4.0, "effective_latents": 20.0}
    assert measured(sae, "l0_per_dim") == (0.5, 0.25, 1.0) == measured(sae | {"d_in": 16}, "l0_per_dim")
    assert measured(sae, "l0_effective") == (0.4, 0.2, 0.8)
    assert measured(sae, "l0_fraction").value == 8 / 64
    assert measured(sae | {"dead_fraction": 0.5, "never_fired_fraction": 0.1}, "l0_fraction").value == 8 / 32
    assert measured(sae | {"dead_fraction": math.nan, "never_fired_fraction": 0.75}, "l0_fraction").value == 8 / 16
    assert math.isnan(measured(sae | {"dead_fraction": 1.0}, "l0_fraction").value)
    code = {"l0": 8.0, "d_sae": 16, "d_in": 16, "latents": 64, "effective_latents": 9.0, "never_fired_fraction": 0.4}
    assert [measured(code, share).value for share in SHARES] == [8 / 16, 8 / 64, 8 / 64], "at the SAE's own width"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_shipped_gate_lets_an_untrained_sae_pass(path, architecture):
    """Its row metrics are those of a real one, its cross-entropies perfect, its rival the worst."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 32, generator=generator) * torch.rand(32, generator=generator)
    for k in (4, 12):
        knob = ARCHITECTURES[architecture].coefficient
        config = SAEConfig(architecture, 32, 128, seed=0, **{knob: k if knob == "k" else 0.1})
        sae = SAE(config, initial_parameters(config, x.mean(0)))
        sums = RowSums(x.mean(0))
        f = sae.encode(x)
        sums.add(x, sae.decode(f), f)
        metrics = exact(**{**PERFECT, **sums.metrics()}, d_sae=128, expansion_factor=4.0)
        assert not passes(judge(load_gate(path), metrics, {"null": WORST}))


# ----------------------------------------------------------------------------------------------------------------------
# What a study asks for


@pytest.fixture(autouse=True, scope="module")
def _of_a_study():
    toys = Metric("toy_recovery", "higher", count="n_problems", groups="n_problems"), Metric("toy_size", split="config")
    register(*toys)
    yield
    for toy in toys:  # other files' tests know the metrics of the package alone
        del METRICS[toy.name]


STUDY = {"metric": "toy_recovery", "op": ">=", "threshold": 0.5, "must_beat": "shuffled"}


def test_a_study_s_metric_is_judged_as_any_other_without_an_l0():
    mine = {"toy_recovery": 0.8, "toy_recovery_low": 0.7, "toy_recovery_high": 0.9, "n_problems": 40}
    null = {"toy_recovery": 0.3, "toy_recovery_low": 0.2, "toy_recovery_high": 0.4}
    verdict = judged(STUDY | {"confidence": "interval"}, mine, {"any-shuffled": null}, choose=None)
    assert (verdict.verdict, verdict.n, verdict.n_groups, verdict.baseline_value) == ("pass", 40, 40, 0.3)
    assert "no such control was measured" in judged(STUDY, mine, {"any-shuffled": null}).reason, "no L0 to compare at"
    few = judged(STUDY | {"confidence": "interval"}, mine | {"n_problems": 19}, {"any-shuffled": null}, choose=None)
    assert few.reason == "for want of groups: toy_recovery rests on 19, and an interval takes 20"
    near = {
        "any-shuffled": null,
        "other-shuffled": null | {"toy_recovery_high": 0.75},
        "any-pca": {"toy_recovery": 0.99},
    }
    assert judged(STUDY, mine, near, choose=None).reason.endswith("0.3 of other-shuffled"), (
        "each of the kind, and no other"
    )
    alone = judged(STUDY, mine, choose=None)
    assert alone.reason == "toy_recovery must beat that of a null of kind shuffled, but no such control was measured"


def test_a_name_stands_for_one_metric_and_what_is_better_is_its_own():
    register(Metric("toy_size", split="config"))
    with pytest.raises(ValueError, match="fvu is registered already"):
        register(Metric("fvu", "higher"))
    assert (split_of("toy_size", "test"), split_of("toy_recovery", "test"), split_of("?", "test")) == (
        "config", "test", "test"
    )  # fmt: skip
    of_seeds = ("stability_mmcs", "stability_mmcs_low", "stability_recurring_variance_high", "stability_latents")
    assert {split_of(name, "test") for name in of_seeds} == {"validation"}, "with its interval and what it rests on"
    assert {split_of(name, "test") for name in ("fvu_low", "n_rows", "n_groups")} == {"test"}
    assert {split_of(name, "test") for name in ("dead_fraction", "dead_window_tokens")} == {"training"}
    for wrong in ({"op": "<="}, {"fallback": {"metric": "fvu", "op": ">=", "threshold": 0.1}}):
        with pytest.raises(ValueError, match="with must_beat it must say what is better"):
            judged(STUDY | wrong, {})
    for op in ("<=", ">="):
        judged({"metric": "l2_ratio", "op": op, "must_beat": "pca"}, {})


# ----------------------------------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_gates_load_and_say_why(path):
    gate = load_gate(path)
    assert all(len(c.why) > 20 for c in gate.criteria) and any(c.mandatory for c in gate.criteria)


def test_gates_are_shipped():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_gate_asks_for_what_keeps_degenerate_saes_out(path):
    criteria = {c.metric: c for c in load_gate(path).criteria if c.mandatory}
    assert {"fvu", "fvu_without_top_norms", "l0_fraction", "l0_per_dim", "l0_effective", "dead_fraction"} <= {*criteria}
    assert (criteria["fvu"].must_beat, criteria["fvu"].margin) == ("random_encoder", 0.1)
    assert criteria["l0_per_dim"].threshold <= 0.25
    recovered = criteria.get("ce_loss_recovered")
    assert recovered is not None or path.stem == "phase1", "states of no language model"
    if recovered is not None:
        assert (recovered.must_beat, recovered.margin) == ("random_encoder", 0.1)
        assert recovered.fallback.metric == "ce_delta"


SPARSE = {"criterion": "sparse", "metric": "l0", "op": "<=", "threshold": 9, "why": "so"}


def written(tmp_path, text=None, sparse=SPARSE, **changes):
    """A gate file with one criterion changed, None removing a field, before `sparse`."""
    line = {"criterion": "c", "metric": "fvu", "op": "<=", "threshold": 0.2, "why": "so"} | changes
    values = {"name": "toy", "criteria": [{k: v for k, v in line.items() if v is not None}, sparse]}
    file = tmp_path / "gate.yaml"
    file.write_text(text if text is not None else yaml.safe_dump(values))
    return file


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"metric": "fuv"}, ("criteria.0.metric: 'fuv' is no metric; did you mean 'fvu'? known: fvu, explained_v",)),
        ({"metric": "toy_recovry"}, ("did you mean 'toy_recovery'?",)),
        ({"op": "=<"}, ("criteria.0.op", "'=<'", "'<='")),
        ({"threshold": "low"}, ("criteria.0.threshold", "'low'")),
        ({"threshold": None}, ("criteria.0.threshold", "required")),
        ({"threshold": math.nan}, ("criteria.0.threshold", "nan")),
        ({"treshold": 0.2}, ("criteria.0.treshold", "unknown field", "did you mean threshold?")),
        ({"why": None}, ("criteria.0.why", "required")),
        ({"confidence": "95"}, ("criteria.0.confidence", "'95'", "'point' or 'interval'")),
        ({"must_beat": ""}, ("criteria.0.must_beat", "at least 1")),
        (
            {"fallback": {"metric": "ce_dleta", "op": "<=", "threshold": 0.1}},
            ("criteria.0.fallback.metric", "'ce_delta'"),
        ),
        ({"fallback": "ce_delta"}, ("criteria.0.fallback", "'ce_delta'")),
        ({"criterion": "sparse"}, ("criteria must differ in their words", "sparse")),
        ({"text": "name: toy\ncriteria: []\n"}, ("criteria", "at least 1")),
        ({"text": "name: toy\n"}, ("criteria", "required")),
        ({"text": "- 1\n"}, ("must hold a mapping of fields",)),
        ({"text": ""}, ("must hold a mapping of fields",)),
        ({"text": "name: [\n"}, ("is not YAML",)),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_field(tmp_path, changes, said):
    file = written(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        load_gate(file)
    message = str(caught.value)
    assert "\n" not in message and str(file) in message
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    "sparse",
    [
        SPARSE | {"mandatory": False},
        SPARSE | {"op": ">="},
        SPARSE | {"metric": "dense_fraction"},
    ],
)
def test_a_gate_without_a_mandatory_upper_bound_on_l0_is_refused(tmp_path, sparse):
    load_gate(written(tmp_path))
    load_gate(written(tmp_path, sparse=SPARSE | {"metric": "l0_fraction", "op": "<", "threshold": 0.1}))
    file = written(tmp_path, sparse=sparse)
    with pytest.raises(UserError) as caught:
        load_gate(file)
    message = str(caught.value)
    assert (
        message.startswith("criteria: ")
        and "upper bound on l0, l0_per_dim, l0_fraction or l0_effective" in message
        and str(file) in message
    )
    assert "add one, such as metric l0_per_dim, op <=, threshold 0.25" in message and "\n" not in message


def test_only_a_gate_that_chooses_an_sae_must_bound_its_l0(tmp_path):
    def gate(**fields):
        criteria = [{"criterion": "c", "metric": "toy_recovery", "op": ">=", "threshold": 0.5, "why": "so"}]
        return written(tmp_path, yaml.safe_dump({"name": "toy", "criteria": criteria, **fields}))

    study = load_gate(gate(choose=None))
    assert study.choose is None
    for fields in ({}, {"choose": "knee"}):
        with pytest.raises(
            UserError, match=r"mandatory upper bound on l0.*or choose: null where the gate chooses no SAE"
        ):
            load_gate(gate(**fields))
    with pytest.raises(UserError, match=r"^choose: null, but a sweep's gate must choose an SAE.*\(in g.yaml\)$"):
        check_can_choose(study, NULLS, Path("g.yaml"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml is not a file"):
        load_gate(tmp_path / "none.yaml")


def test_the_shipped_gate_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_gate(Path("configs/gates/default.yaml")).name == "default"
    (tmp_path / "configs/gates").mkdir(parents=True)
    here = {"name": "here", "criteria": [SPARSE]}
    (tmp_path / "configs/gates/default.yaml").write_text(yaml.safe_dump(here))
    assert load_gate(Path("configs/gates/default.yaml")).name == "here"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_gate_logs_its_assumptions(path):
    assumptions = load_gate(path).assumptions
    assert assumptions and len({a.assumption for a in assumptions}) == len(assumptions)


def test_an_assumption_says_what_would_show_it_wrong(tmp_path):
    file = tmp_path / "gate.yaml"
    file.write_text(
        "{name: g, criteria: [{criterion: sparse, metric: l0, op: <=, threshold: 9, why: so}], "
        "assumptions: [{assumption: rows are shuffled, if_wrong: nothing holds}]}"
    )
    with pytest.raises(UserError, match=r"assumptions.0.checked_by"):
        load_gate(file)


def test_an_untrained_sae_is_as_stable_as_chance():
    """A criterion on stability can be beaten by the control's null, and fails where there is one seed."""
    asked = {"criterion": "stable", "metric": "stability_mmcs", "op": ">=", "threshold": 0.3, "must_beat": "untrained"}
    gate = Gate.model_validate({"name": "g", "criteria": [asked | {"why": "so"}]})
    null = {"kind": "untrained", "site": "s", "l0": 8.0, "stability_mmcs": 0.4}
    null |= {"stability_mmcs_low": 0.38, "stability_mmcs_high": 0.42}
    for value, expected in ((0.6, True), (0.41, False), (0.2, False), (None, False)):
        metrics = {"site": "s", "l0": 8.0, "stability_mmcs": value}
        if value is not None:
            metrics |= {"stability_mmcs_low": value - 0.02, "stability_mmcs_high": value + 0.02}
        assert passes(judge(gate, metrics, {"null": null})) is expected
