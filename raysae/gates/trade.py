"""The trade between sparsity and faithfulness: what a gate's `choose` ranks by, what is noise in it, and both in words.

A rule gives one score or several, less is better, each after the ties of the one before. The units are configurations:
SAEs that differ in their seed alone are one, with the mean of their scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from raysae.gates.criteria import Choose, Subtract

NEAR = 0.1
"""An L0 that is within this share of the one asked for matches it."""
SAME = 0.01
"""Scores that differ by less than this share are the same, however sure the difference is."""
ERRORS = {"fvu": "FVU", "ce_delta": "ΔCE"}
Tied = Callable[["Candidate", "Candidate", int], str]
"""Whether a candidate cannot be told from another that is better in a score, and why (words, or nothing)."""


@dataclass(frozen=True)
class Candidate:
    """A configuration that passes the gate."""

    sae_id: str
    """The seed that stands for it."""
    saes: tuple[str, ...]
    """Its completed seeds."""
    scores: tuple[float, ...]
    """Means over the seeds."""
    spread: tuple[float, ...]
    """Standard deviations over the seeds (n - 1); nan with one."""
    failed: int
    """Advisory criteria that `sae_id` fails."""
    d_sae: int
    l0: float
    error: float
    """L0 and error, means over the seeds."""


def scores(rule: Choose, measured: pd.DataFrame) -> pd.DataFrame:
    """Columns of scores, the first decides, for rows with `l0` and the rule's error. An error below 0 counts as 0."""
    l0, error = measured["l0"].astype(float), measured[rule.error].astype(float).clip(lower=0.0)
    if rule.rule == "knee":
        return pd.DataFrame({name(rule): error * l0**rule.a})
    if rule.rule == "sparsest":
        return pd.DataFrame({"L0": l0, ERRORS[rule.error]: error})
    if rule.rule == "most_faithful":
        return pd.DataFrame({ERRORS[rule.error]: error, "L0": l0})
    with np.errstate(divide="ignore"):
        apart = np.log(l0 / float(rule.matched_l0 or math.nan)).abs()
    return pd.DataFrame({"mismatch": (apart - math.log1p(NEAR)).clip(lower=0.0), ERRORS[rule.error]: error})


def name(rule: Choose) -> str:
    """The number that is shown as the score."""
    power = "L0" if rule.a == 1 else f"L0^{rule.a:g}"
    return {"knee": f"{ERRORS[rule.error]} · {power}", "sparsest": "L0"}.get(rule.rule, ERRORS[rule.error])


def shown(rule: Choose, measured: pd.DataFrame) -> pd.Series:
    """The score that is shown: what decides, but for matched_l0, where it is the error."""
    return scores(rule, measured)[name(rule)]


def rank(candidates: Sequence[Candidate], tied: Tied) -> list[Candidate]:
    """The best, the best of the others, and the rest by their scores.

    The best is what the rule's scores leave, each among the ties of the one before; of ties in all, the one with fewer
    failed advisory criteria, then the smaller.
    """
    left, first = list(candidates), list[Candidate]()
    while left and len(first) < 2:
        among = left
        for k in range(len(left[0].scores)):
            best = min(among, key=lambda c: (c.scores[k], c.sae_id))
            among = [c for c in among if c is best or tied(best, c, k)]
        first.append(min(among, key=lambda c: (c.failed, c.d_sae, c.scores, c.sae_id)))
        left = [c for c in left if c is not first[-1]]
    return first + sorted(left, key=lambda c: (c.scores, c.sae_id))


def noise(rule: Choose, subtract: Subtract | None) -> Tied:
    """`tied` of `rank`: by the standard deviation over seeds, else the interval of the paired difference by group."""

    def tied(best: Candidate, other: Candidate, k: int) -> str:
        apart = other.scores[k] - best.scores[k]
        if apart <= SAME * abs(best.scores[k]):
            return f"less than {SAME:.0%} apart"
        spreads = [c.spread[k] for c in (best, other) if math.isfinite(c.spread[k])]
        if spreads:
            deviation = math.sqrt(sum(s**2 for s in spreads) / len(spreads))
            return f"inside the standard deviation over seeds, {deviation:.2g}" if apart <= deviation else ""
        paired = subtract(other.sae_id, best.sae_id, lambda m: scores(rule, m).iloc[:, k]) if subtract else None
        return f"interval of the difference [{paired[1]:.2g}, {paired[2]:.2g}]" if paired and paired[1] <= 0 else ""

    return tied


def candidate(rule: Choose, seeds: pd.DataFrame, passing: set[str], failed: Callable[[str], int]) -> Candidate:
    """The candidate that the completed seeds of a configuration make; `passing` are those that may be handed over.

    The one nearest to the mean of the scores stands for it: not the luckiest. Of two as near, the one that scores worse.
    """
    scored = scores(rule, seeds)
    mean = scored.mean()
    apart = ((scored - mean) / mean.abs().clip(lower=1e-12)).pow(2).sum(axis=1).round(9)
    order = sorted(
        (i for i in scored.index if str(seeds.at[i, "sae_id"]) in passing),
        key=lambda i: (apart[i], [-x for x in scored.loc[i]], str(seeds.at[i, "sae_id"])),
    )
    sae_id = str(seeds.at[order[0], "sae_id"])
    return Candidate(
        sae_id,
        tuple(map(str, seeds["sae_id"])),
        tuple(map(float, mean)),
        tuple(map(float, scored.std())),
        failed(sae_id),
        int(seeds.at[order[0], "d_sae"]),
        float(seeds["l0"].mean()),
        float(seeds[rule.error].mean()),
    )


# ----------------------------------------------------------------------------------------------------------------------
# In words


def rule_in_words(rule: Choose) -> str:
    error = ERRORS[rule.error]
    ask = f"twice the L0 must at least {'halve' if rule.a == 1 else f'divide by {2**rule.a:.3g}'} {error}"
    least = {
        "knee": f"the least {name(rule)}: {ask}",
        "sparsest": f"the least L0, then the least {error}",
        "most_faithful": f"the least {error}, then the least L0",
        "matched_l0": f"the least {error} at L0 {rule.matched_l0:g} (within {NEAR:.0%}, else the nearest)"
        if rule.matched_l0
        else "",
    }[rule.rule]
    return (
        f"At each site, of the configurations that meet every mandatory criterion on the validation split: {least}. "
        "SAEs that differ in their seed alone are one configuration, with their mean score; at least half of them must "
        "pass, and the one nearest to the mean is handed over. Differences inside the noise (the standard deviation over "
        f"seeds; else the paired bootstrap by group; or {SAME:.0%}) are ties, broken by fewer failed advisory criteria, "
        "then by smaller d_sae. The choice is measured on the test split, and must meet the criteria there as well."
    )


def score_in_words(rule: Choose, l0: float, error: float) -> str:
    """Such as `FVU 0.0682 × L0 4.01 = 0.273`."""
    parts = f"{ERRORS[rule.error]} {error:.3g}", f"L0 {l0:.3g}"
    if rule.rule == "knee":
        power = "" if rule.a == 1 else f"^{rule.a:g}"
        return f"{parts[0]} × {parts[1]}{power} = {max(error, 0.0) * l0**rule.a:.3g}"
    return ", ".join(reversed(parts) if rule.rule == "sparsest" else parts)


def candidate_in_words(rule: Choose, c: Candidate) -> str:
    words = score_in_words(rule, c.l0, c.error)
    if len(c.saes) == 1:
        return words
    k = 1 if rule.rule == "matched_l0" else 0
    if rule.rule == "knee":  # the mean of products is not the product of means
        words = f"{name(rule)} {c.scores[0]:.3g}, mean of {words.rpartition(' = ')[0].replace(' × ', ' and ')}"
    return f"{words}, over {len(c.saes)} seeds (standard deviation of {name(rule)} {c.spread[k]:.2g})"


def against(rule: Choose, chosen: Candidate, other: Candidate) -> str:
    """What `other` asks for what it gives, against the chosen one."""
    l0, error = _times(other.l0, chosen.l0), _times(other.error, chosen.error)
    of_l0 = f"L0 {l0 or f'{other.l0:.3g}'}"
    of_error = f"{ERRORS[rule.error]} {error or f'{other.error:.3g}'}"
    if (l0 == "×1" or other.l0 >= chosen.l0) and other.error >= chosen.error:
        return f"better in neither, {of_l0}, {of_error}"
    if rule.rule == "knee" and l0 and error:
        enough = f"×{(other.l0 / chosen.l0) ** -rule.a:.3g}"
        if other.l0 >= chosen.l0:
            return f"{of_l0} for {of_error}, where {enough} or less would pay"
        return f"{of_error} for {of_l0}, where up to {enough} would pay"
    if rule.rule == "matched_l0" and other.scores[0] > chosen.scores[0]:
        return f"L0 {other.l0:.3g} is farther from {rule.matched_l0:g}"
    return f"{of_l0}, {of_error}" if rule.rule == "sparsest" else f"{of_error}, {of_l0}"


def traded(rule: Choose, chosen: Candidate, others: Sequence[Candidate]) -> list[str]:
    """What the choice gives up against the sparsest and the most faithful that pass."""
    error, said = ERRORS[rule.error], []
    sparsest = min(others, key=lambda c: (c.l0, c.error), default=chosen)
    faithful = min(others, key=lambda c: (c.error, c.l0), default=chosen)
    for what, best in (("sparsest", sparsest), ("most faithful", faithful)):
        if best.l0 < chosen.l0 if what == "sparsest" else best.error < chosen.error:
            times = [f" ({t})" if t else "" for t in (_times(best.l0, chosen.l0), _times(best.error, chosen.error))]
            numbers = f"L0 {best.l0:.3g}{times[0]}, {error} {best.error:.3g}{times[1]}"
            said.append(f"The {what} that passes, {best.sae_id}: {numbers}.")
    return said


def _times(value: float, of: float) -> str:
    """Such as `×2.01`; nothing where there is no ratio."""
    return f"×{value / of:.3g}" if value > 0 and of > 0 else ""


def iso(rule: Choose, metrics: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray] | None:
    """The error at each L0 [n] that would score as these metrics do; None where the line is no function of L0."""
    if rule.rule == "knee":
        score = max(float(metrics[rule.error]), 0.0) * float(metrics["l0"]) ** rule.a
        return lambda l0: score / l0**rule.a
    if rule.rule == "most_faithful":
        return lambda l0: np.full_like(l0, float(metrics[rule.error]))
    return None
