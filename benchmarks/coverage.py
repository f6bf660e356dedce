"""How often 95% intervals hold the truth, by number of groups and their sizes; and false latents under shuffled labels.

    python benchmarks/coverage.py [--trials 1000] [--resamples 500] [--shuffles 200]

Groups (documents, problems) are drawn from populations whose ratio is known: FVU-like, error over variance, and like CE
recovered, loss regained over loss. Groups differ more, and more skewed, than validation stories did for a TopK SAE of
stories260K (110 groups, standard deviations of 0.12 in log FVU, 15% in the loss of ablation, 30 to 65% in the splice's).
Sizes: all the same; geometric, as chance cuts a text; long-tailed, Pareto of index 2.1, whose variance barely exists.

Beside what raysae uses (`statistics.intervals`, bootstrap-t): percentiles of the same resamples, and BCa. `refused`:
how often the groups count as fewer than gates ask for (`criteria.ENOUGH_GROUPS`), so that no interval decides.

Second, the latents that `probes.effects` calls of a class when the labels are shuffled: sparse, heavy-tailed latents,
classes of 62, 30 and 8%. The share of shuffles with any is the false discovery rate, for then each is false.

Exit status 1 where an interval that is not refused covers less than TARGET, or FDR is above 0.05, by two standard errors.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import scipy.stats
from scipy import sparse

from raysae.evaluate.linear import Settings
from raysae.evaluate.probes import FALSE_DISCOVERIES, effects
from raysae.evaluate.statistics import Bootstrap, effective_groups, intervals
from raysae.gates.criteria import ENOUGH_GROUPS

CONFIDENCE, TARGET = 0.95, 0.93
GROUPS = (5, 10, 20, 50, 200)
SIZES = ("equal", "geometric", "long-tailed")
POPULATION = 4_000_000
AT_ONCE = 50
"""Samples that share their resamples."""


def sizes(kind: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Rows of each of n groups, about 50 on average."""
    if kind == "equal":
        return np.full(n, 50.0)
    return rng.geometric(1 / 50, n).astype(float) if kind == "geometric" else np.ceil(26 * (1 + rng.pareto(2.1, n)))


def fvu(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Squared error and variance [groups, 2]; what rows differ by shrinks with their number."""
    variance = rows * rng.lognormal(0, 0.15, len(rows))
    share = 0.1 * rng.lognormal(0, 0.3, len(rows)) * np.exp(0.5 * rng.standard_normal(len(rows)) / np.sqrt(rows))
    return np.stack([variance * share, variance], 1)


def ce_recovered(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """CE of ablation less CE of the splice, and less that of the model [groups, 2], summed over tokens."""
    lost = rows * 5 * np.maximum(1 + 0.2 * rng.standard_normal(len(rows)), 0.1)
    kept = rows * 0.15 * rng.gamma(2, 1 / 2, len(rows)) + 0.3 * np.sqrt(rows) * rng.standard_normal(len(rows))
    return np.stack([lost - kept, lost], 1)


def ratio(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0] / totals[..., 1]


def ends_by_method(sums: np.ndarray, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Ends [2, samples] by method, of samples [samples, groups, 2] that share their resamples.

    That the first is what `statistics.intervals` gives is asserted for one sample.
    """
    a, b = sums[..., 0], sums[..., 1]
    groups, tails = a.shape[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    weights = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), resamples).T.astype(float)
    value = a.sum(1) / b.sum(1)
    drawn = (a @ weights) / (b @ weights)  # [samples, resamples]
    spread = (a * a) @ weights - 2 * drawn * ((a * b) @ weights) + drawn**2 * ((b * b) @ weights)
    own = np.sqrt(groups / (groups - 1) * np.square(a - value[:, None] * b).sum(1)) / b.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (drawn - value[:, None]) / (np.sqrt(groups / (groups - 1) * np.maximum(spread, 0)) / (b @ weights))
    high, low = np.quantile(np.nan_to_num(t, posinf=1e300, neginf=-1e300), tails, axis=1, method="inverted_cdf")
    found = {"bootstrap-t": np.stack([value - low * own, value - high * own])}
    expected = intervals(sums[0], ratio, Bootstrap(resamples, CONFIDENCE, seed))
    assert np.allclose(found["bootstrap-t"][:, 0], [expected.low[0], expected.high[0]], rtol=1e-3), (found, expected)

    found["percentile"] = np.quantile(drawn, tails, axis=1)
    left_out = (a.sum(1, keepdims=True) - a) / (b.sum(1, keepdims=True) - b)  # the jackknife
    skew = left_out.mean(1, keepdims=True) - left_out
    acceleration = (skew**3).sum(1) / (6 * np.square(skew).sum(1) ** 1.5)
    bias = scipy.stats.norm.ppf((drawn < value[:, None]).mean(1).clip(1 / resamples, 1 - 1 / resamples))
    at = [bias + (bias + z) / (1 - acceleration * (bias + z)) for z in scipy.stats.norm.ppf(tails)]
    rank = (scipy.stats.norm.cdf(at) * (resamples - 1)).round().astype(int)  # Efron 1987
    found["BCa"] = np.take_along_axis(np.sort(drawn, axis=1), rank.T, axis=1).T
    return found


METHODS = ("bootstrap-t", "percentile", "BCa")


def coverage(trials: int, resamples: int) -> bool:
    """Prints the table; whether every interval that would decide covers as it should."""
    error = np.sqrt(TARGET * (1 - TARGET) / trials)
    print(f"Coverage of {CONFIDENCE:.0%} intervals, {trials} samples, {resamples} resamples each (se {error:.3f})\n")
    print("| ratio | sizes | groups | " + " | ".join(METHODS) + " | width, bootstrap-t / percentile | refused |")
    print("|" + "---|" * (5 + len(METHODS)))
    right = True
    for population in (fvu, ce_recovered):
        for kind in SIZES:
            rng = np.random.default_rng(0)
            truth = float(ratio(population(sizes(kind, rng, POPULATION), rng).sum(0)))
            for groups in GROUPS:
                rows = sizes(kind, rng, trials * groups).reshape(trials, groups)
                sums = population(rows.ravel(), rng).reshape(trials, groups, 2)
                refused = np.array([effective_groups(of) < ENOUGH_GROUPS for of in rows])
                parts = [ends_by_method(sums[i : i + AT_ONCE], resamples, i) for i in range(0, trials, AT_ONCE)]
                ends = {name: np.concatenate([part[name] for part in parts], axis=1) for name in METHODS}
                hits = {name: (low <= truth) & (truth <= high) for name, (low, high) in ends.items()}
                wider = np.divide(*(np.median(ends[name][1] - ends[name][0]) for name in METHODS[:2]))
                row = [population.__name__, kind, str(groups), *(f"{hits[name].mean():.3f}" for name in METHODS)]
                print(f"| {' | '.join([*row, f'{wider:.2f}', f'{refused.mean():.2f}'])} |", flush=True)
                decides = hits["bootstrap-t"][~refused]
                if len(decides) > trials / 10:
                    right &= bool(decides.mean() >= TARGET - 2 * np.sqrt(TARGET * (1 - TARGET) / len(decides)))
    return right


def false_latents(shuffles: int) -> bool:
    """Prints how many shuffles of the labels have any latent of a class; whether these are as few as they should be."""
    rng = np.random.default_rng(0)
    rows, latents, classes = 300, 512, ["a", "b", "c"]
    fires = rng.random((rows, latents)) < rng.beta(0.3, 3, latents)
    x = sparse.csr_matrix(fires * rng.lognormal(0, 1, (rows, latents)))
    y = rng.choice(3, rows, p=[0.62, 0.3, 0.08])
    settings = [Settings(seed=i) for i in range(shuffles)]
    found = [effects(x, rng.permutation(y), np.arange(rows), classes, s, permutations=199) for s in settings]
    rate = float(np.mean([f["discoveries"] > 0 for f in found]))
    least = scipy.stats.kstest([f["p"] for f in found], "uniform").pvalue
    bound = FALSE_DISCOVERIES + 2 * np.sqrt(FALSE_DISCOVERIES * (1 - FALSE_DISCOVERIES) / shuffles)
    print(
        f"\nLatents of a class under shuffled labels, {shuffles} shuffles of {rows} groups, {latents} latents: false "
        f"discovery rate {rate:.3f} (at most {bound:.3f}); least p against uniform, Kolmogorov-Smirnov p {least:.2f}\n"
    )
    return rate <= bound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="samples a cell (default 1000)")
    parser.add_argument("--resamples", type=int, default=500, help="behind each interval (default 500)")
    parser.add_argument("--shuffles", type=int, default=200, help="shuffles of the labels (default 200)")
    args = parser.parse_args()
    controlled = false_latents(args.shuffles)
    return 0 if coverage(args.trials, args.resamples) and controlled else 1


if __name__ == "__main__":
    sys.exit(main())
