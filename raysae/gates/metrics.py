"""The metrics that a gate may ask for. A study registers its own beside those of the sweep."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """A number that a gate may bound."""

    name: str
    """Its key among the metrics that are judged; `<name>_low` and `<name>_high` hold its interval."""
    direction: Literal["lower", "higher"] | None = None
    """Which is better, and so beats a null; None where that depends, as for a ratio that should be 1."""
    split: Literal["validation", "training", "config"] | None = None
    """Where its value is from, on whatever split the others are measured; None: measured on each."""
    count: str = "n_rows"
    """Key of the number of what it rests on; empty where nothing is counted."""
    groups: str = "n_groups"
    """Key of the number of groups that these are of, which must begin with `n_`; empty where its interval is not over
    groups. `effective_...` in place of `n_...` is how many groups of equal size they count as
    (`statistics.effective_groups`), where it is known."""


METRICS: dict[str, Metric] = {}
"""By name."""


def register(*metrics: Metric) -> None:
    """Let gates ask for `metrics`. ValueError for another metric under a name that is taken."""
    for metric in metrics:
        if METRICS.setdefault(metric.name, metric) != metric:
            raise ValueError(f"metric {metric.name} is registered already, as {METRICS[metric.name]}")


def known(name: str) -> str:
    """`name`, if it is registered; for pydantic."""
    if name not in METRICS:
        (closest,) = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)
        raise ValueError(f"{name!r} is no metric; did you mean {closest!r}? known: {', '.join(METRICS)}")
    return name


def split_of(name: str, split: str) -> str:
    """Where a value is from that stands among those of a split: a metric, an end of its interval, or what it rests on."""
    metric = METRICS.get(name.removesuffix("_low").removesuffix("_high"))
    splits = {metric.split} if metric else {m.split for m in METRICS.values() if name in (m.count, m.groups)}
    return (splits.pop() if len(splits) == 1 else None) or split


_SPLICED: dict[str, Any] = {"count": "n_scored_tokens", "groups": "n_scored_groups"}
_LATENTS: dict[str, Any] = {"split": "validation", "count": "stability_latents", "groups": ""}
_FACT: dict[str, Any] = {"split": "config", "count": "", "groups": ""}
register(
    Metric("fvu", "lower"),
    Metric("explained_variance", "higher"),
    Metric("fvu_without_top_norms", "lower"),
    Metric("l0", "lower"),
    Metric("l0_fraction", "lower"),
    Metric("l0_per_dim", "lower"),
    Metric("l0_effective", "lower"),
    Metric("l1"),
    Metric("dead_fraction", "lower", "training", "dead_window_tokens", ""),
    Metric("never_fired_fraction", "lower"),
    Metric("dense_fraction", "lower"),
    Metric("effective_latents"),
    Metric("l2_ratio"),
    Metric("relative_reconstruction_bias"),
    Metric("cosine", "higher"),
    Metric("ce_delta", "lower", **_SPLICED),
    Metric("ce_loss_recovered", "higher", **_SPLICED),
    Metric("ce_recovered_mean", "higher", **_SPLICED),
    Metric("kl", "lower", **_SPLICED),
    Metric("stability_mmcs", "higher", **_LATENTS),
    Metric("stability_recurring_fraction", "higher", **_LATENTS),
    Metric("stability_recurring_variance", "higher", "validation"),
    Metric("d_in", **_FACT),
    Metric("d_sae", **_FACT),
    Metric("expansion_factor", **_FACT),
    Metric("n_rows"),
    Metric("n_scored_tokens", **_SPLICED),
)
