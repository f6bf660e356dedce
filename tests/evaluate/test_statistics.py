"""The group bootstrap covers the truth about as often as it says; tests and effect sizes against independent figures."""

from itertools import product

import numpy as np
import pytest
from scipy import stats
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score

from raysae.evaluate.statistics import (
    Bootstrap,
    RankScores,
    auroc,
    cohens_d,
    effective_groups,
    family_wise_p,
    group_weights,
    interval,
    intervals,
    paired_permutation,
)


def bootstrap_interval(sums, statistic, resamples, confidence, seed=0):
    found = intervals(sums, statistic, Bootstrap(resamples, confidence, seed))
    return float(found.low[0]), float(found.high[0])


def ratio(totals):
    return totals[:, 0] / totals[:, 1]


def draw(rng, groups):
    """Groups of unequal size whose rows share a group effect: sums and sizes [groups, 2]. The true ratio is 1."""
    sizes = rng.integers(1, 20, size=groups)
    effects = rng.normal(1, 0.5, size=groups)
    return np.stack([sizes * effects + np.sqrt(sizes) * rng.normal(0, 0.3, groups), sizes], axis=1)


@pytest.mark.parametrize("groups,confidence,short", [(20, 0.95, 0.035), (40, 0.8, 0.06)])
def test_intervals_cover_the_truth_at_about_their_rate(groups, confidence, short):
    """Sums whose groups differ in size and skew, where percentiles of 20 groups' resamples cover 0.88 for 0.95."""
    rng = np.random.default_rng(0)
    trials, hits = 300, 0
    for trial in range(trials):
        sizes = rng.integers(1, 20, groups)
        sums = np.stack([sizes * rng.lognormal(-0.125, 0.5, groups), sizes], axis=1)  # of mean 1
        low, high = bootstrap_interval(sums, ratio, 300, confidence, seed=trial)
        hits += low <= 1 <= high
    assert confidence - short < hits / trials < confidence + 0.05


def test_an_interval_is_that_of_students_t_where_it_must_be():
    """The mean of normal values."""
    values = np.random.default_rng(0).normal(3, 1, 40)
    low, high = bootstrap_interval(np.stack([values, np.ones(40)], 1), ratio, 20_000, 0.95)
    expected = stats.t.interval(0.95, 39, values.mean(), values.std(ddof=1) / np.sqrt(40))
    assert (low, high) == pytest.approx(expected, abs=0.06)
    half = intervals(values[:, None], lambda t: t / 40, Bootstrap(20_000, 0.95, 0))
    assert (half.low[0], half.high[0]) == pytest.approx(
        (low, high), abs=1e-6
    )  # a count that does not vary tells nothing


def test_what_does_not_vary_has_an_interval_of_no_width():
    sizes = np.arange(1.0, 30)
    for of in (ratio, lambda t: np.log(t[:, 0] / t[:, 1])):
        for share in (8, 0.3):  # 0.3 is rounded, and its totals differ in the last bit
            found = intervals(np.stack([share * sizes, sizes], 1), of, Bootstrap(200, 0.95, 0))
            assert found.low == found.value == found.high
    few = intervals(np.array([[1.0], [2.0], [3.0]]), lambda t: t / 3, Bootstrap(400, 0.8, 0))  # one group drawn thrice
    assert np.isfinite([few.low, few.high]).all() and few.low < few.value < few.high


def test_a_paired_difference_is_of_the_same_groups():
    """Two that vary alike: their difference is known far better than either."""
    rng = np.random.default_rng(0)
    size, hard = rng.integers(5, 50, 60), rng.gamma(1, size=60)
    one, two = (size * hard * share * (1 + 0.02 * rng.standard_normal(60)) for share in (0.10, 0.11))
    both = np.stack([one, two, size], 1)
    ratios = lambda t: np.stack([t[:, 0] / t[:, 2], t[:, 1] / t[:, 2], (t[:, 0] - t[:, 1]) / t[:, 2]], 1)  # noqa: E731
    found = intervals(both, ratios, Bootstrap(500, 0.95, 0))
    assert found.high[0] > found.low[1] and found.high[2] < 0


def test_samples_of_their_own_groups_are_drawn_apart():
    """The variance of a difference of two independent means is the sum of theirs."""
    rng = np.random.default_rng(0)
    one, two = rng.normal(3, 1, (60, 1)), rng.normal(1, 2, (30, 1))
    found = intervals([one, two], lambda t: t[:, 0] / 60 - t[:, 1] / 30, Bootstrap(4000, 0.95, 0))
    expected = stats.ttest_ind(one[:, 0], two[:, 0], equal_var=False).confidence_interval(0.95)
    assert (found.low[0], found.high[0]) == pytest.approx((expected.low, expected.high), abs=0.1)


def test_unequal_groups_count_as_fewer():
    assert effective_groups(np.full(30, 7)) == pytest.approx(30)
    assert effective_groups(np.array([1.0, 1, 1, 1, 1000, 0])) == pytest.approx(1, abs=0.01)
    assert effective_groups(np.zeros(3)) == effective_groups(np.zeros(0)) == 0


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
    found = intervals(spoilt, lambda t: np.stack([ratio(t), t[:, 2] / t[:, 1]], 1), Bootstrap(100, 0.9, 0))
    low, high = bootstrap_interval(sums, ratio, 100, 0.9)
    assert (found.low[0], found.high[0]) == pytest.approx((low, high)) and np.isnan([found.low[1], found.high[1]]).all()


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


@pytest.mark.parametrize("layout", [np.asarray, csr_matrix])
def test_rank_scores_are_those_of_mann_and_whitney(layout):
    """With ties, zeros and negative values; scipy's asymptotic p has the same variance up to n / (n - 1)."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random((60, 4)) < 0.5, 0, rng.integers(-3, 6, (60, 4))).astype(float)
    x[:, 3] = 0
    positive = np.stack([np.arange(60) < 20, np.arange(60) % 2 == 0])
    scores = RankScores(layout(x))
    for labels, z, area in zip(positive, scores.z(positive), scores.auroc(positive), strict=True):
        for j in range(3):
            theirs = stats.mannwhitneyu(x[labels, j], x[~labels, j], method="asymptotic", use_continuity=False)
            assert area[j] == pytest.approx(theirs.statistic / (labels.sum() * (~labels).sum()))
            assert 2 * stats.norm.sf(abs(z[j])) == pytest.approx(theirs.pvalue)
        assert z[3] == 0 and area[3] == pytest.approx(0.5)


def test_the_largest_score_of_pure_noise_lies_inside_its_null():
    """n = 462 and 452, as in a published table whose largest effect was that of chance."""
    rng = np.random.default_rng(0)
    positive = (np.arange(914) < 462)[None]
    noise = rng.normal(size=(914, 2000))
    null = RankScores(noise).largest_null(positive, permutations=60)
    largest = np.abs(RankScores(noise).z(positive)).max()
    assert null.min() < largest < null.max() and family_wise_p(np.array(largest), null) > 0.05
    noise[positive[0], 17] += 0.6
    assert np.abs(RankScores(noise).z(positive)).max() > null.max()


def test_family_wise_p_counts_itself_and_ties():
    assert family_wise_p(np.array([5.0, 3.0, 0.0]), np.array([1.0, 2, 3, 4])) == pytest.approx([1 / 5, 3 / 5, 1])


def test_differences_from_the_same_weights_are_paired():
    """Two metrics that vary a lot but always by the same: their difference has no spread."""
    weights = group_weights(40, 200, seed=3)
    assert (weights[0] == 1).all() and (weights.sum(1) == 40).all()
    values = np.random.default_rng(0).normal(0, 5, 40)
    one, two = weights @ values / 40, weights @ (values + 1) / 40
    low, high = interval(one, 0.9)
    assert high - low > 1
    assert interval(two - one, 0.9) == pytest.approx((1, 1))
