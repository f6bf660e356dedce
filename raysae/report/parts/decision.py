"""The decision: the verdict with its reason, the numbers behind it, and the run in a line. The head of a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from raysae.files import read_json_if
from raysae.gates.metrics import split_of
from raysae.gates.waivers import in_words
from raysae.report import read as run
from raysae.report.columns import BY_NAME, cell, is_number, label, show
from raysae.report.page import Part
from raysae.report.parts.choice import sites

KEY_METRICS = ("fvu", "l0", "ce_loss_recovered", "ce_delta", "dead_fraction", "explained_variance", "l2_ratio", "kl")


def read(run_dir: Path) -> dict[str, Any]:
    decision, table, config = run.decision(run_dir), run.table(run_dir), run.config(run_dir)
    (lead, role), name, pages = run.lead(decision), run_dir.resolve().name, run.pages(table)
    return {
        "page_title": f"{decision['verdict']}: {name}",
        "links": [(pages[lead], f"The {role} SAE and its features")] if lead in pages else [],
        "run": name,
        "decision": decision,
        "chooses": "chosen" in decision,
        "lead": lead,
        "role": role,
        "waived": in_words(decision),
        "key": key_numbers(table, decision),
        "sites": sites(decision),
        "looks": looks_in_words(decision),
        "confidence": (config.get("evaluation") or {}).get("confidence"),
        "facts": facts(table, config, read_json_if(run_dir / "store.json")),
    }


def key_numbers(table: pd.DataFrame, decision: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the decision's SAE scores on validation and, if it was measured there, on test."""
    validation = next(iter(run.records(table[table["sae_id"] == run.lead(decision)[0]])), {})
    test = (decision.get("test") or {}).get("metrics") or {}
    numbers = []
    for name in KEY_METRICS:
        if not is_number(validation.get(name)) and not is_number(test.get(name)):
            continue
        split = split_of(name, "validation")
        entry = {"label": label(name), "meaning": BY_NAME[name].meaning}
        entry["split"] = f"in {split}" if split == "training" else split
        for of_split, metrics in (("validation", validation), ("test", {} if split == "training" else test)):
            shown = cell(name, metrics)
            entry |= {of_split: shown["value"] if metrics else "", f"{of_split}_interval": shown["interval"]}
        numbers.append(entry)
    return numbers


def looks_in_words(decision: Mapping[str, Any]) -> str:
    """How often the test rows were looked at; empty where they were not."""
    looks = decision.get("looks")
    if not looks:
        return ""
    if looks["number"] == 1:
        return "The test rows were looked at once: by this decision."
    earlier = list(dict.fromkeys(f"{e['by']} of {e['run']}" for e in looks["earlier"]))
    who = ", ".join(earlier[-5:]) + (f" and {len(earlier) - 5} more" if len(earlier) > 5 else "")
    return (
        f"This is look {looks['number']} at these test rows by runs below one output folder (before it: {who}). Each look "
        "makes it likelier that something does well there by luck."
    )


def facts(table: pd.DataFrame, config: Mapping[str, Any], store: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The run in a line of name and value pairs."""
    model = (store.get("model") or {}).get("name") or (config.get("model") or {}).get("name")
    trained = table.loc[table["status"] == "completed", "tokens"].max()
    counts, short = table["status"].value_counts(), store.get("not_compared") or 0.0
    rows = (store.get("rows") or {}).items()
    pairs = [
        ("Model", model),
        ("Data", (config.get("data") or {}).get("source")),
        ("Site", ", ".join(sorted(table["site"].dropna().astype(str).unique()))),
        ("SAEs", ", ".join(f"{counts[status]} {status}" for status in run.ORDER if status in counts)),
        ("Training tokens each", show("tokens", trained) if is_number(trained) else None),
        ("Left out", ", ".join(f"{count:,} {what}" for what, count in (store.get("left_out") or {}).items())),
        ("Too short to find near-duplicates of", f"{short:.1%} of the examples" if short > 0 else None),
        ("Rows stored", ", ".join(f"{split} {count:,}" for split, count in rows if is_number(count))),
    ]  # fmt: skip
    return [(name, str(value)) for name, value in pairs if value]


PART = Part("decision", "", Path(__file__).with_name("decision.html.j2"), read)
