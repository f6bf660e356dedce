"""`write_pages`: one self-contained page per completed SAE, `saes/<sae-id>/index.html`, with its feature cards.

The cards of 10,000 latents are 60 MB of JSON. A page holds each example's text once, as indices into a list of pieces, and
a context as a place in it with the activations that are not zero; a script makes rows and cards when they are looked at.
All text enters the page as JSON and the document as text, never as markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from raysae.errors import Damaged
from raysae.files import inside, plain, read_json
from raysae.report import read as run
from raysae.report.columns import COLUMNS, cell, decimals, is_number, label, show
from raysae.report.page import environment, write_text
from raysae.report.parts.gate import criteria

FULL_SIZE = 12_000_000
"""Bytes of cards above which a page shows fewer contexts of each; all are in cards.jsonl."""
SHOWN_CONTEXTS = (50, 5, 3, 1)
SETTING = (
    "architecture", "expansion_factor", "d_sae", "l1_coefficient", "k", "target_l0", "l0_coefficient", "site", "seed",
    "learning_rate", "tokens", "unique_tokens", "train_seconds",
)  # fmt: skip
CARD_NUMBERS = (
    "density", "active_rows", "mean", "max", "n_contexts", "n_examples", "nearest_latent", "nearest_cosine",
    "token_agreement", "token_agreement_active", "token_agreement_null", "coherence", "coherence_active", "coherence_null",
)  # fmt: skip
MEANINGS = {
    "token_agreement": ("Same token", "share of pairs of its top contexts that are the same token"),
    "coherence": ("Coherence", "mean cosine between the activations of its top contexts, less the training mean"),
    "token_agreement_active": ("Same token, random contexts", "the same over random tokens on which it fires"),
    "coherence_active": ("Coherence, random contexts", "the same over random tokens on which it fires"),
}


def write_pages(run_dir: Path) -> None:
    """Write a page for each completed SAE of a run. `features/` beside a page gives it its cards."""
    table, curves, decision = run.table(run_dir), run.curves(run_dir), run.decision(run_dir)
    roles, template = run.leads(decision), environment().get_template("sae_page.html.j2")
    judged = {run.lead(c)[0]: criteria(c) for c in (decision, *(decision.get("choices") or {}).values())}
    addresses = run.pages(table)
    for row in run.records(table[(table["status"] == "completed") & table["sae_id"].isin(list(addresses))]):
        sae_id = row["sae_id"]
        directory = inside(run_dir, "saes", sae_id)
        directory.mkdir(parents=True, exist_ok=True)
        summary, cards, drawn = _features(directory)
        mine = curves[curves["sae_id"] == sae_id].sort_values("tokens") if curves is not None else pd.DataFrame()
        page = template.render(
            run=run_dir.resolve().name,
            sae_id=sae_id,
            decision=decision,
            role=roles.get(sae_id),
            row=row,
            reasons=run.reasons(decision, sae_id),
            criteria=judged.get(sae_id, []),
            setting=[(label(name), show(name, row[name])) for name in SETTING if _given(row.get(name))],
            metrics=[
                {"label": column.label, **cell(column.name, row), "meaning": column.meaning}
                for column in COLUMNS
                if column.name not in SETTING and is_number(row.get(column.name))
            ],
            curves=[
                (chart(mine["tokens"].tolist(), mine[name].tolist(), "training tokens", label(name)), label(name))
                for name in ("fvu", "l0")
                if name in mine and mine[name].notna().any()
            ],
            summary=summary,
            purities=_purities(summary),
            drawn=drawn,
            cards=cards,
        )
        write_text(directory / "index.html", page)


def compact(cards: Iterator[Mapping[str, Any]], contexts: int) -> dict[str, Any]:
    """Cards as a page holds them, with at most so many contexts of each kind.

    `numbers`: a list per name, by latent. `labels`: per kind of label and latent [label, purity, entropy, base rate, null],
    or null. `histograms`, `top`, `random`: by latent; a context is [example, position, first position, tokens, then pairs
    of a token's number and the latent's activation on it]. `examples`: [id, first position, pieces], `pieces`: texts; -1
    is a token that no context shows.
    """
    pieces: dict[str, int] = {}
    examples: dict[str, dict[int, int]] = {}
    numbers: dict[str, list[Any]] = {name: [] for name in CARD_NUMBERS}
    labels: dict[str, list[Any]] = {}
    by_latent: dict[str, list[Any]] = {"histograms": [], "top": [], "random": []}
    order: dict[str, int] = {}

    def placed(context: Mapping[str, Any]) -> list[Any]:
        name, first = context["example_id"], context["first"]
        text = examples.setdefault(name, {})
        for position, piece in enumerate(context["tokens"], start=first):
            text[position] = pieces.setdefault(piece, len(pieces))
        pairs = [x for i, value in enumerate(context["activations"]) if value for x in (i, _short(value))]
        return [order.setdefault(name, len(order)), context["position"], first, len(context["tokens"]), *pairs]

    for count, card in enumerate(cards):
        for name in CARD_NUMBERS:
            numbers[name].append(_short(card.get(name)))
        for kind in [key.removeprefix("label_") for key in card if key.startswith("label_")]:
            entries = labels.setdefault(kind, [])
            entries += [None] * (count - len(entries))
            shown = [_short(card.get(f"{name}_{kind}")) for name in ("purity", "entropy", "base_rate")]
            entries.append([card[f"label_{kind}"], *shown, _short(card.get(f"purity_{kind}_null"))])
        by_latent["histograms"].append(card["histogram"] if card.get("max") else [])
        for kind in ("top", "random"):
            by_latent[kind].append([placed(context) for context in card[f"{kind}_contexts"][:contexts]])
    for entries in labels.values():
        entries += [None] * (len(by_latent["top"]) - len(entries))
    texts = []
    for name in order:
        text = examples[name]
        texts.append([name, min(text), [text.get(i, -1) for i in range(min(text), max(text) + 1)]])
    return {"numbers": numbers, "labels": labels, **by_latent, "examples": texts, "pieces": list(pieces)}


def script_json(value: Any) -> str:
    """JSON that may stand in a <script>: no `<` is left that could end it or open a comment."""
    text = json.dumps(plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in ("<", "\u2028", "\u2029"):
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def chart(x: list[float], y: list[float], x_label: str, y_label: str) -> str:
    """A line of a few points as an SVG that costs no plotting library: a sweep has hundreds of pages."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if is_number(a) and is_number(b) and abs(b) != float("inf")]
    if not points:
        return ""
    left, right, top, bottom = 52, 310, 14, 150
    x_end = max(a for a, _ in points) or 1
    low, high = min(0.0, *(b for _, b in points)), max(b for _, b in points) or 1
    places = [
        (left + (right - left) * a / x_end, bottom - (bottom - top) * (b - low) / (high - low or 1)) for a, b in points
    ]
    marks = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{x:g}: {y:.4g}</title></circle>'
                    for (a, b), (x, y) in zip(places, points, strict=True))  # fmt: skip
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    return (
        f'<svg viewBox="0 0 320 186" role="img" aria-label="{escape(y_label)} over {escape(x_label)}" class="curve">'
        f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="var(--faint)"/>'
        f'<polyline points="{line}" fill="none" stroke="var(--link)" stroke-width="2"/><g fill="var(--link)">{marks}</g>'
        f'<g fill="currentColor" font-size="11"><text x="{left - 5}" y="{top + 4}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{left - 5}" y="{bottom}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{right}" y="{bottom + 15}" text-anchor="end">{x_end:,.0f}</text>'
        f'<text x="{(left + right) / 2}" y="{bottom + 31}" text-anchor="middle">{escape(x_label)}</text></g></svg>'
    )


def _features(directory: Path) -> tuple[dict[str, Any], str, str]:
    """features.json, the cards for the page and the drawn density histogram; empty where features were not measured."""
    from raysae.report import figures

    source = directory / "features"
    if not (source / "features.json").exists():
        return {}, "", ""
    summary = read_json(source / "features.json")
    for contexts in SHOWN_CONTEXTS:
        try:
            with (source / "cards.jsonl").open(encoding="utf-8") as file:
                cards = script_json({**compact(map(json.loads, file), contexts), "rows": summary["rows"]})
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise Damaged(source / "cards.jsonl", "does not hold a card per line") from None
        if len(cards) < FULL_SIZE:
            break
    title = "Latents by firing density"
    svg = figures.save(figures.densities(summary["density_histogram"]), directory / "figures", "density")
    return summary, cards, figures.inline(svg, "density", title, {})


def _purities(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The means over latents beside what random rows and an untrained SAE give."""
    shown = []
    untrained = summary.get("untrained") or {}
    for name, entry in (summary.get("means") or {}).items():
        kind = name.removeprefix("purity_")
        title, meaning = MEANINGS.get(
            name, (f"Purity: {kind}", f"share of its top contexts that have the most common {kind.replace('_', ' ')}")
        )
        other = untrained.get(name) or {}
        shown.append(
            {
                "label": title,
                "meaning": meaning,
                "of_sae": decimals(entry["value"], entry.get("low"), entry.get("high")),
                "of_untrained": decimals(other.get("value"), other.get("low"), other.get("high")),
                "null": decimals(entry["null"])["value"],
                "n": f"{entry['n']:,}",
            }
        )
    return shown


def _short(value: Any) -> Any:
    """A number with three significant digits, whole ones as integers."""
    if not isinstance(value, float):
        return value
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded == int(rounded) else rounded


def _given(value: Any) -> bool:
    return is_number(value) or (isinstance(value, str) and value != "")
