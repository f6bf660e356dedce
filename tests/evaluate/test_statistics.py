"""The group bootstrap: it covers the truth about as often as it says, and resamples groups, not rows."""

import numpy as np
import pytest

from raysae.evaluate.statistics import bootstrap_interval, bootstrap_totals


def ratio(totals):
    return totals[:, 0] / totals[:, 1]


def draw(rng, groups):
    """Groups of unequal size whose rows share a group effect: sums and sizes [groups, 2]. The true ratio is 1."""
    sizes = rng.integers(1, 20, size=groups)
    effects = rng.normal(1, 0.5, size=groups)
    return np.stack([sizes * effects + np.sqrt(sizes) * rng.normal(0, 0.3, groups), sizes], axis=1)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_cover_the_truth_at_about_their_rate(confidence):
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        low, high = bootstrap_interval(draw(rng, 50), ratio, 400, confidence, seed=trial)
        hits += low <= 1 <= high
    # A percentile interval of 50 groups falls a little short; 400 trials add a standard error of 1-2 points.
    assert confidence - 0.06 < hits / 400 < confidence + 0.04


def test_the_interval_holds_the_estimate_and_shrinks_with_groups():
    rng = np.random.default_rng(1)
    few, many = draw(rng, 20), draw(rng, 2000)
    widths = []
    for sums in (few, many):
        low, high = bootstrap_interval(sums, ratio, 1000, 0.95)
        assert low < sums[:, 0].sum() / sums[:, 1].sum() < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


def test_same_seed_same_interval():
    sums = draw(np.random.default_rng(2), 30)
    assert bootstrap_interval(sums, ratio, 500, 0.9, 7) == bootstrap_interval(sums, ratio, 500, 0.9, 7)
    assert bootstrap_interval(sums, ratio, 500, 0.9, 7) != bootstrap_interval(sums, ratio, 500, 0.9, 8)


def test_saes_on_the_same_groups_get_the_same_resamples():
    """So that an SAE that is better on every group is better in every resample."""
    sums = draw(np.random.default_rng(3), 30)
    better = sums - np.array([0.1, 0]) * sums[:, 1:]
    one, two = (bootstrap_interval(s, ratio, 300, 0.9, 0) for s in (sums, better))
    assert np.subtract(one, two) == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("sums", [np.ones((1, 2)), np.ones((0, 2)), np.array([[1.0, np.nan], [1.0, 1.0]])])
def test_nothing_is_said_where_nothing_can_be(sums):
    assert np.isnan(bootstrap_interval(sums, ratio, 100, 0.9)).all()


def test_a_column_that_is_not_finite_spoils_no_other():
    sums = draw(np.random.default_rng(4), 30)
    spoilt = np.concatenate([sums, np.full((30, 1), 1.0)], axis=1)
    spoilt[3, 2] = np.inf
    totals = bootstrap_totals(spoilt, 100, 0)
    assert np.array_equal(totals[:, :2], bootstrap_totals(sums, 100, 0)) and np.isnan(totals[:, 2]).all()
