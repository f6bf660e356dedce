"""Gates as data: what is missing never passes, and a mistake in the file is one line that names file and field."""

import math
from pathlib import Path

import pytest
import yaml

from raysae.errors import UserError
from raysae.gates.criteria import Gate, apply, load_gate, passes

SHIPPED = sorted((Path(__file__).parents[2] / "configs/gates").glob("*.yaml"))


def gate_of(*criteria):
    """A gate of (metric, op, threshold[, mandatory])."""
    names = ("metric", "op", "threshold", "mandatory")
    lines = [{"criterion": f"{c[0]} is right", "why": "so", **dict(zip(names, c, strict=False))} for c in criteria]
    return Gate.model_validate({"name": "toy", "criteria": lines})


def holds(criterion, metrics):
    return passes(apply(gate_of(criterion), metrics))


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
    (verdict,) = apply(gate_of(("l0_fraction", "<=", 0.1)), {"l0": 6.4, "l0_low": 3.2, "l0_high": 12.8, "d_sae": 64})
    assert (verdict.low, verdict.value, verdict.high) == pytest.approx((0.05, 0.1, 0.2))


def test_every_mandatory_criterion_must_hold_and_no_other():
    gate = gate_of(("fvu", "<=", 0.2), ("l0", "<=", 10.0), ("l2_ratio", ">=", 0.8, False))
    assert passes(apply(gate, {"fvu": 0.1, "l0": 5.0, "l2_ratio": 0.1}))
    assert passes(apply(gate, {"fvu": 0.1, "l0": 5.0}))
    assert not passes(apply(gate, {"fvu": 0.1, "l0": 50.0, "l2_ratio": 0.9}))
    assert [v.verdict for v in apply(gate, {"fvu": 0.3, "l0": 5.0})] == ["fail", "pass", "fail"]


def test_a_verdict_carries_its_value_interval_and_reason():
    (verdict,) = apply(gate_of(("fvu", "<=", 0.2)), {"fvu": 0.25, "fvu_low": 0.2, "fvu_high": 0.3, "n_rows": 70.0})
    assert verdict.record() == {
        "phase": "toy", "criterion": "fvu is right", "metric": "fvu", "op": "<=", "threshold": 0.2, "mandatory": True,
        "why": "so", "value": 0.25, "low": 0.2, "high": 0.3, "n": 70, "verdict": "fail",
    }  # fmt: skip
    assert verdict.in_words == "fvu 0.25, must be <= 0.2" and verdict.shortfall == pytest.approx(0.25)


def test_a_row_without_measurements_fails_and_does_not_crash():
    """As an SAE looks whose evaluation is missing: a table fills it with NaN."""
    (verdict,) = apply(gate_of(("fvu", "<=", 0.2)), {"fvu": math.nan, "n_rows": math.nan, "fvu_low": math.nan})
    assert verdict.verdict == "fail" and verdict.n == 0 and verdict.shortfall == math.inf


# ----------------------------------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_gates_load_and_say_why(path):
    gate = load_gate(path)
    assert all(len(c.why) > 20 for c in gate.criteria) and any(c.mandatory for c in gate.criteria)


def test_gates_are_shipped():
    assert SHIPPED


def written(tmp_path, text=None, **changes):
    """A gate file with one criterion changed; None removes a field."""
    line = {"criterion": "c", "metric": "fvu", "op": "<=", "threshold": 0.2, "why": "so"} | changes
    values = {"name": "toy", "criteria": [{k: v for k, v in line.items() if v is not None}]}
    file = tmp_path / "gate.yaml"
    file.write_text(text if text is not None else yaml.safe_dump(values))
    return file


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"metric": "fuv"}, ("criteria.0.metric", "'fuv'", "'fvu'")),
        ({"op": "=<"}, ("criteria.0.op", "'=<'", "'<='")),
        ({"threshold": "low"}, ("criteria.0.threshold", "'low'")),
        ({"threshold": None}, ("criteria.0.threshold", "required")),
        ({"threshold": math.nan}, ("criteria.0.threshold", "nan")),
        ({"treshold": 0.2}, ("criteria.0.treshold", "unknown field", "did you mean threshold?")),
        ({"why": None}, ("criteria.0.why", "required")),
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


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml is not a file"):
        load_gate(tmp_path / "none.yaml")


def test_the_shipped_gate_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_gate(Path("configs/gates/default.yaml")).name == "default"
    (tmp_path / "configs/gates").mkdir(parents=True)
    here = {"name": "here", "criteria": [{"criterion": "c", "metric": "fvu", "op": "<=", "threshold": 1, "why": "w"}]}
    (tmp_path / "configs/gates/default.yaml").write_text(yaml.safe_dump(here))
    assert load_gate(Path("configs/gates/default.yaml")).name == "here"
