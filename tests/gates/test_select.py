"""The choice: a hand-made front, the rules, a reason for each SAE that was not taken, and what is no go."""

import json
import math

import pandas as pd
import pytest

from raysae.config.load import validate
from raysae.config.sections import NULLS
from raysae.errors import UserError
from raysae.gates.criteria import Gate
from raysae.gates.decision import decide, settle
from raysae.gates.select import choose, pareto_front
from raysae.gates.waivers import Waiver

GATE = Gate.model_validate(
    {"name": "toy", "criteria": [{"criterion": "faithful", "metric": "fvu", "op": "<=", "threshold": 0.3, "why": "so"}]}
)


def table_of(*rows):
    """A table of configurations of one seed, from (sae_id, l0, fvu) and columns to override."""
    base = {"site": "s", "d_sae": 64, "status": "completed", "status_reason": "", "n_rows": 100.0}
    return pd.DataFrame(
        [
            {**base, "sae_id": r[0], "l0": r[1], "fvu": r[2], "l1_coefficient": 0.1 * n, **(r[3] if len(r) > 3 else {})}
            for n, r in enumerate(rows)
        ]
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


def ruled(gate=GATE, **fields):
    return Gate.model_validate({**gate.model_dump(), "choose": fields})


def chosen(table, gate=GATE, **more):
    (outcome,) = choose(table, gate, **more).sites.values()
    return outcome.chosen


ADVISED = {"criterion": "norms", "metric": "l2_ratio", "op": ">=", "threshold": 0.8, "mandatory": False, "why": "so"}
ADVISORY = Gate.model_validate({**GATE.model_dump(), "criteria": [*GATE.model_dump()["criteria"], ADVISED]})
QUICKSTART = table_of(
    ("relu-x8", 3.8, 0.136, {"d_sae": 512, "l2_ratio": 0.79, "ce_delta": 0.093, "architecture": "relu"}),
    ("topk-x8", 4.0, 0.068, {"d_sae": 512, "l2_ratio": 0.97, "ce_delta": 0.034, "architecture": "topk"}),
    ("topk-x4", 3.99996, 0.088, {"d_sae": 256, "l2_ratio": 0.96, "ce_delta": 0.05, "architecture": "topk"}),
    ("topk-x8-k16", 16.0, 0.03, {"d_sae": 512, "l2_ratio": 0.99, "ce_delta": 0.005, "architecture": "topk"}),
)  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, "topk-x8"),  # 0.272, against 0.352 and 0.48; a quarter of L0 more would not halve it
        ({"a": 0.25}, "topk-x8-k16"),  # four times the L0 need only divide FVU by 1.4
        ({"a": 20}, "relu-x8"),
        ({"rule": "sparsest"}, "relu-x8"),
        ({"rule": "most_faithful"}, "topk-x8-k16"),
        ({"matched_l0": 4}, "topk-x8"),  # 3.8 and 3.99996 match as well, and are less faithful
        ({"matched_l0": 3.85}, "topk-x8"),  # nor does the nearest matter among those that match
        ({"matched_l0": 12}, "topk-x8-k16"),  # none matches: the nearest
        ({"error": "ce_delta"}, "topk-x8-k16"),  # 0.08, against 0.136
    ],
)
def test_what_the_gate_asks_for_is_chosen(rule, expected):
    assert chosen(QUICKSTART, ruled(ADVISORY, **rule)) == expected


def test_the_sparsest_is_not_the_sparsest_in_the_fifth_digit():
    table = QUICKSTART[QUICKSTART["architecture"] == "topk"]
    assert chosen(table, ruled(rule="sparsest")) == "topk-x8"  # of one L0, the more faithful


def test_a_rule_is_written_in_short_or_in_full():
    for short, full in (
        ("sparsest", {"rule": "sparsest"}),
        ({"matched_l0": 9}, {"rule": "matched_l0", "matched_l0": 9}),
    ):
        assert Gate.model_validate({**GATE.model_dump(), "choose": short}).choose == ruled(**full).choose


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("sparse", "rule"),
        ({"rule": "matched_l0"}, "matched_l0 and its number go together"),
        ({"rule": "knee", "matched_l0": 9}, "go together"),
        ({"a": 0}, "choose.a"),
        ({"error": "kl"}, "choose.error"),
        ({"knee": 1}, "choose.knee: unknown field"),
    ],
)
def test_a_mistake_in_choose_is_one_line(given, said):
    with pytest.raises(UserError) as caught:
        validate(Gate, {**GATE.model_dump(), "choose": given}, where="gate.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_front_and_a_verdict_for_each():
    choice = choose(HAND, GATE)
    assert choice.chosen == ["e"] and choice.sites["s"].closest is None
    assert [c.sae_id for c in choice.sites["s"].ranked] == ["e", "b", "c", "g", "d", "f"]
    assert choice.front == ["a", "b", "e", "g"]  # of all completed SAEs, for the figure
    assert set(choice.verdicts) == set(HAND["sae_id"])


def test_a_failing_sae_does_not_shadow_a_passing_one():
    gate = Gate.model_validate({"name": "toy", "criteria": [
        {"criterion": "alive", "metric": "dead_fraction", "op": "<=", "threshold": 0.1, "why": "so"}]})  # fmt: skip
    table = table_of(("x", 3.0, 0.1, {"dead_fraction": 0.9}), ("y", 4.0, 0.2, {"dead_fraction": 0.0}))
    assert chosen(table, gate) == "y"


def test_each_site_has_its_choice_in_their_order():
    """L0 and FVU of different activations are not compared: an early layer is easier."""
    table = table_of(
        ("a1", 4.0, 0.1), ("a2", 8.0, 0.09), ("b1", 50.0, 0.29, {"site": "t"}), ("c1", 1.0, 0.9, {"site": "u"})
    )
    choice = choose(table, GATE, sites=["t", "s", "u", "v"])
    assert [(site, c.chosen, c.closest) for site, c in choice.sites.items()] == [
        ("t", "b1", None), ("s", "a1", None), ("u", None, "c1"), ("v", None, None)
    ]  # fmt: skip
    assert choice.chosen == ["b1", "a1"] and set(choice.rejected) == {"a2", "c1"}


def test_choosing_hands_the_controls_to_the_gate():
    fields = GATE.criteria[0].model_dump() | {"must_beat": "untrained"}
    gate = Gate.model_validate({"name": "toy", "criteria": [fields]})
    nulls = {"control-untrained-relu-64-s": {"kind": "untrained", "fvu": 0.08, "l0": 40.0, "site": "s"}}
    assert chosen(HAND, gate) is None
    assert chosen(HAND, gate, nulls=nulls) == "g"  # e meets the bound but is no better than the control


def test_an_error_below_nothing_counts_as_nothing():
    """ΔCE may be negative by noise: more of it at a higher L0 is no better."""
    table = table_of(("a", 4.0, 0.1, {"ce_delta": -0.001}), ("b", 40.0, 0.1, {"ce_delta": -0.002, "d_sae": 32}))
    assert chosen(table, ruled(error="ce_delta")) == "b"  # a tie, and smaller
    assert chosen(table.assign(d_sae=64), ruled(error="ce_delta")) == "a"


# ----------------------------------------------------------------------------------------------------------------------
# Noise


def paired(**intervals):
    """A difference of two SAEs from intervals by `a_b`; asks for what is compared, as the flow's does."""

    def difference(a, b, of):
        assert len(of(pd.DataFrame({"fvu": [0.1, 0.2], "l0": [4.0, 4.0], "ce_delta": [0.1, 0.1]}))) == 2
        return intervals.get(f"{a}_{b}")

    return difference


def test_a_difference_inside_the_paired_interval_is_a_tie_for_fewer_failed_advisory_criteria_then_smaller():
    table = table_of(
        ("best", 4.0, 0.100, {"d_sae": 256, "l2_ratio": 0.7}), ("kept", 4.0, 0.105, {"d_sae": 256, "l2_ratio": 0.9}),
        ("small", 4.0, 0.106, {"d_sae": 64, "l2_ratio": 0.9}),
    )  # fmt: skip
    clear = paired(kept_best=(0.02, 0.01, 0.03), small_best=(0.024, 0.014, 0.034))
    noisy = paired(kept_best=(0.02, -0.01, 0.05), small_best=(0.024, -0.01, 0.05))
    half = paired(kept_best=(0.02, -0.01, 0.05), small_best=(0.024, 0.001, 0.05))
    assert chosen(table, ADVISORY) == chosen(table, ADVISORY, subtract=clear) == "best"
    assert chosen(table, ADVISORY, subtract=noisy) == "small"
    assert chosen(table, ADVISORY, subtract=half) == "kept"
    reasons = choose(table, ADVISORY, subtract=noisy).rejected
    assert "small fails fewer advisory criteria (0, not 1)" in reasons["best"][0]
    assert "interval of the difference [-0.01, 0.05]" in reasons["best"][0]
    assert chosen(table, GATE, subtract=noisy) == "small"  # no advisory criterion: the smallest
    assert chosen(table.assign(l2_ratio=[0.7, 0.9, 0.7]), ADVISORY, subtract=noisy) == "kept", "before the smallest"


def test_a_null_is_subtracted_pair_by_pair():
    fields = GATE.criteria[0].model_dump() | {"must_beat": "untrained"}
    gate = Gate.model_validate({"name": "toy", "criteria": [fields]})
    control = {"kind": "untrained", "fvu": 0.11, "fvu_low": 0.05, "fvu_high": 0.2, "l0": 40.0, "site": "s"}
    table = table_of(("x", 4.0, 0.1, {"fvu_low": 0.04, "fvu_high": 0.19}))
    name = "control-untrained-relu-64-s"
    asked = []

    def subtract(a, b, of):
        asked.append((a, b, float(of(pd.DataFrame({"fvu": [0.7]})).iloc[0])))
        return (-0.01, -0.02, -0.001)

    assert chosen(table, gate, nulls={name: control}) is None, "the intervals overlap"
    assert chosen(table, gate, nulls={name: control}, subtract=subtract) == "x" and asked == [("x", name, 0.7)]

    def without(a, b, of):
        return of(pd.DataFrame({"l0": [0.7]}))

    assert chosen(table, gate, nulls={name: control}, subtract=without) is None


def test_less_than_a_hundredth_is_a_tie_however_sure():
    table = table_of(("wide", 4.0, 0.1000, {"d_sae": 256}), ("small", 4.0, 0.1009))
    assert chosen(table) == "small"
    assert chosen(table.assign(fvu=[0.1, 0.102])) == "wide"


# ----------------------------------------------------------------------------------------------------------------------
# Several seeds


def seeded(*rows):
    """A table from (sae_id, l0, fvu, d_sae, k, seed) of a TopK sweep."""
    return table_of(
        *((r[0], r[1], r[2], {"architecture": "topk", "d_sae": r[3], "k": r[4], "seed": r[5], "l1_coefficient": None})
          for r in rows)
    )  # fmt: skip


WIDE = (("wide-0", 8.0, 0.100, 256, 8, 0), ("wide-1", 8.0, 0.106, 256, 8, 1))  # standard deviation of the score 0.034


def test_the_seed_nearest_to_the_mean_is_handed_over_not_the_luckiest():
    table = seeded(("lucky", 8.0, 0.05, 64, 8, 0), ("mean", 8.0, 0.10, 64, 8, 1), ("poor", 8.0, 0.13, 64, 8, 2))
    choice = choose(table, GATE)
    (candidate,) = choice.sites["s"].ranked
    assert candidate.sae_id == "mean" and candidate.saes == ("lucky", "mean", "poor")
    assert candidate.scores[0] == pytest.approx(8 * 0.28 / 3)
    assert candidate.spread[0] == pytest.approx(8 * table["fvu"].std())
    assert "mean stands for its configuration" in choice.rejected["lucky"][0]
    assert chosen(table[:2]) == "mean", "of two, which are as near, the one that scores worse"


def test_a_configuration_is_judged_by_its_mean():
    """The luckiest seed of all is of a configuration that is worse on average."""
    lucky = [(f"l-{seed}", 8.0, fvu, 64, 8, seed) for seed, fvu in enumerate((0.02, 0.13, 0.13))]
    table = seeded(*lucky, ("a-0", 8.0, 0.03, 128, 8, 0), ("a-1", 8.0, 0.03, 128, 8, 1))
    first, second = choose(table, GATE).sites["s"].ranked
    assert first.sae_id.startswith("a-") and second.saes == ("l-0", "l-1", "l-2")


def test_a_configuration_of_which_most_seeds_fail_is_no_candidate():
    table = seeded(("a", 8.0, 0.29, 64, 8, 0), ("b", 8.0, 0.31, 64, 8, 1), ("c", 8.0, 0.32, 64, 8, 2))
    choice = choose(table, GATE)
    assert choice.chosen == [] and choice.sites["s"].closest == "a"
    assert choice.rejected["a"] == ["passes, but 2 of the 3 seeds of its configuration do not"]
    assert chosen(table[:2]) == "a"


def test_a_smaller_configuration_within_the_noise_of_the_seeds_is_chosen():
    table = seeded(*WIDE, ("small-0", 8.0, 0.104, 64, 8, 0), ("small-1", 8.0, 0.109, 64, 8, 1))
    choice = choose(table, GATE)
    assert choice.chosen == ["small-1"]
    assert set(choice.rejected) == {"wide-0", "wide-1", "small-0"} and all(choice.rejected.values())
    (reason,) = choice.rejected["wide-1"]
    assert "small-1 is smaller (d_sae 64, not 256)" in reason and "standard deviation over seeds, 0.031" in reason


@pytest.mark.parametrize("small", [("small", 8.0, 0.110, 64, 8, 0), ("small", 8.5, 0.103, 64, 8, 0)])
def test_a_smaller_one_outside_the_noise_is_not(small):
    assert chosen(seeded(*WIDE, small)) == "wide-1"


def test_a_smaller_one_must_pass():
    small = seeded(("small", 8.0, 0.103, 64, 8, 0))
    gate = Gate.model_validate({"name": "toy", "criteria": [
        {"criterion": "alive", "metric": "dead_fraction", "op": "<=", "threshold": 0.1, "why": "so"}]})  # fmt: skip
    table = pd.concat([seeded(*WIDE).assign(dead_fraction=0.0), small.assign(dead_fraction=0.5)], ignore_index=True)
    assert chosen(table, gate) == "wide-1"
    assert chosen(table.assign(dead_fraction=0.0), gate) == "small"
    better = small.assign(dead_fraction=0.5, fvu=0.01)
    assert (
        chosen(pd.concat([table, better.assign(sae_id="best", l1_coefficient=9.0)], ignore_index=True), gate)
        == "wide-1"
    )
    for change in ({"fvu": 0.31}, {"status": "pruned"}):
        assert chosen(pd.concat([seeded(*WIDE), small.assign(**change)], ignore_index=True)) == "wide-1"


def test_the_noise_is_that_of_the_configuration_and_not_of_all_seeds():
    """Seeds 0 and 1 of other widths or k are not seeds of one configuration."""
    others = (("other-k", 16.0, 0.02, 256, 16, 1), ("other-width", 8.0, 0.29, 128, 8, 1))
    table = seeded(WIDE[0], ("small", 8.0, 0.103, 64, 8, 0), *others)
    assert all(len(c.saes) == 1 for c in choose(table, GATE).sites["s"].ranked)
    relu = table.assign(architecture="relu", k=math.nan, l1_coefficient=[0.1, 0.1, 0.2, 0.1])
    assert all(len(c.saes) == 1 for c in choose(relu, GATE).sites["s"].ranked)
    assert len(choose(relu.assign(d_sae=64, l1_coefficient=0.1), GATE).sites["s"].ranked[0].saes) == 4


def test_every_sae_that_was_not_chosen_has_its_reason():
    more = table_of(
        ("pruned", 1.0, 0.01, {"status": "pruned", "status_reason": "dominated by e"}),
        ("broken", math.nan, math.nan, {"status": "error", "status_reason": "out of memory"}),
        ("wild", math.nan, math.nan, {"status": "diverged", "status_reason": "its loss is no longer finite"}),
        ("unmeasured", 3.0, math.nan),
    )
    table = pd.concat([HAND, more], ignore_index=True)
    choice = choose(table, GATE)
    assert choice.chosen == ["e"], "only completed SAEs can be chosen"
    assert set(choice.rejected) == set(table["sae_id"]) - {"e"}
    assert all(reasons and all(reasons) for reasons in choice.rejected.values())
    assert choice.rejected["pruned"] == ["pruned: dominated by e"]
    assert choice.rejected["a"] == ["fvu 0.5, must be <= 0.3"]
    assert choice.rejected["b"] == [
        "passes, but e is better: FVU 0.28 × L0 4 = 1.12; FVU ×2.8 for L0 ×0.5, where up to ×2 would pay"
    ]
    assert "L0 ×3.75 for FVU ×0.5, where ×0.267 or less would pay" in choice.rejected["g"][0]
    assert "FVU 0.2 × L0 9 = 1.8; better in neither, L0 ×1.12, FVU ×2" in choice.rejected["f"][0]


def test_an_sae_without_fvu_cannot_be_chosen_even_if_the_gate_does_not_ask_for_it():
    gate = Gate.model_validate({"name": "toy", "criteria": [
        {"criterion": "sparse", "metric": "l0", "op": "<=", "threshold": 10, "why": "so"}]})  # fmt: skip
    choice = choose(table_of(("x", 4.0, math.nan)), gate)
    assert choice.chosen == [] and choice.rejected["x"] == ["passes, but its L0 or FVU was not measured"]


def test_without_a_pass_the_closest_is_the_one_that_misses_least():
    gate = Gate.model_validate({"name": "toy", "criteria": [
        {"criterion": "a", "metric": "fvu", "op": "<=", "threshold": 0.1, "why": "so"},
        {"criterion": "b", "metric": "l0", "op": "<=", "threshold": 5, "why": "so"}]})  # fmt: skip
    table = table_of(("two", 5.1, 0.11), ("far", 4.0, 0.9), ("near", 4.0, 0.12), ("nan", 4.0, math.nan))
    choice = choose(table, gate)
    assert choice.chosen == [] and choice.sites["s"].closest == "near"
    assert set(choice.rejected) == {"two", "far", "near", "nan"}


def test_nothing_completed_is_no_choice_and_no_crash():
    stopped = {"status": "pruned", "status_reason": "L0 0 at 200,000 tokens"}
    table = table_of(
        ("x", math.nan, math.nan, {"status": "error", "status_reason": "out of memory"}), ("y", 0.0, 1.0, stopped),
        ("z", 0.0, 1.0, stopped),
    )  # fmt: skip
    choice = choose(table, GATE)
    assert (choice.chosen, choice.sites["s"].closest, choice.front) == ([], None, [])
    decision = decide(GATE, "gate.yaml", choice, {}, {})
    assert decision["verdict"] == "no-go" and (decision["chosen"], decision["closest"]) == (None, None)
    said = "None finished its training: 2 pruned: L0 0 at 200,000 tokens; 1 error: out of memory."
    assert decision["reason"] == f"No SAE passes the gate. {said}"


# ----------------------------------------------------------------------------------------------------------------------
# The decision

GOOD = {"fvu": 0.2, "l0": 4.0, "n_rows": 50, "site": "s"}


def decided(table=HAND, nulls=None, test=GOOD, gate=GATE, **more):
    choice = choose(table, gate, nulls or {})
    tests = {i: test for i in choice.chosen} if test is not None else {}
    return decide(gate, "gate.yaml", choice, nulls or {"control": {"fvu": 0.99}}, tests, **more)


def test_go_needs_validation_controls_and_test():
    decision = decided()
    assert decision["verdict"] == "go" and decision["chosen"] == "e"
    assert decision["criteria"][0]["value"] == 0.1 and decision["test"]["criteria"][0]["value"] == 0.2
    assert decision["controls"]["control"]["passes_gate"] is False


def test_failing_on_the_test_split_is_no_go():
    decision = decided(test=GOOD | {"fvu": 0.31})
    assert decision["verdict"] == "no-go"
    assert "e passes on the validation split but not on the test split: fvu 0.31" in decision["reason"]


@pytest.mark.parametrize("test", [None, {}, {"fvu": math.nan}])
def test_what_was_not_measured_on_test_is_no_go(test):
    assert decided(test=test)["verdict"] == "no-go"


def test_an_untrained_sae_that_passes_voids_the_gate():
    decision = decided(nulls={"good": {"fvu": 0.99}, "control-untrained": {"fvu": 0.29}})
    assert decision["verdict"] == "no-go"
    assert (
        "void" in decision["reason"] and "control-untrained" in decision["reason"] and "gate.yaml" in decision["reason"]
    )


@pytest.mark.parametrize("kind", [kind for kind in NULLS if kind != "untrained_model"])
def test_a_null_of_any_kind_that_passes_voids_the_gate(kind):
    """PCA too: a gate that it passes has not shown what the SAE is for."""
    name = f"control-{kind}-topk-64-s"
    decision = decided(nulls={name: {"kind": kind, "fvu": 0.29}})
    assert decision["verdict"] == "no-go" and decision["controls"][name]["passes_gate"]
    assert f"The gate is void: the null {name} passes it" in decision["reason"]
    assert f"must_beat: {kind}" in decision["reason"]


def test_a_linear_code_cannot_pass_a_gate_that_asks_it_to_be_beaten():
    fields = GATE.criteria[0].model_dump() | {"must_beat": "pca"}
    gate = GATE.model_copy(update={"criteria": (type(GATE.criteria[0])(**fields),)})
    table = table_of(("x", 4.0, 0.1)).assign(site="s")
    nulls = {"control-pca-topk-8-s": {"kind": "pca", "fvu": 0.2, "l0": 4.0, "site": "s"}}
    test = GOOD | {"fvu": 0.1, "l0": 4.0, "site": "s"}
    weak, asked = (decided(table, nulls, test, g) for g in (GATE, gate))
    assert "void" in weak["reason"] and weak["verdict"] == "no-go"
    assert asked["verdict"] == "go" and asked["chosen"] == "x"
    better = {name: m | {"fvu": 0.05} for name, m in nulls.items()}
    assert choose(table, gate, better).chosen == []


def test_a_null_that_passes_beside_other_saes_is_said_and_voids_nothing():
    """PCA with as many directions on as there are axes is faithful, and says nothing of an SAE at a tenth of its L0."""
    name = "control-pca-8-k8-s"
    for beside, void in ((["x"], False), (["x", "e"], True)):
        decision = decided(nulls={name: {"fvu": 0.1, "l0": 8.0, "site": "s", "beside": beside}})
        assert ("void" in decision["reason"]) is void and (decision["verdict"] == "go") is not void
        assert (
            void
            or f"The null {name} passes the gate as well, at an L0 or size that was not chosen" in decision["reason"]
        )
    trained = {"trained": {"kind": "shuffled_rows", "fvu": 0.1, "l0": 8.0, "site": "s", "beside": ["x"]}}
    assert "void" in decided(nulls=trained)["reason"], "one stands for all of its site"


def test_the_choice_is_held_against_its_nulls_on_the_split_that_it_is_measured_on():
    fields = GATE.criteria[0].model_dump() | {"must_beat": "untrained"}
    gate = Gate.model_validate({"name": "toy", "criteria": [fields]})
    name = "control-untrained-relu-64-s"
    weak = {name: {"kind": "untrained", "fvu": 0.29, "l0": 40.0, "site": "s", "beside": ["e"]}}
    choice = choose(HAND, gate, weak)
    (chosen,) = choice.chosen
    tests = {chosen: GOOD | {"sae_id": chosen, "l0": 5.0, "site": "s", "fvu": 0.2}}

    def paired(high):
        return lambda one, other, of: (high - 0.1, high - 0.2, high) if (one, other) == (chosen, name) else None

    def verdict(fvu, high):
        on_test = {name: {**weak[name], "fvu": fvu}}, paired(high)
        found = decide(gate, "gate.yaml", choice, weak, tests, on_test=on_test)
        assert found["test_controls"][name]["fvu"] == fvu
        return found["verdict"], found["reason"]

    assert verdict(0.25, -0.01)[0] == "go"
    said, reason = verdict(0.25, 0.01)
    assert said == "no-go" and "not on the test split" in reason and "not clearly better" in reason
    assert decide(gate, "gate.yaml", choice, weak, tests)["verdict"] == "go", "by value, against the validation split's"
    strong = decide(
        gate, "gate.yaml", choice, weak, tests, on_test=({name: {**weak[name], "fvu": 0.1}}, lambda *_: None)
    )
    assert strong["verdict"] == "no-go"


def test_an_untrained_model_s_sae_that_passes_is_said_and_voids_nothing():
    name = "control-untrained_model-topk-64-s"
    decision = decided(nulls={name: {"kind": "untrained_model", "fvu": 0.01}})
    assert decision["verdict"] == "go" and decision["controls"][name]["passes_gate"]
    assert f"{name} passes the gate as well: nothing in it depends on what the model has learnt" in decision["reason"]
    assert "as well" not in decided(nulls={name: {"kind": "untrained_model", "fvu": 0.99}})["reason"]


def test_no_go_names_the_closest_and_what_it_misses():
    decision = decided(table=table_of(("x", 4.0, 0.5), ("y", 4.0, 0.4)), test=None)
    assert decision["verdict"] == "no-go" and decision["chosen"] is None and decision["closest"] == "y"
    assert "Closest is y: fvu 0.4, must be <= 0.3" in decision["reason"]
    assert decision["criteria"][0]["value"] == 0.4


WAIVER = Waiver(waived_by="A. Person", why="a replication", criteria=("faithful",))


def test_a_waived_criterion_is_recorded_and_the_rest_decides():
    table = table_of(("x", 4.0, 0.4), ("y", 5.0, 0.4))
    choice = choose(table, GATE, waiver=WAIVER)
    test = GOOD | {"fvu": 0.6}
    decision = decide(GATE, "gate.yaml", choice, {}, {"x": test}, WAIVER)
    assert decision["verdict"] == "go" and decision["chosen"] == "x"
    assert "meets every mandatory criterion that is not waived" in decision["reason"]
    assert decision["criteria"][0]["verdict"] == decision["test"]["criteria"][0]["verdict"] == "waived"
    assert "0.4, must be" in decision["criteria"][0]["reason"]
    assert decision["waiver"] == WAIVER.model_dump(mode="json")
    assert decided()["waiver"] is None and "waived" not in decided()["reason"]


def test_a_waiver_does_not_let_an_untrained_sae_pass():
    choice = choose(HAND, GATE, waiver=WAIVER)
    decision = decide(GATE, "gate.yaml", choice, {"control-untrained": {"fvu": 0.99}}, {"e": GOOD}, WAIVER)
    assert decision["verdict"] == "no-go" and "void" in decision["reason"]


def test_each_record_says_where_its_evidence_is_and_when_it_was_judged():
    decision = decided(basis={"path": "results/p1", "verdict": "go"})
    (record,), (tested,) = decision["criteria"], decision["test"]["criteria"]
    assert (record["evidence_path"], tested["evidence_path"]) == ("table.parquet", "decision.json")
    assert record["decided_at"] == decision["decided_at"] == tested["decided_at"]
    assert decision["basis"] == {"path": "results/p1", "verdict": "go"} and decided()["basis"] is None


def test_assumptions_of_the_gate_are_in_the_decision():
    line = {"assumption": "rows are shuffled", "if_wrong": "widths cannot be compared", "checked_by": "nothing yet"}
    gate = Gate.model_validate({**GATE.model_dump(), "assumptions": [line]})
    choice = choose(HAND, gate)
    assert decide(gate, "g.yaml", choice, {}, {})["assumptions"] == [line]
    assert decide(GATE, "g.yaml", choice, {}, {})["assumptions"] == []


def test_the_decision_defends_itself():
    validation = {"topk-x8": QUICKSTART.to_dict("records")[1]}
    decision = decided(QUICKSTART, test=GOOD | {"fvu": 0.072, "l0": 4.0}, gate=ADVISORY, validation=validation)
    choice = decision["choices"]["s"]
    assert choice["chosen"] == "topk-x8" and choice["verdict"] == "go"
    assert choice["score"]["name"] == "FVU · L0"
    assert choice["score"]["validation"]["in_words"] == "FVU 0.068 × L0 4 = 0.272"
    assert choice["score"]["test"] == {"value": pytest.approx(0.288), "in_words": "FVU 0.072 × L0 4 = 0.288"}
    assert choice["runner_up"]["sae_id"] == "topk-x4"
    assert choice["runner_up"]["why"] == "FVU 0.088 × L0 4 = 0.352; better in neither, L0 ×1, FVU ×1.29"
    assert choice["traded"] == [
        "The sparsest that passes, relu-x8: L0 3.8 (×0.95), FVU 0.136 (×2).",
        "The most faithful that passes, topk-x8-k16: L0 16 (×4), FVU 0.03 (×0.441).",
    ]
    words = {c["sae_id"]: (c["in_words"], c["failed_advisory"]) for c in choice["candidates"]}
    assert list(words) == ["topk-x8", "topk-x4", "topk-x8-k16", "relu-x8"]
    assert words["relu-x8"] == ("FVU 0.136 × L0 3.8 = 0.517", 1)
    assert "twice the L0 must at least halve FVU" in decision["selection"]
    assert decision["choose"] == {"rule": "knee", "error": "fvu", "a": 1.0, "matched_l0": None}


def test_a_mean_over_seeds_is_not_written_as_a_product():
    table = seeded(("a", 8.0, 0.1, 64, 8, 0), ("b", 9.0, 0.12, 64, 8, 1))
    (words,) = (c["in_words"] for c in decided(table)["choices"]["s"]["candidates"])
    assert words == "FVU · L0 0.94, mean of FVU 0.11 and L0 8.5, over 2 seeds (standard deviation of FVU · L0 0.2)"


def test_each_value_says_which_split_it_is_from():
    """Only what was measured on test is said to be: dead latents are counted in training, stability on validation."""
    asked = [
        *GATE.model_dump()["criteria"],
        {"criterion": "alive", "metric": "dead_fraction", "op": "<=", "threshold": 0.5, "why": "so"},
        {"criterion": "stable", "metric": "stability_mmcs", "op": ">=", "threshold": 0.5, "why": "so"},
        {"criterion": "small", "metric": "d_sae", "op": "<=", "threshold": 64, "mandatory": False, "why": "so"},
    ]
    gate = Gate.model_validate({"name": "toy", "criteria": asked})
    facts = {"dead_fraction": 0.1, "stability_mmcs": 0.8}
    decision = decided(HAND.assign(**facts), gate=gate, test={**GOOD, **facts, "d_sae": 64})
    assert [c["split"] for c in decision["criteria"]] == ["validation", "training", "validation", "config"]
    assert [c["split"] for c in decision["test"]["criteria"]] == ["test", "training", "validation", "config"]
    assert decision["verdict"] == "go" and "untouched" not in decision["reason"]
    said = (
        "on the test split, where dead_fraction (of training), stability_mmcs (of validation), d_sae (of config) is not"
    )
    assert said in decision["reason"]


def test_several_sites_are_listed_and_one_go_is_a_go():
    table = table_of(("a", 4.0, 0.5), ("b", 4.0, 0.1, {"site": "t"}), ("c", 4.0, 0.1, {"site": "u"}))
    choice = choose(table, GATE)
    tests = {"b": GOOD | {"fvu": 0.9}, "c": GOOD}
    decision = decide(GATE, "gate.yaml", choice, {}, tests)
    assert decision["verdict"] == "go" and decision["chosen"] == "c" and decision["test"]["metrics"] == GOOD
    assert {s: c["verdict"] for s, c in decision["choices"].items()} == {"s": "no-go", "t": "no-go", "u": "go"}
    reason = decision["reason"]
    assert reason.startswith("go at 1 of 3 sites. s: no-go. No SAE passes the gate.") and "u: go. c meets" in reason
    none = decide(GATE, "gate.yaml", choice, {}, {i: t | {"fvu": 0.9} for i, t in tests.items()})
    assert none["verdict"] == "no-go" and none["chosen"] == "b", "the first that has a choice"
    lost = table_of(("0", 4.0, math.nan, {"site": "r", "status": "error"}))
    choice = choose(pd.concat([lost, table], ignore_index=True), GATE)
    assert decide(GATE, "gate.yaml", choice, {}, {i: t | {"fvu": 0.9} for i, t in tests.items()})["chosen"] == "b"


MISSING = {"subject": "recovery of the factors", "why": "no run has them"}


def test_a_gate_whose_subject_is_not_measured_is_incomplete():
    gate = Gate.model_validate({**GATE.model_dump(), "unmeasured": [MISSING]})
    decision = decided(gate=gate)
    assert decision["verdict"] == "incomplete" == decision["choices"]["s"]["verdict"] and decision["chosen"] == "e"
    assert "But what the gate is about is not measured: recovery of the factors." in decision["reason"]
    assert decision["unmeasured"] == [{**MISSING, "mandatory": True, "waived": False}]
    assert decided(gate=gate, test=GOOD | {"fvu": 0.9})["verdict"] == "no-go", "what fails is no go"
    waiver = Waiver(waived_by="A. Person", why="so", criteria=("recovery of the factors",))
    waived = decided(gate=gate, waiver=waiver)
    assert waived["verdict"] == "go" and waived["unmeasured"][0]["waived"]
    advisory = Gate.model_validate({**GATE.model_dump(), "unmeasured": [{**MISSING, "mandatory": False}]})
    assert decided(gate=advisory)["verdict"] == "go"


def test_a_gate_that_chooses_nothing_settles_what_was_measured():
    gate = Gate.model_validate({**GATE.model_dump(), "choose": None})
    metrics = {"fvu": 0.2, "fvu_low": 0.1, "fvu_high": 0.3, "n_rows": 50}
    found = settle(gate, "g.yaml", metrics, {"n": {"fvu": 0.9}}, evidence_path="study.json")
    assert (found["verdict"], found["reason"]) == ("go", "Every mandatory criterion is met on the test split.")
    (record,) = found["criteria"]
    assert (record["split"], record["evidence_path"], record["high"], record["n"]) == ("test", "study.json", 0.3, 50)
    assert found["controls"]["n"]["passes_gate"] is False and "chosen" not in found
    missed = settle(gate, "g.yaml", {"fvu": 0.4})
    assert missed["verdict"] == "no-go" and "test split: fvu 0.4, must be <= 0.3." in missed["reason"]
    void = settle(gate, "g.yaml", metrics, {"n": {"kind": "shuffled", "fvu": 0.3}})
    assert void["verdict"] == "no-go" and "the null n passes it. Tighten g.yaml, or" in void["reason"]
    open_ = Gate.model_validate({**gate.model_dump(), "unmeasured": [MISSING]})
    assert settle(open_, "g.yaml", metrics)["verdict"] == "incomplete"
    both = Waiver(waived_by="A. Person", why="so", criteria=("faithful", MISSING["subject"]))
    waived = settle(open_, "g.yaml", {"fvu": 0.4}, waiver=both)
    assert waived["verdict"] == "go" and waived["unmeasured"][0]["waived"]
    assert "Every mandatory criterion that is not waived is met" in waived["reason"]
    for choosing in (lambda: choose(HAND, gate), lambda: decide(gate, "g.yaml", choose(HAND, GATE), {}, {})):
        with pytest.raises(ValueError, match="toy chooses no SAE"):
            choosing()


def test_looks_at_the_test_split_are_recorded():
    looks = {"test_split": "records-0", "number": 3, "earlier": []}
    assert decided(looks=looks)["looks"] == looks and decided()["looks"] is None


def test_the_decision_is_json():
    for decision in (decided(), decided(table=table_of(("x", 4.0, 0.5)), test=None)):
        assert json.loads(json.dumps(decision))["rejected"] == decision["rejected"]
