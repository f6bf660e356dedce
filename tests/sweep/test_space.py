"""The search space: every width equally often, at every point of the sweep; ids, learning rates and schedules."""

import math
from collections import Counter

import pytest

from raysae.sweep.space import Common, check_space, members, proposals, range_at, recipe

SIXTEEN = tuple(range(2, 33, 2))
WIDTHS = {"blocks.1.resid_post": 64, "blocks.2.resid_post": 128}


@pytest.mark.parametrize("architectures", [("relu",), ("relu", "topk")])
def test_every_prefix_of_whole_rounds_samples_each_expansion_equally_often(architectures):
    plan = proposals({"s": 64}, architectures, SIXTEEN, None, samples=5)
    assert len(plan) == 5 * len(architectures) * 16
    for rounds in range(1, 5 * len(architectures) + 1):
        prefix = Counter(p.expansion_factor for p in plan[: 16 * rounds])
        assert prefix == dict.fromkeys(SIXTEEN, rounds)
    for stop in range(len(plan)):  # and inside a round by at most one
        counts = Counter(dict.fromkeys(SIXTEEN, 0)) + Counter(p.expansion_factor for p in plan[:stop])
        counts = [counts[e] for e in SIXTEEN]
        assert max(counts) - min(counts) <= 1


def test_each_site_architecture_and_expansion_gets_its_samples():
    plan = proposals(WIDTHS, ("relu", "topk"), (4, 8), None, samples=3)
    counts = Counter((p.site, p.architecture, p.expansion_factor) for p in plan)
    assert set(counts.values()) == {3} and len(counts) == 2 * 2 * 2
    assert [p.index for p in plan] == list(range(24)) and all(p.coefficient is None for p in plan)


def test_the_grid_of_the_sixteen_expansions_is_every_combination_once():
    grid = {"relu": (0.02, 0.06, 0.2), "topk": (8, 16)}
    plan = proposals({"s": 64}, ("relu", "topk"), SIXTEEN, grid, samples=99)
    found = Counter((p.architecture, p.expansion_factor, p.coefficient) for p in plan)
    assert found == Counter((a, e, c) for a in grid for e in SIXTEEN for c in grid[a])
    assert Counter(p.expansion_factor for p in plan[: 2 * 16]) == dict.fromkeys(SIXTEEN, 2)


def test_a_range_that_ends_early_is_told_once_for_each_width():
    def told(high):
        return check_space({"s": 16}, ("topk", "relu"), (0.5, 4), {"topk": ("k_range", (2, high)), "relu": L1}, 3)

    L1 = ("l1_range", (0.1, 1.0))
    assert told(8) == []
    assert told(32) == ["sweep: k_range [2, 32] ends at the 8 latents of an SAE of expansion factor 0.5 at s"]
    assert range_at("jumprelu", (2, 32), 8) == (2, 8) and range_at("relu", (0.1, 9.0), 8) == (0.1, 9.0)


def made(plan, seeds=(0,), rate=None, d_in=64, coefficient=0.1):
    return [m for p in plan for m in members(p, p.coefficient or coefficient, d_in, seeds, Common(rate))]


def test_sae_ids_are_unique_and_say_what_the_sae_is():
    grid = {"relu": (0.02, 0.020001), "topk": (8,)}  # alike when rounded for the id
    found = made(proposals(WIDTHS, ("relu", "topk"), (2, 2.5), grid, 1), seeds=(0, 1, 7))
    ids = [m.sae_id for m in found]
    assert len(set(ids)) == len(ids) == 2 * 2 * 3 * 3
    assert all("/" not in i and " " not in i for i in ids)
    assert "000-relu-x2-l1_0.02-s0" in ids and any(i.endswith("-topk-x2.5-k8-s7") for i in ids)


def test_seeds_share_everything_but_the_seed():
    one, two = made(proposals({"s": 64}, ("relu",), (4,), None, 1), seeds=(3, 5))
    assert (one.config.seed, two.config.seed) == (3, 5)
    assert one.config.l1_coefficient == two.config.l1_coefficient and one.learning_rate == two.learning_rate


def test_the_learning_rate_falls_with_the_root_of_the_width():
    found = made(proposals({"s": 64}, ("relu", "topk"), (4, 16, 256), None, 1), coefficient=8)
    by_width = {m.config.d_sae: m.learning_rate for m in found}
    assert by_width[2**14] == pytest.approx(2e-4)
    for d_sae, rate in by_width.items():
        assert rate * math.sqrt(d_sae) == pytest.approx(2e-4 * 128)
    assert {m.learning_rate for m in made(proposals({"s": 64}, ("relu",), (4, 16), None, 1), rate=1e-3)} == {1e-3}


def test_widths_are_whole_and_k_fits():
    found = made(proposals({"s": 30}, ("topk",), (0.001, 0.05, 2.55), {"topk": (40,)}, 1), d_in=30)
    assert [(m.config.d_sae, m.config.k) for m in found] == [(1, 1), (2, 2), (76, 40)]


def test_a_member_has_the_knob_of_its_architecture_alone():
    relu, topk = (
        m.config for m in made(proposals({"s": 64}, ("relu", "topk"), (4,), {"relu": (0.1,), "topk": (8,)}, 1))
    )
    assert (relu.l1_coefficient, relu.k) == (0.1, None) and (topk.l1_coefficient, topk.k) == (None, 8)


def test_the_recipe_counts_tokens_in_steps():
    made = recipe(100_000, 100, 0.05, 0.2, 0.1, dead_after_tokens=2_000)
    assert (made.steps, made.warmup_steps, made.decay_steps, made.sparsity_warmup_steps) == (1000, 50, 200, 100)
    assert made.dead_after_tokens == 2_000
    assert recipe(100_000, 100, 0.05, 0.2, 0.1, dead_after_tokens=10**9).dead_after_tokens == 5_000
    rates = [made.rate(t) for t in range(1000)]
    assert rates[0] == pytest.approx(1 / 50) and rates[49] == 1 and set(rates[49:800]) == {1.0}
    assert rates[801:] == sorted(rates[801:], reverse=True) and 0 < rates[-1] <= 1 / 200
    assert recipe(5, 100, 0.05, 0.2, 0.1, 10).steps == 1


def test_l1_coefficients_are_given_in_the_stated_units_and_kept_as_unit_norm():
    (proposal,) = proposals({"s": 64}, ("relu",), (4,), {"relu": (0.8,)}, 1)
    (far,) = members(proposal, 0.8, 64, (0,), Common(l1_units="sqrt_d", offsets={"s": 2.0}))
    assert far.config.l1_coefficient == pytest.approx(0.2)
    (member,) = members(proposal, 0.8, 64, (0,), Common(l1_units="sqrt_d"))
    assert member.config.l1_coefficient == pytest.approx(0.8 / 8) and "l1_0.1" in member.sae_id


def test_the_log_speaks_of_a_mean_that_outweighs_what_varies():
    from raysae.stages.saes import far_from_zero

    assert far_from_zero({"near": 1.0, "there": 10**0.5 - 1e-9}) == []
    (line,) = far_from_zero({"near": 1.0, "far": 101**0.5})
    assert line.startswith("sweep: far: the norm of the mean activation is 10 times what varies about it")
