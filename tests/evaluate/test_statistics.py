"""The group bootstrap covers the truth about as often as it says; tests and effect sizes against independent figures."""

from itertools import product

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score

from raysae.evaluate.statistics import (
    auroc,
    bootstrap_totals,
    cohens_d,
    group_weights,
    interval,
    largest_d_null,
    paired_permutation,
    percentile_interval,
)


def bootstrap_interval(sums, statistic, resamples, confidence, seed=0):
    return percentile_interval(statistic(bootstrap_totals(sums, resamples, seed)), confidence)


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


def test_auroc_equals_sklearns_with_ties_and_weights():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 20, 300) / 3, rng.random(300) < 0.4
    weights = rng.integers(0, 4, (5, 300)).astype(float)
    expected = [roc_auc_score(positive, score, sample_weight=w) for w in weights]
    assert auroc(score, positive, weights) == pytest.approx(expected)
    assert np.isnan(auroc(score, np.zeros(300, bool), weights)).all()


def test_paired_permutation_equals_enumeration():
    """Eight groups: all 2^8 exchanges of a group's a and b."""
    rng = np.random.default_rng(1)
    common = rng.integers(1, 50, 8)  # groups differ far more from each other than a from b: only pairs show it
    a = np.stack([common + rng.integers(-1, 4, 8), np.full(8, 10)], 1)
    b = np.stack([common, np.full(8, 10)], 1)
    differences = []
    for exchanged in product([False, True], repeat=8):
        kept = ~np.array(exchanged)[:, None]
        one, two = np.where(kept, a, b).sum(0), np.where(kept, b, a).sum(0)
        differences.append(one[0] / one[1] - two[0] / two[1])
    observed, all_of_them = differences[0], np.array(differences)
    expected = 2 * min((all_of_them >= observed - 1e-12).mean(), (all_of_them <= observed + 1e-12).mean())
    found = paired_permutation(a, b, lambda t: t[..., 0] / t[..., 1])
    assert expected < 0.2 and found == pytest.approx(expected)


@pytest.mark.parametrize("layout", [np.asarray, csr_matrix])
def test_cohens_d_by_hand(layout):
    x = np.array([[1.0, 0, 5], [3, 0, 5], [0, 2, 5], [0, 0, 5], [1, 4, 5]])
    positive = np.array([[True, True, False, False, False], [False, False, True, False, True]])
    for labels, row in zip(positive, cohens_d(layout(x), positive), strict=True):
        one, rest = x[labels], x[~labels]
        spread = np.sqrt((one.var(0) + rest.var(0)) / 2)
        assert row == pytest.approx(np.divide(one.mean(0) - rest.mean(0), spread, out=np.zeros(3), where=spread > 0))


def test_the_largest_effect_of_pure_noise_lies_inside_its_null():
    """n = 462 and 452, as in a published table whose largest |d| of 0.2896 was taken for an effect."""
    rng = np.random.default_rng(0)
    positive = (np.arange(914) < 462)[None]
    noise = rng.normal(size=(914, 8000))
    null = largest_d_null(noise, positive, permutations=60)
    largest = np.abs(cohens_d(noise, positive)).max()
    assert null.min() < largest < null.max()
    assert 0.23 < null.mean() < 0.30
    noise[positive[0], 17] += 0.6
    assert np.abs(cohens_d(noise, positive)).max() > null.max()


def test_differences_from_the_same_weights_are_paired():
    """Two metrics that vary a lot but always by the same: their difference has no spread."""
    weights = group_weights(40, 200, seed=3)
    assert (weights[0] == 1).all() and (weights.sum(1) == 40).all()
    values = np.random.default_rng(0).normal(0, 5, 40)
    one, two = weights @ values / 40, weights @ (values + 1) / 40
    low, high = interval(one, 0.9)
    assert high - low > 1
    assert interval(two - one, 0.9) == pytest.approx((1, 1))
