"""The choice: a hand-made front, the rule, a reason for each SAE that was not taken, and the cases that end in no-go."""

import json
import math

import pandas as pd
import pytest

from raysae.config import NULLS
from raysae.gates.criteria import Gate
from raysae.gates.select import RULE, choose, decide, pareto_front
from raysae.gates.waivers import Waiver

GATE = Gate.model_validate(
    {"name": "toy", "criteria": [{"criterion": "faithful", "metric": "fvu", "op": "<=", "threshold": 0.3, "why": "so"}]}
)


def table_of(*rows):
    """A table from (sae_id, l0, fvu) and columns to override."""
    base = {"site": "s", "d_sae": 64, "status": "completed", "status_reason": "", "n_rows": 100.0}
    return pd.DataFrame(
        [{**base, "sae_id": r[0], "l0": r[1], "fvu": r[2], **(r[3] if len(r) > 3 else {})} for r in rows]
    )


HAND = table_of(
    ("a", 2.0, 0.50), ("b", 4.0, 0.28), ("c", 4.0, 0.30), ("d", 6.0, 0.28), ("e", 8.0, 0.10), ("f", 9.0, 0.20),
    ("g", 30.0, 0.05),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The front


def test_the_front_of_a_hand_example_in_any_row_order():
    expected = ["a", "b", "e", "g"]  # c and f are beaten; d has no lower FVU than b, at a higher L0
    for seed in range(5):
        assert pareto_front(HAND.sample(frac=1, random_state=seed)) == expected


def test_of_equal_saes_the_smallest_is_on_the_front():
    ties = table_of(("wide", 4.0, 0.2, {"d_sae": 128}), ("small", 4.0, 0.2), ("again", 4.0, 0.2))
    assert pareto_front(ties) == ["small"]


def test_nan_is_never_on_the_front_and_beats_nothing():
    rows = table_of(("a", math.nan, 0.0), ("b", 0.0, math.nan), ("c", 5.0, 0.5))
    assert pareto_front(rows) == ["c"]
    assert pareto_front(rows[:2]) == [] and pareto_front(rows[:0]) == []


def test_sites_do_not_compete():
    """An early layer is easier to reconstruct; it must not beat a late one."""
    two = table_of(("a1", 4.0, 0.1), ("b1", 5.0, 0.2, {"site": "t"}), ("b2", 9.0, 0.3, {"site": "t"}))
    assert pareto_front(two) == ["a1", "b1"]


# ----------------------------------------------------------------------------------------------------------------------
# The choice


def test_the_sparsest_of_the_front_of_those_that_pass():
    choice = choose(HAND, GATE)
    assert choice.chosen == "b" and choice.closest is None
    assert choice.front == ["a", "b", "e", "g"]  # of all completed SAEs, for the figure
    assert set(choice.verdicts) == set(HAND["sae_id"])


def test_a_failing_sae_does_not_shadow_a_passing_one():
    """The front is taken among those that pass: x beats y in both, but fails the gate."""
    gate = Gate.model_validate({"name": "toy", "criteria": [
        {"criterion": "alive", "metric": "dead_fraction", "op": "<=", "threshold": 0.1, "why": "so"}]})  # fmt: skip
    table = table_of(("x", 3.0, 0.1, {"dead_fraction": 0.9}), ("y", 4.0, 0.2, {"dead_fraction": 0.0}))
    assert choose(table, gate).chosen == "y"


def test_of_equally_sparse_the_smallest_is_chosen():
    table = table_of(("wide", 4.0, 0.1, {"d_sae": 256, "site": "t"}), ("small", 4.0, 0.2))
    assert choose(table, GATE).chosen == "small"


def test_choosing_hands_the_controls_to_the_gate():
    fields = GATE.criteria[0].model_dump() | {"must_beat": "untrained"}
    gate = Gate.model_validate({"name": "toy", "criteria": [fields]})
    controls = {"control-untrained-relu-64-s": {"fvu": 0.15, "l0": 40.0, "site": "s"}}
    assert choose(HAND, gate).chosen is None
    assert choose(HAND, gate, controls).chosen == "e"  # b and d meet the bound but are no better than the control


# ----------------------------------------------------------------------------------------------------------------------
# Several seeds


def seeded(*rows):
    """A table from (sae_id, l0, fvu, d_sae, k, seed) of a TopK sweep."""
    return table_of(
        *((r[0], r[1], r[2], {"architecture": "topk", "d_sae": r[3], "k": r[4], "seed": r[5]}) for r in rows)
    )


WIDE = (("wide-0", 8.0, 0.100, 256, 8, 0), ("wide-1", 8.0, 0.106, 256, 8, 1))  # standard deviation 0.0042


def test_a_smaller_sae_within_the_noise_of_the_seeds_is_chosen():
    table = seeded(*WIDE, ("small-0", 8.0, 0.104, 64, 8, 0), ("small-1", 8.0, 0.109, 64, 8, 1))
    choice = choose(table, GATE)
    assert choice.chosen == "small-0"
    assert set(choice.rejected) == {"wide-0", "wide-1", "small-1"} and all(choice.rejected.values())
    (reason,) = choice.rejected["wide-0"]
    assert "small-0 is smaller (d_sae 64, not 256)" in reason and "0.0042 in FVU, 0 in L0" in reason
    assert "standard deviation over these seeds" in RULE


@pytest.mark.parametrize(
    "small",
    [
        ("small", 8.0, 0.105, 64, 8, 0),  # worse in FVU by more than the seeds differ
        ("small", 8.5, 0.100, 64, 8, 0),  # denser, and the seeds have one L0
    ],
)
def test_a_smaller_sae_outside_the_noise_is_not(small):
    assert choose(seeded(*WIDE, small), GATE).chosen == "wide-0"


def test_a_smaller_sae_must_pass():
    small = seeded(("small", 8.0, 0.101, 64, 8, 0))
    gate = Gate.model_validate({"name": "toy", "criteria": [
        {"criterion": "alive", "metric": "dead_fraction", "op": "<=", "threshold": 0.1, "why": "so"}]})  # fmt: skip
    table = pd.concat([seeded(*WIDE).assign(dead_fraction=0.0), small.assign(dead_fraction=0.5)], ignore_index=True)
    assert choose(table, gate).chosen == "wide-0"
    assert choose(table.assign(dead_fraction=0.0), gate).chosen == "small"
    for change in ({"fvu": 0.31}, {"status": "pruned"}):
        assert choose(pd.concat([seeded(*WIDE), small.assign(**change)], ignore_index=True), GATE).chosen == "wide-0"


def test_the_noise_is_that_of_the_configuration_and_not_of_all_seeds():
    """Seeds 0 and 1 of other widths or k are not seeds of the sparsest one."""
    others = (("other-k", 16.0, 0.02, 256, 16, 1), ("other-width", 8.0, 0.29, 128, 8, 1))
    small = ("small", 8.0, 0.101, 64, 8, 0)
    assert choose(seeded(WIDE[0], small, *others), GATE).chosen == "wide-0"
    assert choose(seeded(*WIDE, small, *others), GATE).chosen == "small"


def test_l0_has_its_own_noise():
    relu = seeded(("w0", 8.0, 0.1, 256, None, 0), ("w1", 9.0, 0.1, 256, None, 1), ("small", 8.5, 0.1, 64, None, 0))
    relu = relu.assign(architecture="relu", l1_coefficient=0.1)
    assert choose(relu, GATE).chosen == "small"
    assert choose(relu.assign(l1_coefficient=[0.1, 0.2, 0.1]), GATE).chosen == "w0"
    assert choose(relu.assign(site=["s", "s", "t"]), GATE).chosen == "w0"  # an SAE of another site is no substitute


def test_every_sae_that_was_not_chosen_has_its_reason():
    more = table_of(
        ("pruned", 1.0, 0.01, {"status": "pruned", "status_reason": "dominated by e"}),
        ("broken", math.nan, math.nan, {"status": "error", "status_reason": "out of memory"}),
        ("wild", math.nan, math.nan, {"status": "diverged", "status_reason": "its loss is no longer finite"}),
        ("unmeasured", 3.0, math.nan),
    )
    table = pd.concat([HAND, more], ignore_index=True)
    choice = choose(table, GATE)
    assert choice.chosen == "b", "only completed SAEs can be chosen"
    assert set(choice.rejected) == set(table["sae_id"]) - {"b"}
    assert all(reasons and all(reasons) for reasons in choice.rejected.values())
    assert choice.rejected["pruned"] == ["pruned: dominated by e"]
    assert choice.rejected["a"] == ["fvu 0.5, must be <= 0.3"]
    assert "b has" in choice.rejected["d"][0] and "b is sparser" in choice.rejected["e"][0]


def test_an_sae_without_fvu_cannot_be_chosen_even_if_the_gate_does_not_ask_for_it():
    gate = Gate.model_validate({"name": "toy", "criteria": [
        {"criterion": "sparse", "metric": "l0", "op": "<=", "threshold": 10, "why": "so"}]})  # fmt: skip
    choice = choose(table_of(("x", 4.0, math.nan)), gate)
    assert choice.chosen is None and choice.rejected["x"]


def test_without_a_pass_the_closest_is_the_one_that_misses_least():
    gate = Gate.model_validate({"name": "toy", "criteria": [
        {"criterion": "a", "metric": "fvu", "op": "<=", "threshold": 0.1, "why": "so"},
        {"criterion": "b", "metric": "l0", "op": "<=", "threshold": 5, "why": "so"}]})  # fmt: skip
    table = table_of(("two", 5.1, 0.11), ("far", 4.0, 0.9), ("near", 4.0, 0.12), ("nan", 4.0, math.nan))
    choice = choose(table, gate)
    assert choice.chosen is None and choice.closest == "near"
    assert set(choice.rejected) == {"two", "far", "near", "nan"}


def test_nothing_completed_is_no_choice_and_no_crash():
    table = table_of(("x", math.nan, math.nan, {"status": "error", "status_reason": "out of memory"}))
    choice = choose(table, GATE)
    assert (choice.chosen, choice.closest, choice.front) == (None, None, [])
    decision = decide(GATE, "gate.yaml", choice, {}, None)
    assert decision["verdict"] == "no-go" and "None finished" in decision["reason"]


# ----------------------------------------------------------------------------------------------------------------------
# The decision

GOOD = {"fvu": 0.2, "l0": 4.0, "n_rows": 50}


def decided(table=HAND, controls=None, test=GOOD):
    return decide(GATE, "gate.yaml", choose(table, GATE), controls or {"control": {"fvu": 0.99}}, test)


def test_go_needs_validation_controls_and_test():
    decision = decided()
    assert decision["verdict"] == "go" and decision["chosen"] == "b"
    assert decision["criteria"][0]["value"] == 0.28 and decision["test"]["criteria"][0]["value"] == 0.2
    assert decision["controls"]["control"]["passes_gate"] is False


def test_failing_on_the_test_split_is_no_go():
    decision = decided(test=GOOD | {"fvu": 0.31})
    assert decision["verdict"] == "no-go"
    assert "b passes on the validation split but not on the test split: fvu 0.31" in decision["reason"]


@pytest.mark.parametrize("test", [None, {}, {"fvu": math.nan}])
def test_what_was_not_measured_on_test_is_no_go(test):
    assert decided(test=test)["verdict"] == "no-go"


def test_an_untrained_sae_that_passes_voids_the_gate():
    decision = decided(controls={"good": {"fvu": 0.99}, "control-untrained": {"fvu": 0.29}})
    assert decision["verdict"] == "no-go"
    assert (
        "void" in decision["reason"] and "control-untrained" in decision["reason"] and "gate.yaml" in decision["reason"]
    )


@pytest.mark.parametrize("kind", [kind for kind in NULLS if kind != "untrained_model"])
def test_a_null_of_any_kind_that_passes_voids_the_gate(kind):
    """PCA too: a gate that it passes has not shown what the SAE is for."""
    name = f"control-{kind}-topk-64-s"
    decision = decided(controls={name: {"fvu": 0.29}})
    assert decision["verdict"] == "no-go" and decision["controls"][name]["passes_gate"]
    assert f"The gate is void: the null {name} passes it" in decision["reason"]
    assert f"must_beat: {kind}" in decision["reason"]


def test_a_linear_code_cannot_pass_a_gate_that_asks_it_to_be_beaten():
    fields = GATE.criteria[0].model_dump() | {"must_beat": "pca"}
    gate = GATE.model_copy(update={"criteria": (type(GATE.criteria[0])(**fields),)})
    table = table_of(("x", 4.0, 0.1)).assign(site="s")
    controls = {"control-pca-topk-8-s": {"fvu": 0.2, "l0": 4.0, "site": "s"}}
    test = GOOD | {"fvu": 0.1, "l0": 4.0, "site": "s"}
    weak, asked = (decide(g, "gate.yaml", choose(table, g, controls), controls, test) for g in (GATE, gate))
    assert "void" in weak["reason"] and weak["verdict"] == "no-go"
    assert asked["verdict"] == "go" and asked["chosen"] == "x"
    better = {name: m | {"fvu": 0.05} for name, m in controls.items()}
    assert choose(table, gate, better).chosen is None


def test_an_untrained_model_s_sae_that_passes_is_said_and_voids_nothing():
    name = "control-untrained_model-topk-64-s"
    decision = decided(controls={name: {"fvu": 0.01}})
    assert decision["verdict"] == "go" and decision["controls"][name]["passes_gate"]
    assert f"{name} passes the gate as well: nothing in it depends on what the model has learnt" in decision["reason"]
    assert "as well" not in decided(controls={name: {"fvu": 0.99}})["reason"]


def test_no_go_names_the_closest_and_what_it_misses():
    decision = decided(table=table_of(("x", 4.0, 0.5), ("y", 4.0, 0.4)), test=None)
    assert decision["verdict"] == "no-go" and decision["chosen"] is None and decision["closest"] == "y"
    assert "Closest is y: fvu 0.4, must be <= 0.3" in decision["reason"]
    assert decision["criteria"][0]["value"] == 0.4


WAIVER = Waiver(waived_by="A. Person", why="a replication", criteria=("faithful",))


def test_a_waived_criterion_is_recorded_and_the_rest_decides():
    table = table_of(("x", 4.0, 0.5), ("y", 5.0, 0.4))
    choice = choose(table, GATE, waiver=WAIVER)
    test = GOOD | {"fvu": 0.6}
    decision = decide(GATE, "gate.yaml", choice, {}, test, WAIVER)
    assert decision["verdict"] == "go" and decision["chosen"] == "x"
    assert "meets every mandatory criterion that is not waived" in decision["reason"]
    assert decision["criteria"][0]["verdict"] == decision["test"]["criteria"][0]["verdict"] == "waived"
    assert "0.5, must be" in decision["criteria"][0]["reason"]
    assert decision["waiver"] == WAIVER.model_dump(mode="json")
    assert decided()["waiver"] is None and "waived" not in decided()["reason"]


def test_a_waiver_does_not_let_an_untrained_sae_pass():
    choice = choose(HAND, GATE, waiver=WAIVER)
    decision = decide(GATE, "gate.yaml", choice, {"control-untrained": {"fvu": 0.99}}, GOOD, WAIVER)
    assert decision["verdict"] == "no-go" and "void" in decision["reason"]


def test_each_record_says_where_its_evidence_is_and_when_it_was_judged():
    decision = decide(GATE, "gate.yaml", choose(HAND, GATE), {}, GOOD, basis={"path": "results/p1", "verdict": "go"})
    (record,), (tested,) = decision["criteria"], decision["test"]["criteria"]
    assert (record["evidence_path"], tested["evidence_path"]) == ("table.parquet", "decision.json")
    assert record["decided_at"] == decision["decided_at"] == tested["decided_at"]
    assert decision["basis"] == {"path": "results/p1", "verdict": "go"} and decided()["basis"] is None


def test_assumptions_of_the_gate_are_in_the_decision():
    line = {"assumption": "rows are shuffled", "if_wrong": "widths cannot be compared", "checked_by": "nothing yet"}
    gate = Gate.model_validate({**GATE.model_dump(), "assumptions": [line]})
    choice = choose(HAND, gate)
    assert decide(gate, "g.yaml", choice, {}, None)["assumptions"] == [line]
    assert decide(GATE, "g.yaml", choice, {}, None)["assumptions"] == []


def test_the_decision_is_json():
    for decision in (decided(), decided(table=table_of(("x", 4.0, 0.5)), test=None)):
        assert json.loads(json.dumps(decision))["rejected"] == decision["rejected"]
