"""Which SAE of each site, and why not the others: the gate first, then the trade that its `choose` states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from raysae.gates import trade
from raysae.gates.criteria import Choose, Gate, Subtract, Verdict, judge, passes
from raysae.gates.trade import Candidate
from raysae.gates.waivers import Waiver
from raysae.sweep.collect import CONFIGURATION


@dataclass(frozen=True)
class SiteChoice:
    """The outcome at one site, on the validation split."""

    ranked: list[Candidate]
    """Configurations that pass, the chosen one first, the runner-up second."""
    ties: dict[str, str]
    """Why a candidate cannot be told from the chosen one, by sae_id."""
    closest: str | None
    """The SAE that misses least, where none passes."""

    @property
    def chosen(self) -> str | None:
        return self.ranked[0].sae_id if self.ranked else None


@dataclass(frozen=True)
class Choice:
    """The outcome on the validation split."""

    sites: dict[str, SiteChoice]
    front: list[str]
    verdicts: dict[str, list[Verdict]]
    rejected: dict[str, list[str]]
    """Why each other SAE was not chosen."""

    @property
    def chosen(self) -> list[str]:
        """One SAE of each site that has one."""
        return [s.chosen for s in self.sites.values() if s.chosen is not None]


def pareto_front(table: pd.DataFrame) -> list[str]:
    """sae_ids that no other SAE of the same site beats in both FVU and L0, by rising L0. NaN rows are never on it."""
    front: list[str] = []
    for _, rows in table.dropna(subset=["fvu", "l0"]).groupby("site", sort=True):
        best = math.inf
        for row in rows.sort_values(["l0", "fvu", "d_sae"], kind="stable").itertuples():
            if row.fvu < best:
                front.append(str(row.sae_id))
                best = float(row.fvu)
    return front


def choose(
    table: pd.DataFrame,
    gate: Gate,
    nulls: Mapping[str, Mapping[str, Any]] | None = None,
    waiver: Waiver | None = None,
    subtract: Subtract | None = None,
    sites: Sequence[str] = (),
) -> Choice:
    """Apply `gate` to each completed SAE of the table, and at each site rank those that pass by its `choose`.

    nulls as in `criteria.judge`. subtract: tells a difference from noise, of an SAE and a null, and of SAEs of one seed.
    sites: their order; those of the table, where none are given. ValueError for a gate that chooses nothing.
    """
    rule = gate.choose
    if rule is None:
        raise ValueError(f"gate {gate.name} chooses no SAE")
    rows = {str(row["sae_id"]): row for row in table.to_dict("records")}
    completed = table[table["status"] == "completed"]
    waived = waiver.criteria if waiver else ()
    verdicts = {str(i): judge(gate, rows[str(i)], nulls, waived, subtract) for i in completed["sae_id"]}
    rejected = {i: _rejected(rows[i], verdicts.get(i)) for i in rows}
    tied = trade.noise(rule, subtract)
    outcomes = {}
    for site in sites or sorted(table["site"].dropna().unique()):
        here = completed[completed["site"] == site]
        ranked = trade.rank(_candidates(here, rule, verdicts, rejected), tied)
        closest, ties = None, dict[str, str]()
        if not ranked:
            closest = min(map(str, here["sae_id"]), key=lambda i: miss(verdicts[i]), default=None)
        for other in ranked[1:]:
            ties[other.sae_id] = _tie(ranked[0], other, tied)
            better = "" if ties[other.sae_id] else f"{ranked[0].sae_id} is better: "
            rejected[other.sae_id] = [f"passes, but {better}{why_not(rule, ranked[0], other, ties[other.sae_id])}"]
        if ranked:
            del rejected[ranked[0].sae_id]
        outcomes[str(site)] = SiteChoice(ranked, ties, closest)
    return Choice(outcomes, pareto_front(completed), verdicts, rejected)


def _candidates(
    here: pd.DataFrame, rule: Choose, verdicts: Mapping[str, list[Verdict]], rejected: dict[str, list[str]]
) -> list[Candidate]:
    """The configurations of a site of which at least half of the seeds pass; of the other SAEs that pass, the reasons."""

    def failed(sae_id: str) -> int:
        return sum(v.verdict == "fail" for v in verdicts[sae_id])

    candidates = []
    for _, seeds in here.groupby([name for name in CONFIGURATION if name in here], dropna=False, sort=True):
        passing = [str(i) for i in seeds["sae_id"] if passes(verdicts[str(i)])]
        if not passing:
            continue
        if not trade.scores(rule, seeds).map(math.isfinite).all(axis=None):
            reason = f"passes, but its L0 or {trade.ERRORS[rule.error]} was not measured"
        elif 2 * len(passing) < len(seeds):
            reason = f"passes, but {len(seeds) - len(passing)} of the {len(seeds)} seeds of its configuration do not"
        else:
            candidates.append(trade.candidate(rule, seeds, set(passing), failed))
            reason = (
                f"passes, but {candidates[-1].sae_id} stands for its configuration: nearer to the mean of its seeds"
            )
        rejected |= {i: [reason] for i in passing}
    return candidates


def _tie(best: Candidate, other: Candidate, tied: trade.Tied) -> str:
    """Why `other` cannot be told from `best`; empty where a score tells them apart."""
    words = ""
    for k in range(len(best.scores)):
        first, second = (best, other) if best.scores[k] <= other.scores[k] else (other, best)
        words = tied(first, second, k)
        if not words:
            break
    return words


def why_not(rule: Choose, best: Candidate, other: Candidate, tie: str) -> str:
    """Why `other` is not chosen, in words; `tie` why a score does not tell."""
    if not tie:
        return f"{trade.candidate_in_words(rule, other)}; {trade.against(rule, best, other)}"
    if other.failed != best.failed:
        settled = f"{best.sae_id} fails fewer advisory criteria ({best.failed}, not {other.failed})"
    elif other.d_sae != best.d_sae:
        settled = f"{best.sae_id} is smaller (d_sae {best.d_sae}, not {other.d_sae})"
    else:
        settled = f"{best.sae_id} scores less, as good and as small"
    return f"{settled}; {trade.name(rule)} is a tie ({tie})"


def miss(verdicts: list[Verdict]) -> tuple[int, float]:
    """How many mandatory criteria are missed, and by how much."""
    failed = [v for v in verdicts if v.stops]
    return len(failed), sum(v.shortfall for v in failed)


def _rejected(row: Mapping[str, Any], verdicts: list[Verdict] | None) -> list[str]:
    if verdicts is None:
        return [": ".join(str(part) for part in (row["status"], row["status_reason"]) if part)]
    return [v.reason for v in verdicts if v.stops]
