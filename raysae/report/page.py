"""`write_report`: a run directory in, one self-contained HTML page and its figures out.

The page puts the decision first and the evidence behind it after, in the order in which a sceptical reader asks. It is
one file without a single outside reference, so that it can be mailed, archived and opened offline (its links to the SAEs'
own pages lead into the run directory); only files of the run directory are read, so that it can be made again at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from raysae.config.load import read_yaml
from raysae.errors import Damaged, UserError
from raysae.files import inside, read_json_if, read_table, write_atomic
from raysae.gates.waivers import in_words
from raysae.report import choice, figures, nulls, probes, risk, sae_page, stability
from raysae.report.budget import budget_rows
from raysae.report.columns import BY_NAME, COLUMNS, cell, interval, is_number, label, show, show_threshold
from raysae.sae.architectures import COEFFICIENTS
from raysae.units import duration, size

KEY_METRICS = ("fvu", "l0", "ce_loss_recovered", "ce_delta", "dead_fraction", "explained_variance", "l2_ratio", "kl")
ORDER = {"completed": 0, "pruned": 1, "diverged": 2, "error": 3}
AXES = ("architecture", "expansion_factor")
NARROW = 2.0
"""An axis whose values span less than this ratio of L0 has not been searched."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html`, `figures/` and the SAEs' pages into a run directory and return the report's path.

    Reads `table.parquet` and `decision.json`, and where they exist `config.yaml`, `curves.parquet`, `ledger.json`,
    `store.json`, and what `stability` and `risk` show. Raises `UserError` if the directory holds no finished run.
    """
    run_dir = Path(run_dir)
    for needed in ("table.parquet", "decision.json"):
        if not (run_dir / needed).exists():
            raise UserError(f"run={run_dir}: has no {needed}; give the folder of a finished sweep")
    table = _ready(_with_ids(run_dir / "table.parquet"))
    curves = read_table(run_dir / "curves.parquet") if (run_dir / "curves.parquet").exists() else None
    config_text = _text(run_dir / "config.yaml")
    config = _config(run_dir / "config.yaml") if config_text.strip() else {}
    decision, ledger, store = (read_json_if(run_dir / f"{name}.json") for name in ("decision", "ledger", "store"))

    lead, role = figures.lead(decision)
    titles = {row["sae_id"]: tooltip(row) for row in figures.records(table)}
    drawn = []
    for name, (title, figure, large) in figures.draw(table, curves, decision).items():
        svg = figures.save(figure, inside(run_dir, "figures"), name)
        drawn.append({"name": name, "title": title, "large": large, "svg": figures.inline(svg, name, title, titles)})

    rows = table_rows(table, decision)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["capitalise"] = lambda text: text[:1].upper() + text[1:]  # Jinja's lowers the rest
    environment.globals.update(show=show, label=label, interval=interval, duration=duration, size=size, plain=_plain)
    shown_criteria = criteria(decision)
    by_sae = {lead: shown_criteria} if lead else {}
    by_sae |= {c["chosen"] or c["closest"]: criteria(c) for c in (decision.get("choices") or {}).values()}
    page = environment.get_template("template.html.j2").render(
        pages=sae_page.write_pages(run_dir, environment, table, curves, decision, by_sae),
        run=run_dir.resolve().name,
        decision=decision,
        waived=in_words(decision),
        lead=lead,
        role=role,
        facts=facts(table, config, store),
        key=key_numbers(table, decision),
        criteria=shown_criteria,
        sites=choice.sites(decision),
        leads=figures.leads(decision),
        looks=choice.looks_in_words(decision),
        null_groups=nulls.groups(decision, table),
        null_metrics=nulls.METRICS,
        probed=probes.read(run_dir),
        probe_scores=probes.SCORES.values(),
        figures=drawn,
        off_scale=figures.off_scale(table),
        columns=[column for column in COLUMNS if table[column.name].notna().any()],
        rows=rows,
        front=sorted((row for row in rows if row["pareto"]), key=lambda row: row["l0"]),
        spans=spans(table),
        narrow=NARROW,
        moves=moves(table),
        inert=inert(table),
        stability=stability.section(run_dir),
        risk=risk.section(run_dir, lead),
        ledger=ledger,
        budget=budget_rows(ledger),
        evaluation=config.get("evaluation") or {},
        dead_windows=sorted(int(tokens) for tokens in table["dead_window_tokens"].dropna().unique()),
        config_text=config_text,
    )
    path = run_dir / "report.html"
    write_atomic(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def tooltip(row: Mapping[str, Any]) -> str:
    """An SAE in three lines, for its mark in a figure."""
    setting = [str(row["architecture"]), f"×{show('expansion_factor', row['expansion_factor'])}"]
    setting += [f"{label(knob)} {show(knob, row[knob])}" for knob in COEFFICIENTS if is_number(row.get(knob))]
    if row["status"] != "completed":
        setting.append(str(row["status"]))
    numbers = [
        f"{label(name)} {show(name, row[name])}"
        for name in ("fvu", "l0", "ce_loss_recovered", "dead_fraction")
        if is_number(row[name])
    ]
    return "\n".join((str(row["sae_id"]), " · ".join(numbers), ", ".join(setting)))


def key_numbers(table: pd.DataFrame, decision: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the decision's SAE scores on validation and, if it was measured there, on test."""
    lead, _ = figures.lead(decision)
    rows = figures.records(table[table["sae_id"] == lead]) if lead else []
    validation = rows[0] if rows else {}
    test = (decision.get("test") or {}).get("metrics") or {}
    numbers = []
    for name in KEY_METRICS:
        if not is_number(validation.get(name)) and not is_number(test.get(name)):
            continue
        of_training = name == "dead_fraction"
        entry = {"label": label(name), "meaning": BY_NAME[name].meaning}
        entry["split"] = "in training" if of_training else "validation"
        for split, metrics in (("validation", validation), ("test", {} if of_training else test)):
            shown = cell(name, metrics)
            entry |= {split: shown["value"] if metrics else "", f"{split}_interval": shown["interval"]}
        numbers.append(entry)
    return numbers


def rests_on(entry: Mapping[str, Any]) -> dict[str, str]:
    """What a criterion's metric rests on, and its groups where it has some."""
    n, groups = entry.get("n"), entry.get("n_groups")
    has_groups = is_number(groups) and groups
    return {"n": f"{n:,}" if is_number(n) else "", "groups": f"{groups:,} groups" if has_groups else ""}


def criteria(decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gate's criteria as shown, with the test split's value beside the validation split's."""
    test = {entry["criterion"]: entry for entry in (decision.get("test") or {}).get("criteria") or ()}
    shown = []
    for entry in decision.get("criteria") or ():
        metric, again = entry["metric"], test.get(entry["criterion"], {})
        shown.append(
            {
                "criterion": entry["criterion"],
                "metric": label(metric),
                "bound": show_threshold(metric, entry.get("op", ""), entry.get("threshold")),
                "whole_interval": entry.get("confidence") == "interval",
                "must_beat": entry.get("must_beat"),
                "baseline": show(metric, entry.get("baseline_value")),
                "value": show(metric, entry.get("value")),
                "interval": interval(metric, entry.get("low"), entry.get("high")),
                **rests_on(entry),
                "mandatory": entry.get("mandatory", True),
                "why": entry.get("why") or "",
                "verdict": entry.get("verdict", ""),
                "split": entry.get("split") or "validation",
                "test_split": again.get("split") or "test",
                "test": show(metric, again.get("value")) if again else "",
                "test_interval": interval(metric, again.get("low"), again.get("high")),
                "test_verdict": again.get("verdict", ""),
            }
        )
    return shown


def table_rows(table: pd.DataFrame, decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per SAE: the decision's first, then the Pareto front by L0, then the others by FVU."""
    leads, rejected = figures.leads(decision), decision.get("rejected") or {}
    order = pd.DataFrame(
        {
            "lead": ~table["sae_id"].isin(list(leads)),
            "status": table["status"].map(ORDER).fillna(len(ORDER)),
            "front": ~table["pareto"],
            "by": np.where(table["pareto"], table["l0"], table["fvu"]),
        }
    )
    rows = figures.records(table.loc[order.sort_values(list(order.columns), kind="stable").index])
    for row in rows:
        reasons = rejected.get(row["sae_id"]) or ()
        row["why_not"] = reasons if isinstance(reasons, str) else "; ".join(map(str, reasons))
        row["role"] = leads.get(row["sae_id"], "")
    return rows


def spans(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For each architecture and expansion factor: how much of L0 and FVU its SAEs reached, and by which settings."""
    done = _measured(table)
    if done.empty:
        return []
    whole = np.log(done["l0"].max() / done["l0"].min()) or 1.0
    shown = []
    for axis in AXES:
        for value, part in done.groupby(axis):
            low, high = part["l0"].min(), part["l0"].max()
            settings = [
                f"{label(knob)} {show(knob, part[knob].min())}–{show(knob, part[knob].max())}"
                for knob in COEFFICIENTS
                if knob in part and part[knob].notna().any()
            ]
            shown.append(
                {
                    "axis": label(axis),
                    "value": show(axis, value),
                    "n": len(part),
                    "l0": f"{show('l0', low)}–{show('l0', high)}",
                    "ratio": high / low,
                    "fvu": f"{show('fvu', part['fvu'].min())}–{show('fvu', part['fvu'].max())}",
                    "settings": "; ".join(settings),
                    "left": 100 * np.log(low / done["l0"].min()) / whole,
                    "width": 100 * np.log(high / low) / whole,
                }
            )
    return shown


def moves(table: pd.DataFrame) -> list[str]:
    """How far the median L0 and FVU move along each axis: small against the spans within means it did little."""
    done, said = _measured(table), []
    for axis, name in (("architecture", "architectures"), ("expansion_factor", "expansion factors"), ("seed", "seeds")):
        medians = done.groupby(axis)[["l0", "fvu"]].median()
        if len(medians) > 1:
            l0, fvu = medians["l0"], medians["fvu"]
            said.append(
                f"Between {name}, the median L0 moves by ×{l0.max() / l0.min():.1f} "
                f"and the median FVU from {show('fvu', fvu.min())} to {show('fvu', fvu.max())}."
            )
    return said


def inert(table: pd.DataFrame) -> list[str]:
    """Axes that did nothing: values of a coefficient at least ×1.5 apart, or different widths, seeds or sites, whose SAEs
    are alike (L0 and FVU within 5%, and seeds identical) wherever all else is the same."""
    done, said = _measured(table), []
    free = [name for name in COEFFICIENTS if name in done]
    fixed = ["site", "architecture", "expansion_factor", "seed"]
    for architecture, part in done.groupby("architecture"):
        for axis in [*free, "expansion_factor", "seed"]:
            others = [name for name in [*fixed, *free] if name != axis and name in part]
            widest, tried = 1.0, 1.0
            for _, same in part.dropna(subset=[axis]).groupby(others, dropna=False):
                if same[axis].nunique() > 1:
                    spread = max(same[name].max() / max(same[name].min(), 1e-12) for name in ("l0", "fvu"))
                    widest = max(widest, spread)
                    apart = same[axis].max() / same[axis].min() if axis in free else 2.0
                    tried = max(tried, apart)
            if tried >= 1.5 and widest <= (1.0 if axis == "seed" else 1.05):
                said.append(
                    f"{label(axis)} did nothing for {architecture}: SAEs that differ in it alone have the same L0 and FVU"
                    + (" to the last digit." if axis == "seed" else f" within {100 * (widest - 1):.1f}%.")
                )
    return said


def facts(table: pd.DataFrame, config: Mapping[str, Any], store: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The run in a line of name and value pairs."""
    model = (store.get("model") or {}).get("name") or (config.get("model") or {}).get("name")
    rows = store.get("rows") or {}
    trained = table.loc[table["status"] == "completed", "tokens"].max()
    counts = table["status"].value_counts()
    found = [
        ("Model", model),
        ("Data", (config.get("data") or {}).get("source")),
        ("Site", ", ".join(sorted(table["site"].dropna().astype(str).unique()))),
        ("SAEs", ", ".join(f"{counts[status]} {status}" for status in sorted(counts.index, key=ORDER.__getitem__))),
        ("Training tokens each", show("tokens", trained) if is_number(trained) else None),
        ("Left out", ", ".join(f"{count:,} {what}" for what, count in (store.get("left_out") or {}).items())),
        ("Too short to find near-duplicates of", _share(store.get("not_compared"))),
        ("Rows stored", ", ".join(f"{split} {count:,}" for split, count in rows.items() if is_number(count))),
    ]
    return [(name, str(value)) for name, value in found if value]


def _share(value: Any) -> str | None:
    return f"{value:.1%} of the examples" if is_number(value) and value > 0 else None


def _ready(table: pd.DataFrame) -> pd.DataFrame:
    """The table with every known column, absent ones empty, and its flags as booleans."""
    absent = [column.name for column in COLUMNS if column.name not in table]
    table = pd.concat([table, pd.DataFrame(np.nan, index=table.index, columns=absent)], axis=1)
    for column in COLUMNS:
        if column.kind != "text":
            table[column.name] = pd.to_numeric(table[column.name], errors="coerce").astype(float)
    table["sae_id"] = table["sae_id"].astype(str)
    table["status"] = table["status"].astype(str) if "status" in table else "completed"
    table["status"] = table["status"].where(table["status"].isin(list(ORDER)), "error")
    for flag in ("pareto", "passes_gate"):
        table[flag] = [value is True or value == 1 for value in table[flag]] if flag in table else False
    return table.reset_index(drop=True)


def _measured(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["status"] == "completed") & np.isfinite(table["l0"]) & (table["l0"] > 0)]


def _plain(value: Any) -> str:
    """A cell's value for sorting: a number as it is, nothing where there is none."""
    return repr(float(value)) if is_number(value) else "" if value is None or value != value else str(value)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError:
        raise Damaged(path, "is not UTF-8") from None


def _config(file: Path) -> dict[str, Any]:
    try:
        return read_yaml("config", file)
    except UserError as error:
        raise Damaged(file, str(error).partition(f"{file} ")[2]) from None


def _with_ids(path: Path) -> pd.DataFrame:
    table = read_table(path)
    if not {"sae_id", "site"} <= set(table):
        raise Damaged(path, "has no column sae_id and site")
    return table
