"""One function per figure, each from the run's table to a matplotlib `Figure`; `draw` makes all that have data.

Figures are `Figure` objects, not pyplot state: nothing to close, any thread, no display. A mark carries its SAE's id as
its gid, so that `inline` can turn a saved SVG into a piece of the page: ids made unique, a `<title>` per mark, text and
axes in the page's own ink (dark mode), nothing that points outside. Saved files keep a white background for papers.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from raysae.files import inside, write_atomic
from raysae.gates import trade
from raysae.gates.criteria import Choose
from raysae.report.columns import is_number, label, show_threshold
from raysae.report.read import lead, leads, records
from raysae.sae.architectures import COEFFICIENTS

INK, FAINT, PAPER = "#22252b", "#8d939e", "#ffffff"
RAMP = LinearSegmentedColormap.from_list("raysae", ["#3f7fd9", "#9a6fd0", "#d9638f", "#e8913a"])  # on white and black
PLATE = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
MARKERS = {
    "relu": "o", "topk": "s", "batchtopk": "D", "jumprelu": "v", "gated": "P", "matryoshka": "h", "abstopk": "X",
    "p_anneal": "<", "jumprelu_l0": ">", "jumprelu_tanh": "d", "relu_unit_norm": "p",
}  # fmt: skip
DASHES = {"relu": "-", "topk": (0, (4, 1.5)), "batchtopk": (0, (1, 1)), "jumprelu": (0, (4, 1.5, 1, 1.5))}
PLOTTED = ("completed", "pruned")
FVU_TOP = 1.3
"""FVU above 1 is worse than predicting the mean; what lies far above is left off the scale, not squeezed in."""
SMALL, LARGE = (5.2, 4.1), (6.2, 4.9)


class Drawn(NamedTuple):
    title: str
    figure: Figure
    large: bool = False


def against(table: pd.DataFrame, decision: Mapping[str, Any], x: str, y: str) -> Figure:
    """A metric against L0, or against the knob that sets an architecture's sparsity (one of COEFFICIENTS): every SAE with
    its interval, the gate's bounds, the chosen SAE. Of FVU against L0 the Pareto front, and of what was traded against L0
    what would have scored as well."""
    is_pareto = (x, y) == ("l0", "fvu")
    x_label = "L0: active latents per token (log)" if x == "l0" else f"{label(x)} (log)"
    y_label = "FVU: share of variance unexplained" if is_pareto else label(y)
    figure, axes = _axes(x_label, y_label, LARGE if is_pareto else SMALL)
    _log(axes, "x", *("y" if y == "l0" else ""))
    if is_pareto and "pareto" in table:
        front = _plotted(table, x, y).query("pareto == True")
        for _, part in front.groupby("site"):
            ordered = part.sort_values("l0")
            axes.plot(ordered["l0"], ordered["fvu"], color=FAINT, linewidth=1.2, zorder=1)
    _marks(axes, table, decision, x, y)
    return _finish(figure, axes, table, decision, x, y, more=_iso(axes, table, decision, y) if x == "l0" else [])


def against_expansion(table: pd.DataFrame, decision: Mapping[str, Any], metric: str) -> Figure:
    """FVU or L0 at each expansion factor; the architectures stand side by side."""
    figure, axes = _axes("Expansion factor: d_sae / d_in", label(metric))
    widths = _widths(table)
    if metric == "l0":
        _log(axes, "y")
    places = table.assign(_place=table.get("expansion_factor", np.nan))
    architectures = sorted(table["architecture"].unique(), key=lambda a: [*MARKERS, a].index(a))
    shift = {a: 0.24 * (i - (len(architectures) - 1) / 2) for i, a in enumerate(architectures)}
    places["_place"] = [
        widths.index(width) + shift.get(architecture, 0.0) if width in widths else np.nan
        for width, architecture in zip(places["_place"], places["architecture"], strict=True)
    ]
    _marks(axes, places, decision, "_place", metric)
    axes.set_xticks(range(len(widths)), [f"{width:g}" for width in widths])
    axes.set_xlim(-0.6, max(len(widths), 1) - 0.4)
    return _finish(figure, axes, table, decision, "expansion_factor", metric)


def training(curves: pd.DataFrame, table: pd.DataFrame, decision: Mapping[str, Any], metric: str) -> Figure:
    """FVU or L0 of each SAE on a fixed validation sample over its training tokens, one point per rung."""
    figure, axes = _axes("Training tokens", f"{label(metric)} on a sample of validation")
    if metric == "l0":
        _log(axes, "y")
    axes.xaxis.set_major_formatter(FuncFormatter(_tokens))
    colours, rows = _colours(table), {row["sae_id"]: row for row in records(table)}
    for sae_id, part in curves.groupby("sae_id"):
        if sae_id not in rows:
            continue
        row, line = rows[sae_id], part.sort_values("tokens")
        values = line[metric].where(np.isfinite(line[metric]) & ((line[metric] > 0) | (metric != "l0")))
        is_lead = sae_id == lead(decision)[0]
        style: dict[str, Any] = {"linewidth": 1.1, "alpha": 0.75 if row["status"] == "completed" else 0.3, "zorder": 2}
        if is_lead:
            style = {"linewidth": 2.6, "alpha": 1.0, "zorder": 4}
        style |= {"linestyle": DASHES.get(row["architecture"], ":"), "marker": "." if len(line) < 3 else None}
        colour = colours.get(row.get("expansion_factor"), FAINT)
        axes.plot(line["tokens"], values, color=colour, gid=f"sae:{sae_id}", **style)
    return _finish(figure, axes, table, decision, "tokens", metric, lines=True)


def densities(histogram: Mapping[str, Any]) -> Figure:
    """Latents by the log10 of their firing density: edges, counts, and how many never fired."""
    figure, axes = _axes("Share of tokens on which a latent fires (log)", "Latents")
    edges = np.asarray(histogram["edges"], float)
    axes.stairs(histogram["counts"], edges, fill=True, color=RAMP(0.0), alpha=0.85)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda power, _: f"{10**power:.3g}"))
    if histogram["never"]:
        axes.set_title(f"{histogram['never']:,} never fired", fontsize=9, color=INK, loc="right")
    return figure


def draw(table: pd.DataFrame, curves: pd.DataFrame | None, decision: Mapping[str, Any]) -> dict[str, Drawn]:
    """Every figure that has something to show, by file name; the Pareto plot always."""
    figures = {"pareto": Drawn("FVU against L0", against(table, decision, "l0", "fvu"), large=True)}
    for metric in ("fvu", "l0"):
        if len(_plotted(table, "expansion_factor", metric)):
            title, figure = f"{label(metric)} against the expansion factor", against_expansion(table, decision, metric)
            figures[f"{metric}_by_expansion"] = Drawn(title, figure)
    pairs = [(knob, metric) for knob in COEFFICIENTS for metric in ("fvu", "l0")]
    for x, metric in [*pairs, ("l0", "ce_loss_recovered"), ("l0", "ce_delta")]:
        if len(_plotted(table, x, metric)):
            title = f"{label(metric)} against {'' if x in ('k', 'l0') else 'the '}{label(x)}"
            figures[f"{metric}_by_{x}"] = Drawn(title, against(table, decision, x, metric))
    for metric in ("fvu", "l0"):
        if curves is not None and metric in curves and curves[metric].notna().any():
            figure = training(curves, table, decision, metric)
            figures[f"{metric}_over_training"] = Drawn(f"{label(metric)} over training", figure)
    return figures


def off_scale(table: pd.DataFrame) -> list[str]:
    """What the figures leave out, in words."""
    notes = []
    status = table["status"].astype(str)
    if missing := int((~status.isin(PLOTTED)).sum()):
        notes.append(f"{missing} SAE(s) that diverged or failed are not drawn")
    drawn = _plotted(table, "l0", "fvu")
    finite = table[status.isin(PLOTTED) & table.get("fvu", pd.Series(np.nan, index=table.index)).notna()]
    if dark := len(finite) - len(drawn):
        notes.append(f"{dark} with L0 = 0 cannot stand on a log axis")
    if 0 < (above := int((drawn["fvu"] > FVU_TOP).sum())) < len(drawn):
        notes.append(f"{above} with FVU above {FVU_TOP:g}, worse than predicting the mean, are off the scale")
    return notes


def save(figure: Figure, folder: Path, name: str) -> str:
    """Writes `<name>.svg` and `<name>.png`; returns the SVG's text."""
    folder.mkdir(parents=True, exist_ok=True)
    svg, png = (inside(folder, f"{name}.{kind}") for kind in ("svg", "png"))
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "raysae"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    write_atomic(svg, lambda path: path.write_text(buffer.getvalue(), encoding="utf-8"))
    figure.set_layout_engine("none")  # the layout of the SVG stands: finding it is most of the work
    write_atomic(png, lambda path: figure.savefig(path, format="png", dpi=130))
    return buffer.getvalue()


def inline(svg: str, name: str, title: str, titles: Mapping[str, str]) -> str:
    """A saved SVG as a piece of an HTML page; `titles` gives the tooltip of each SAE's mark."""
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")) or child.get("id") == "background":
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        gid = element.attrib.pop("id", None)
        element.attrib = {key.rpartition("}")[2]: _in_page(text, name) for key, text in element.attrib.items()}
        if gid is not None and gid.startswith("sae:"):
            element.set("class", "sae")
            element.set("data-sae", gid[4:])
            tooltip = ET.Element("title")
            tooltip.text = titles.get(gid[4:], gid[4:])
            element.insert(0, tooltip)
        elif gid is not None:
            element.set("id", f"{name}-{gid}")
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ET.tostring(root, encoding="unicode")


def _in_page(text: str, name: str) -> str:
    """An SVG attribute with unique references, the page's colours, and two decimals."""
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r"^#", f"#{name}-", text) if not re.fullmatch(r"#[0-9a-f]{6}", text) else text
    text = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", text)
    text = text.replace(INK, "currentColor").replace(FAINT, "var(--faint)").replace(PAPER, "var(--paper)")
    return re.sub(r"(\d\.\d\d)\d+", r"\1", text)


def _axes(x_label: str, y_label: str, size: tuple[float, float] = SMALL) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained", facecolor=PAPER)
    figure.patch.set_gid("background")
    axes = figure.add_subplot(facecolor="none")
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(which="both", color=FAINT, labelcolor=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _log(axes: Axes, *names: str) -> None:
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}" if value < 1000 else f"{value:,.0f}"))


def _tokens(value: float, _position: int | None = None) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"


def _plotted(table: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The rows whose status and numbers can be drawn; L0 and sparsity coefficients stand on log axes."""
    if x not in table or y not in table:
        return table.iloc[:0]
    rows = table[table["status"].isin(PLOTTED)]
    for name in (x, y):
        values = pd.to_numeric(rows[name], errors="coerce").astype(float)
        rows = rows[np.isfinite(values) & ((values > 0) | ~np.isin(name, ["l0", *COEFFICIENTS]))]
    return rows


def _widths(table: pd.DataFrame) -> list[float]:
    return sorted(table["expansion_factor"].dropna().unique()) if "expansion_factor" in table else []


def _colours(table: pd.DataFrame) -> dict[Any, str]:
    widths = _widths(table)
    return {width: to_hex(RAMP(i / max(len(widths) - 1, 1))) for i, width in enumerate(widths)}


def _marks(axes: Axes, table: pd.DataFrame, decision: Mapping[str, Any], x: str, y: str) -> None:
    """One mark per SAE, with interval bars where the table has them; the decision's SAE is ringed."""
    colours, ringed = _colours(table), leads(decision)
    bars, inks = list[Any](), list[Any]()
    for row in records(_plotted(table, x, y)):
        colour = colours.get(row.get("expansion_factor"), FAINT)
        faint = row["status"] != "completed"
        ends = {name: [row.get(f"{name}_low"), row.get(f"{name}_high")] for name in (x, y)}
        bars += [[(end, row[y]) for end in ends[x]]] if all(map(is_number, ends[x])) else []
        bars += [[(row[x], end) for end in ends[y]]] if all(map(is_number, ends[y])) else []
        inks += [to_rgba(colour, 0.15 if faint else 0.55)] * (len(bars) - len(inks))
        mark: dict[str, Any] = {"marker": MARKERS.get(row["architecture"], "^"), "markersize": 6, "linestyle": "none"}
        mark |= {"color": colour, "markeredgecolor": PAPER, "markeredgewidth": 0.5, "alpha": 0.28 if faint else 0.9}
        axes.add_line(Line2D([row[x]], [row[y]], zorder=3, gid=f"sae:{row['sae_id']}", **mark))
        if row["sae_id"] in ringed:
            axes.plot([row[x]], [row[y]], "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, zorder=5)
    axes.add_collection(LineCollection(bars, colors=inks, linewidths=0.9, zorder=2))
    axes.autoscale_view()


def _iso(axes: Axes, table: pd.DataFrame, decision: Mapping[str, Any], y: str) -> list[Line2D]:
    """A line through each site's choice of what would have scored as well, if `y` is what was traded; its legend."""
    if not decision.get("choose"):
        return []
    rule, choices = Choose.model_validate(decision["choose"]), decision.get("choices") or {}
    drawn, chosen = _plotted(table, "l0", y), [c["chosen"] for c in choices.values() if c["chosen"]]
    rows = [row for row in records(drawn) if row["sae_id"] in chosen]
    if rule.error != y or not rows:
        return []
    style: dict[str, Any] = {
        "color": INK,
        "linewidth": 1.1,
        "linestyle": (0, (5, 2, 1, 2)),
        "alpha": 0.8,
        "zorder": 1.4,
    }
    for row in rows:
        line = trade.iso(rule, row)
        if line is None:  # a rule that looks at L0 first
            l0 = rule.matched_l0 or row["l0"]
            axes.add_artist(Line2D([l0, l0], [0, 1], transform=axes.get_xaxis_transform(), **style))
        else:
            l0 = np.geomspace(drawn["l0"].min() / 2, drawn["l0"].max() * 2, 100)
            axes.add_artist(Line2D(l0, line(l0), **style))
    score = trade.name(rule) if rule.matched_l0 is None else f"L0 {rule.matched_l0:g}"
    return [Line2D([], [], label=f"equal {score}" if rule.matched_l0 is None else score, **style)]


def _finish(
    figure: Figure, axes: Axes, table: pd.DataFrame, decision: Mapping[str, Any], x: str, y: str, lines: bool = False,
    more: Sequence[Line2D] = (),
) -> Figure:  # fmt: skip
    """The gate's bounds on these axes, limits that outliers do not set, and the legend, with `more` at its end."""
    for is_log, limits, set_limits in (
        (axes.get_xscale() == "log", axes.get_xlim(), axes.set_xlim),
        (axes.get_yscale() == "log", axes.get_ylim(), axes.set_ylim),
    ):
        if is_log and limits[1] < 1.5 * limits[0]:  # a single value: a log axis needs room around it
            middle = math.sqrt(limits[0] * limits[1])
            set_limits(middle / 1.5, middle * 1.5)
    criteria = decision.get("criteria") or ()
    left = any(criterion.get("metric") == x for criterion in criteria)  # clear of the other bound's label
    for criterion in criteria:
        metric, threshold = criterion.get("metric"), criterion.get("threshold")
        if metric not in (x, y) or not is_number(threshold) or (metric == "l0" and threshold <= 0):
            continue
        place: dict[str, Any] = {
            "textcoords": "offset points",
            "color": INK,
            "fontsize": 8,
            "bbox": PLATE,
            "zorder": 1.6,
        }
        place["annotation_clip"] = True  # a bound off the scale has no label, which would squeeze the axes to reach it
        text = f"gate {show_threshold(metric, criterion.get('op', ''), threshold)}"
        style: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (2, 2)), "alpha": 0.7, "zorder": 1.5}
        if metric == y:
            axes.axhline(threshold, **style)
            place |= {"xycoords": ("axes fraction", "data"), "xytext": (2 if left else 0, 2), "va": "bottom"}
            axes.annotate(text, (0 if left else 1, threshold), ha="left" if left else "right", **place)
        else:
            axes.axvline(threshold, **style)
            place |= {"xycoords": ("data", "axes fraction"), "xytext": (-3, 0), "ha": "right", "va": "top"}
            axes.annotate(text, (threshold, 1), rotation=90, **place)
    if y == "fvu":
        low, high = axes.get_ylim()
        values = [value for line in axes.lines for value in np.ravel(np.asarray(line.get_ydata(), float))]
        if high > FVU_TOP and any(value <= FVU_TOP for value in values):
            high = FVU_TOP
        axes.set_ylim(max(low, 0.0) if high > 0 else low, high)
    if not any((line.get_gid() or "").startswith("sae:") for line in axes.lines):
        axes.annotate("no SAE has both numbers", (0.5, 0.5), xycoords="axes fraction", ha="center", color=INK)
    shown = table if lines else _plotted(table, x, y)
    handles = _legend(shown, _colours(table), decision, lines, front=len(axes.lines) > 0 and y == "fvu" and x == "l0")
    handles += more
    widest = 0.45 + 0.07 * max((len(str(handle.get_label())) for handle in handles), default=0)  # inches, with its sign
    rows = math.ceil(len(handles) * widest / figure.get_figwidth())
    columns = math.ceil(len(handles) / max(rows, 1))
    look: dict[str, Any] = {
        "frameon": False,
        "fontsize": 8,
        "labelcolor": INK,
        "handletextpad": 0.3,
        "columnspacing": 1.1,
    }
    look |= {"ncols": max(columns, 1), "handlelength": 1.6 if lines else 1.2}
    figure.legend(handles=handles, loc="outside lower center", **look).set_gid("legend")
    return figure


def _legend(
    shown: pd.DataFrame, colours: Mapping[Any, str], decision: Mapping[str, Any], lines: bool, front: bool
) -> list[Line2D]:
    """What colours, markers and rings mean; of many widths only some."""
    widths = list(colours)
    if len(widths) > 6:
        widths = [widths[round(i * (len(widths) - 1) / 4)] for i in range(5)]
    dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5}
    handles = [Line2D([], [], color=colours[width], linewidth=4, label=f"×{width:g}") for width in widths]
    for architecture in sorted(shown["architecture"].dropna().unique()):
        marked = {**dot, "marker": MARKERS.get(architecture, "^")}
        style = {"linestyle": DASHES.get(architecture, ":")} if lines else marked
        handles.append(Line2D([], [], color=INK, label=str(architecture), **style))
    if (shown["status"] == "pruned").any():
        style = {"linewidth": 2} if lines else dot
        handles.append(Line2D([], [], color=FAINT, alpha=0.4, label="pruned", **style))
    if front:
        handles.append(Line2D([], [], color=FAINT, linewidth=1.2, label="Pareto front"))
    sae_id, role = lead(decision)
    if (shown["sae_id"] == sae_id).any():
        style = {"linewidth": 2.6} if lines else {**dot, "markersize": 9, "markerfacecolor": "none"}
        handles.append(Line2D([], [], color=INK, label=role, **style))
    return handles
