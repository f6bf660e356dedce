"""Which SAE of each site, and why not the others: the gate first, then the trade that its `choose` states."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import pandas as pd

from raysae.evaluate.nulls import ELSEWHERE
from raysae.gates import trade
from raysae.gates.criteria import FACTS, OF_TRAINING, Difference, Gate, Verdict, apply, kind_of, passes, voids
from raysae.gates.trade import Candidate, Subtract
from raysae.gates.waivers import Waiver
from raysae.sweep.collect import CONFIGURATION

BEST_FIRST = ("go", "incomplete", "no-go")


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


def _no_difference(a: str, b: str, of: Any) -> None:
    """Where no two SAEs can be subtracted."""


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
    controls: Mapping[str, Mapping[str, Any]] | None = None,
    waiver: Waiver | None = None,
    subtract: Subtract = _no_difference,
    sites: Sequence[str] = (),
) -> Choice:
    """Apply `gate` to each completed SAE of the table, and at each site rank those that pass by its `choose`.

    controls as in `criteria.apply`. subtract: tells a difference from noise, of an SAE and a null, and of SAEs of
    one seed. sites: their order; those of the table, where none are given.
    """
    rows = {str(row["sae_id"]): row for row in table.to_dict("records")}
    completed = table[table["status"] == "completed"]
    waived = waiver.criteria if waiver else ()
    apart = by_metric(subtract)
    verdicts = {str(i): apply(gate, rows[str(i)], controls, waived, apart) for i in completed["sae_id"]}
    rejected = {i: _rejected(rows[i], verdicts.get(i)) for i in rows}
    outcomes = {}
    for site in sites or sorted(table["site"].dropna().unique()):
        here = completed[completed["site"] == site]
        candidates = _candidates(here, gate, verdicts, rejected)
        tied = trade.noise(gate.choose, subtract)
        ranked = trade.rank(candidates, tied)
        closest, ties = None, dict[str, str]()
        if not ranked:
            closest = min(map(str, here["sae_id"]), key=lambda i: _miss(verdicts[i]), default=None)
        for other in ranked[1:]:
            ties[other.sae_id] = _tie(ranked[0], other, tied)
            better = "" if ties[other.sae_id] else f"{ranked[0].sae_id} is better: "
            rejected[other.sae_id] = [f"passes, but {better}{_why_not(gate, ranked[0], other, ties[other.sae_id])}"]
        if ranked:
            del rejected[ranked[0].sae_id]
        outcomes[str(site)] = SiteChoice(ranked, ties, closest)
    return Choice(outcomes, pareto_front(completed), verdicts, rejected)


def by_metric(subtract: Subtract) -> Difference:
    """What two SAEs differ by in a metric, as `criteria.apply` asks for it."""

    def difference(one: str, other: str, metric: str) -> tuple[float, float, float] | None:
        try:
            return subtract(one, other, lambda m: m[metric])
        except KeyError:  # a metric without resamples
            return None

    return difference


def _candidates(
    here: pd.DataFrame, gate: Gate, verdicts: Mapping[str, list[Verdict]], rejected: dict[str, list[str]]
) -> list[Candidate]:
    """The configurations of a site of which at least half of the seeds pass; of the other SAEs that pass, the reasons."""

    def failed(sae_id: str) -> int:
        return sum(v.verdict == "fail" for v in verdicts[sae_id])

    candidates = []
    for _, seeds in here.groupby([name for name in CONFIGURATION if name in here], dropna=False, sort=True):
        passing = [str(i) for i in seeds["sae_id"] if passes(verdicts[str(i)])]
        if not passing:
            continue
        if not trade.scores(gate.choose, seeds).map(math.isfinite).all(axis=None):
            reason = f"passes, but its L0 or {trade.ERRORS[gate.choose.error]} was not measured"
        elif 2 * len(passing) < len(seeds):
            reason = f"passes, but {len(seeds) - len(passing)} of the {len(seeds)} seeds of its configuration do not"
        else:
            found = trade.candidate(gate.choose, seeds, set(passing), failed)
            candidates.append(found)
            reason = f"passes, but {found.sae_id} stands for its configuration: nearer to the mean of its seeds"
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


def _why_not(gate: Gate, best: Candidate, other: Candidate, tie: str) -> str:
    """Why `other` is not chosen, in words; `tie` why a score does not tell."""
    if not tie:
        return f"{trade.candidate_in_words(gate.choose, other)}; {trade.against(gate.choose, best, other)}"
    if other.failed != best.failed:
        settled = f"{best.sae_id} fails fewer advisory criteria ({best.failed}, not {other.failed})"
    elif other.d_sae != best.d_sae:
        settled = f"{best.sae_id} is smaller (d_sae {best.d_sae}, not {other.d_sae})"
    else:
        settled = f"{best.sae_id} scores less, as good and as small"
    return f"{settled}; {trade.name(gate.choose)} is a tie ({tie})"


def _miss(verdicts: list[Verdict]) -> tuple[int, float]:
    failed = [v for v in verdicts if v.stops]
    return len(failed), sum(v.shortfall for v in failed)


def _missed(verdicts: list[Verdict]) -> list[str]:
    return [v.reason for v in verdicts if v.stops]


def _rejected(row: Mapping[str, Any], verdicts: list[Verdict] | None) -> list[str]:
    if verdicts is None:
        return [": ".join(str(part) for part in (row["status"], row["status_reason"]) if part)]
    return _missed(verdicts)


# ----------------------------------------------------------------------------------------------------------------------
# The decision


def decide(
    gate: Gate,
    gate_path: str,
    choice: Choice,
    controls: Mapping[str, Mapping[str, Any]],
    tests: Mapping[str, Mapping[str, Any]],
    waiver: Waiver | None = None,
    basis: Mapping[str, Any] | None = None,
    validation: Mapping[str, Mapping[str, Any]] | None = None,
    looks: Mapping[str, Any] | None = None,
    subtract: Subtract = _no_difference,
    on_test: tuple[Mapping[str, Mapping[str, Any]], Subtract] | None = None,
) -> dict[str, Any]:
    """The content of decision.json.

    controls: metrics of the nulls by id. A gate that lets one pass that was made beside the chosen SAE, at its L0, cannot
    tell the SAE from it and decides nothing. That holds for PCA and ICA too, which may be good codes: a gate that they pass
    has not shown what the SAE is for, and one in which a mandatory criterion says `must_beat: pca` they cannot pass. SAEs
    of an untrained model are the exception: they were measured on other activations, perhaps easier ones, so that they pass
    says nothing against the SAE, only what the gate does not show; the reason then says so.

    subtract: as in `choose`, of the validation split. on_test: nulls as they were measured on the test split, where the
    choices are held against them, and what subtracts there; the validation split's where there is none.

    tests, validation: the chosen SAEs' metrics on the two splits, by id. basis: the earlier run that this one builds on, as
    `read_basis` gives it. looks: how often the test rows were looked at, as `looks.look` gives it.

    `choices` holds the outcome of each site. At the top (`chosen`, `closest`, `criteria`, `test`) stands the main one: the
    first site that is a go, else the first with a choice, else the one whose closest misses least.
    """
    waived = waiver.criteria if waiver else ()
    apart = by_metric(subtract)
    controls_seen = {
        i: {"metrics": dict(m), "passes_gate": passes(apply(gate, m, controls, waived, apart))}
        for i, m in controls.items()
    }
    passing = [i for i, seen in controls_seen.items() if seen["passes_gate"]]
    test_controls, test_apart = (
        (on_test[0], by_metric(on_test[1])) if on_test else (controls, by_metric(_no_difference))
    )
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    choices, order = dict[str, dict[str, Any]](), dict[str, tuple]()
    for site, outcome in choice.sites.items():
        test = tests.get(outcome.chosen or "")
        again = apply(gate, test, test_controls, waived, test_apart) if test is not None else []
        void = [i for i in passing if controls[i].get("site") in (None, site)]
        void = [i for i in void if voids(i, controls[i], [outcome.chosen] if outcome.chosen else [])]
        verdict, reason = _verdict(gate, gate_path, choice, outcome, void, test, again, waived)
        shown = outcome.chosen or outcome.closest
        choices[site] = {
            "verdict": verdict,
            "reason": reason,
            "chosen": outcome.chosen,
            "closest": outcome.closest,
            **_defence(gate, outcome, (validation or {}).get(outcome.chosen or ""), test),
            "criteria": _records(choice.verdicts[shown], "validation", "table.parquet", now) if shown else [],
            "test": {"metrics": dict(test), "criteria": _records(again, "test", "decision.json", now)}
            if test is not None
            else None,
        }
        missed = _miss(choice.verdicts[outcome.closest]) if outcome.closest else (0, 0.0)
        order[site] = (BEST_FIRST.index(verdict), outcome.chosen is None, shown is None, missed)
    main = choices[min(order, key=order.__getitem__)] if order else _NOTHING
    reason = main["reason"]
    if len(choices) > 1:
        count = sum(c["verdict"] == main["verdict"] for c in choices.values())
        reason = " ".join(
            [f"{main['verdict']} at {count} of {len(choices)} sites."]
            + [f"{site}: {c['verdict']}. {c['reason']}" for site, c in choices.items()]
        )
    for name in (i for i in passing if not voids(i, controls[i], choice.chosen)):
        if kind_of(name) == ELSEWHERE:
            reason += f" {name} passes the gate as well: nothing in it depends on what the model has learnt."
        else:
            reason += f" The null {name} passes the gate as well, at an L0 or size that was not chosen."
    return {
        "verdict": main["verdict"],
        "reason": reason,
        "gate": {"name": gate.name, "path": gate_path},
        "basis": dict(basis) if basis else None,
        "waiver": waiver.model_dump(mode="json") if waiver else None,
        "assumptions": [a.model_dump() for a in gate.assumptions],
        "unmeasured": [{**u.model_dump(), "waived": u.subject in waived} for u in gate.unmeasured],
        "choose": gate.choose.model_dump(),
        "selection": trade.rule_in_words(gate.choose),
        "chosen": main["chosen"],
        "closest": main["closest"],
        "choices": choices,
        "looks": dict(looks) if looks else None,
        "criteria": main["criteria"],
        "test": main["test"],
        "controls": controls_seen,
        "test_controls": {i: dict(m) for i, m in on_test[0].items()} if on_test else {},
        "pareto": choice.front,
        "rejected": choice.rejected,
        "decided_at": now,
    }


_NOTHING: dict[str, Any] = {
    "verdict": "no-go", "reason": "No SAE was trained.", "chosen": None, "closest": None, "criteria": [], "test": None
}  # fmt: skip


def _verdict(
    gate: Gate, gate_path: str, choice: Choice, outcome: SiteChoice, void: list[str], test: Mapping[str, Any] | None,
    on_test: list[Verdict], waived: Collection[str],
) -> tuple[str, str]:  # fmt: skip
    """The verdict at a site, and its reason."""
    chosen = outcome.chosen
    if chosen is None:
        reason = "No SAE passes the gate. "
        if outcome.closest:
            return (
                "no-go",
                f"{reason}Closest is {outcome.closest}: {'; '.join(_missed(choice.verdicts[outcome.closest]))}.",
            )
        return "no-go", f"{reason}None finished its training{_stopped(choice)}."
    if void:
        beat = f", or ask it to be beaten (must_beat: {kind_of(void[0])})" if kind_of(void[0]) else ""
        return "no-go", f"The gate is void: the null {void[0]} passes it. Tighten {gate_path}{beat}."
    if test is None:
        return "no-go", f"{chosen} passes on the validation split but was not measured on the test split."
    if not passes(on_test):
        missed = "; ".join(_missed(on_test))
        return "no-go", f"{chosen} passes on the validation split but not on the test split: {missed}."
    spared = any(v.verdict == "waived" for v in [*choice.verdicts[chosen], *on_test])
    carried = {v.metric: split_of(v.metric, "test") for v in on_test}
    again = ", ".join(f"{metric} (of {split})" for metric, split in carried.items() if split != "test")
    reason = (
        f"{chosen} meets every mandatory criterion{' that is not waived' if spared else ''} on the validation split and "
        f"on the test split{f', where {again} is not measured again' if again else ''}."
    )
    missing = [u.subject for u in gate.unmeasured if u.mandatory and u.subject not in waived]
    if missing:
        return "incomplete", f"{reason} But what the gate is about is not measured: {'; '.join(missing)}."
    return "go", reason


def _stopped(choice: Choice) -> str:
    """How SAEs ended that did not finish, with the reasons, the most frequent first."""
    reasons = pd.Series([reason for of in choice.rejected.values() for reason in of]).value_counts()
    said = [f"{count} {reason}" for reason, count in reasons.items()]
    return ": " + "; ".join(said[:3] + [f"{len(said) - 3} more reasons"] * (len(said) > 3)) if said else ""


def _defence(
    gate: Gate, outcome: SiteChoice, validation: Mapping[str, Any] | None, test: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What was traded for what: the candidates with their scores in words, the runner-up, both splits side by side."""
    rule, ranked = gate.choose, outcome.ranked
    splits = {"validation": validation, "test": test}
    return {
        "score": {
            "name": trade.name(rule),
            **{split: _score(gate, metrics) if metrics is not None else None for split, metrics in splits.items()},
        },
        "traded": trade.traded(rule, ranked[0], ranked) if ranked else [],
        "runner_up": {
            "sae_id": ranked[1].sae_id,
            "why": _why_not(gate, ranked[0], ranked[1], outcome.ties[ranked[1].sae_id]),
        }
        if len(ranked) > 1
        else None,
        "candidates": [
            {
                "sae_id": c.sae_id,
                "seeds": list(c.saes),
                "score": c.scores[-1 if rule.rule == "matched_l0" else 0],
                "in_words": trade.candidate_in_words(rule, c),
                "failed_advisory": c.failed,
                "d_sae": c.d_sae,
                "tie": outcome.ties.get(c.sae_id) or None,
            }
            for c in ranked
        ],
    }


def _score(gate: Gate, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The score of one SAE on one split."""
    rule = gate.choose
    if metrics.get("l0") is None or metrics.get(rule.error) is None:
        return None
    l0, error = float(metrics["l0"]), float(metrics[rule.error])
    value = float(trade.shown(rule, pd.DataFrame({"l0": [l0], rule.error: [error]})).iloc[0])
    return {"value": value, "in_words": trade.score_in_words(rule, l0, error)}


def split_of(metric: str, split: str) -> str:
    """Where the value of a metric is from that stands among those of a split."""
    if metric.startswith("stability_"):
        return "validation"
    return "training" if metric in OF_TRAINING else "config" if metric in FACTS else split


def _records(verdicts: list[Verdict], split: str, evidence_path: str, decided_at: str) -> list[dict[str, Any]]:
    """Verdicts as gate records, each with the split that its value is from and the file of the run that holds it."""
    return [
        {**v.record(), "split": split_of(v.metric, split), "evidence_path": evidence_path, "decided_at": decided_at}
        for v in verdicts
    ]
