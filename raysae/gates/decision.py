"""The content of decision.json: of a sweep, which chooses an SAE at each site, and of a study, which chooses none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from typing import Any

import pandas as pd

from raysae.evaluate.nulls import ELSEWHERE
from raysae.gates import trade
from raysae.gates.criteria import Choose, Gate, Subtract, Verdict, judge, passes, voids
from raysae.gates.metrics import split_of
from raysae.gates.select import Choice, SiteChoice, miss, why_not
from raysae.gates.waivers import Waiver

BEST_FIRST = ("go", "incomplete", "no-go")
_NO_SAE: dict[str, Any] = {
    "verdict": "no-go", "reason": "No SAE was trained.", "chosen": None, "closest": None, "criteria": [], "test": None
}  # fmt: skip


def settle(
    gate: Gate,
    gate_path: str,
    metrics: Mapping[str, Any],
    nulls: Mapping[str, Mapping[str, Any]] | None = None,
    waiver: Waiver | None = None,
    basis: Mapping[str, Any] | None = None,
    split: str = "test",
    evidence_path: str = "",
) -> dict[str, Any]:
    """The content of decision.json where metrics by name are judged and nothing is chosen.

    nulls as in `judge`; one that passes the gate makes it void. split: that the metrics are of. evidence_path: the file of
    the run that holds them.
    """
    waived, now = waiver.criteria if waiver else (), _now()
    verdicts = judge(gate, metrics, nulls, waived)
    nulls_seen = _judged(gate, nulls or {}, waived, None)
    void = [i for i, seen in nulls_seen.items() if seen["passes_gate"] and voids(i, seen["metrics"], ())]
    if void:
        verdict, reason = "no-go", _void(gate_path, void[0], nulls_seen[void[0]]["metrics"])
    elif not passes(verdicts):
        verdict, reason = "no-go", f"The gate is not met on the {split} split: {_missed(verdicts)}."
    else:
        spared = any(v.verdict == "waived" for v in verdicts)
        reason = f"Every mandatory criterion{' that is not waived' if spared else ''} is met on the {split} split."
        verdict, reason = _complete(gate, reason, waived)
    return {
        "verdict": verdict,
        "reason": reason,
        **_stated(gate, gate_path, waiver, basis),
        "criteria": _records(verdicts, split, evidence_path, now),
        "controls": nulls_seen,
        "decided_at": now,
    }


def decide(
    gate: Gate,
    gate_path: str,
    choice: Choice,
    nulls: Mapping[str, Mapping[str, Any]],
    tests: Mapping[str, Mapping[str, Any]],
    waiver: Waiver | None = None,
    basis: Mapping[str, Any] | None = None,
    validation: Mapping[str, Mapping[str, Any]] | None = None,
    looks: Mapping[str, Any] | None = None,
    subtract: Subtract | None = None,
    on_test: tuple[Mapping[str, Mapping[str, Any]], Subtract] | None = None,
) -> dict[str, Any]:
    """The content of a sweep's decision.json.

    nulls: their metrics by id. A gate that lets one pass that was made beside the chosen SAE, at its L0, cannot tell the
    SAE from it and decides nothing. That holds for PCA and ICA too, which may be good codes: a gate that they pass has not
    shown what the SAE is for, and one in which a mandatory criterion says `must_beat: pca` they cannot pass. SAEs of an
    untrained model are the exception: they were measured on other activations, perhaps easier ones, so that they pass says
    nothing against the SAE, only what the gate does not show; the reason then says so.

    subtract: as in `choose`, of the validation split. on_test: nulls as they were measured on the test split, where the
    choices are held against them, and what subtracts there; the validation split's where there is none.

    tests, validation: the chosen SAEs' metrics on the two splits, by id. basis: the earlier run that this one builds on, as
    `read_basis` gives it. looks: how often the test rows were looked at, as `looks.look` gives it.

    `choices` holds the outcome of each site. At the top (`chosen`, `closest`, `criteria`, `test`) stands the main one: the
    first site that is a go, else the first with a choice, else the one whose closest misses least.
    """
    rule = gate.choose
    if rule is None:
        raise ValueError(f"gate {gate.name} chooses no SAE")
    waived, now = waiver.criteria if waiver else (), _now()
    nulls_seen = _judged(gate, nulls, waived, subtract)
    passing = [i for i, seen in nulls_seen.items() if seen["passes_gate"]]
    test_nulls, test_subtract = on_test or (nulls, None)
    choices, order = dict[str, dict[str, Any]](), dict[str, tuple[Any, ...]]()
    for site, outcome in choice.sites.items():
        chosen, shown = outcome.chosen, outcome.chosen or outcome.closest
        test = tests.get(chosen or "")
        again = judge(gate, test, test_nulls, waived, test_subtract) if test is not None else []
        here = [i for i in passing if nulls[i].get("site") in (None, site)]
        void = [i for i in here if voids(i, nulls[i], [chosen] if chosen else [])]
        if chosen is not None and void:
            verdict, reason = "no-go", _void(gate_path, void[0], nulls[void[0]])
        else:
            verdict, reason = _verdict(gate, choice, outcome, test, again, waived)
        choices[site] = {
            "verdict": verdict,
            "reason": reason,
            "chosen": chosen,
            "closest": outcome.closest,
            **_defence(rule, outcome, (validation or {}).get(chosen or ""), test),
            "criteria": _records(choice.verdicts[shown], "validation", "table.parquet", now) if shown else [],
            "test": {"metrics": dict(test), "criteria": _records(again, "test", "decision.json", now)}
            if test is not None
            else None,
        }
        missed = miss(choice.verdicts[outcome.closest]) if outcome.closest else (0, 0.0)
        order[site] = (BEST_FIRST.index(verdict), chosen is None, shown is None, missed)
    main = choices[min(order, key=order.__getitem__)] if order else _NO_SAE
    reason = main["reason"]
    if len(choices) > 1:
        count = sum(c["verdict"] == main["verdict"] for c in choices.values())
        reason = " ".join(
            [f"{main['verdict']} at {count} of {len(choices)} sites."]
            + [f"{site}: {c['verdict']}. {c['reason']}" for site, c in choices.items()]
        )
    for name in (i for i in passing if not voids(i, nulls[i], choice.chosen)):
        if nulls[name].get("kind") == ELSEWHERE:
            reason += f" {name} passes the gate as well: nothing in it depends on what the model has learnt."
        else:
            reason += f" The null {name} passes the gate as well, at an L0 or size that was not chosen."
    return {
        "verdict": main["verdict"],
        "reason": reason,
        **_stated(gate, gate_path, waiver, basis),
        "choose": rule.model_dump(),
        "selection": trade.rule_in_words(rule),
        "chosen": main["chosen"],
        "closest": main["closest"],
        "choices": choices,
        "looks": dict(looks) if looks else None,
        "criteria": main["criteria"],
        "test": main["test"],
        "controls": nulls_seen,
        "test_controls": {i: dict(null) for i, null in on_test[0].items()} if on_test else {},
        "pareto": choice.front,
        "rejected": choice.rejected,
        "decided_at": now,
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _judged(
    gate: Gate, nulls: Mapping[str, Mapping[str, Any]], waived: Collection[str], subtract: Subtract | None
) -> dict[str, dict[str, Any]]:
    """Each null's metrics, and whether the gate lets it pass."""
    return {
        i: {"metrics": dict(null), "passes_gate": passes(judge(gate, null, nulls, waived, subtract))}
        for i, null in nulls.items()
    }


def _stated(gate: Gate, gate_path: str, waiver: Waiver | None, basis: Mapping[str, Any] | None) -> dict[str, Any]:
    """What was said before anything was measured."""
    waived = waiver.criteria if waiver else ()
    return {
        "gate": {"name": gate.name, "path": gate_path},
        "basis": dict(basis) if basis else None,
        "waiver": waiver.model_dump(mode="json") if waiver else None,
        "assumptions": [a.model_dump() for a in gate.assumptions],
        "unmeasured": [{**u.model_dump(), "waived": u.subject in waived} for u in gate.unmeasured],
    }


def _void(gate_path: str, name: str, null: Mapping[str, Any]) -> str:
    kind = null.get("kind")
    beat = f", or ask it to be beaten (must_beat: {kind})" if kind else ""
    return f"The gate is void: the null {name} passes it. Tighten {gate_path}{beat}."


def _missed(verdicts: list[Verdict]) -> str:
    return "; ".join(v.reason for v in verdicts if v.stops)


def _complete(gate: Gate, reason: str, waived: Collection[str]) -> tuple[str, str]:
    """The verdict and reason of what meets all criteria: incomplete while something mandatory is not measured."""
    missing = [u.subject for u in gate.unmeasured if u.mandatory and u.subject not in waived]
    if missing:
        return "incomplete", f"{reason} But what the gate is about is not measured: {'; '.join(missing)}."
    return "go", reason


def _verdict(
    gate: Gate, choice: Choice, outcome: SiteChoice, test: Mapping[str, Any] | None, again: list[Verdict],
    waived: Collection[str],
) -> tuple[str, str]:  # fmt: skip
    """The verdict at a site whose gate is not void, and its reason. again: the choice, judged on the test split."""
    chosen, closest = outcome.chosen, outcome.closest
    if chosen is None:
        why = (
            f"Closest is {closest}: {_missed(choice.verdicts[closest])}."
            if closest
            else f"None finished its training{_stopped(choice)}."
        )
        return "no-go", f"No SAE passes the gate. {why}"
    if test is None:
        return "no-go", f"{chosen} passes on the validation split but was not measured on the test split."
    if not passes(again):
        return "no-go", f"{chosen} passes on the validation split but not on the test split: {_missed(again)}."
    spared = any(v.verdict == "waived" for v in [*choice.verdicts[chosen], *again])
    carried = {v.metric: split_of(v.metric, "test") for v in again}
    kept = ", ".join(f"{metric} (of {split})" for metric, split in carried.items() if split != "test")
    reason = (
        f"{chosen} meets every mandatory criterion{' that is not waived' if spared else ''} on the validation split and "
        f"on the test split{f', where {kept} is not measured again' if kept else ''}."
    )
    return _complete(gate, reason, waived)


def _stopped(choice: Choice) -> str:
    """How SAEs ended that did not finish, with the reasons, the most frequent first."""
    reasons = pd.Series([reason for each in choice.rejected.values() for reason in each]).value_counts()
    said = [f"{count} {reason}" for reason, count in reasons.items()]
    return ": " + "; ".join(said[:3] + [f"{len(said) - 3} more reasons"] * (len(said) > 3)) if said else ""


def _defence(
    rule: Choose, outcome: SiteChoice, validation: Mapping[str, Any] | None, test: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What was traded for what: the candidates with their scores in words, the runner-up, both splits side by side."""
    ranked = outcome.ranked
    return {
        "score": {"name": trade.name(rule), "validation": _score(rule, validation), "test": _score(rule, test)},
        "traded": trade.traded(rule, ranked[0], ranked) if ranked else [],
        "runner_up": {
            "sae_id": ranked[1].sae_id,
            "why": why_not(rule, ranked[0], ranked[1], outcome.ties[ranked[1].sae_id]),
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


def _score(rule: Choose, metrics: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The score of one SAE on one split."""
    if metrics is None or metrics.get("l0") is None or metrics.get(rule.error) is None:
        return None
    l0, error = float(metrics["l0"]), float(metrics[rule.error])
    value = float(trade.shown(rule, pd.DataFrame({"l0": [l0], rule.error: [error]})).iloc[0])
    return {"value": value, "in_words": trade.score_in_words(rule, l0, error)}


def _records(verdicts: list[Verdict], split: str, evidence_path: str, decided_at: str) -> list[dict[str, Any]]:
    """Verdicts as gate records, each with the split that its value is from and the file of the run that holds it."""
    return [
        {**v.record(), "split": split_of(v.metric, split), "evidence_path": evidence_path, "decided_at": decided_at}
        for v in verdicts
    ]
