"""What each column of the table is called, in which unit it is shown, and what it means.

One list for the page's tables, the figures' axes and the tooltips, so that a number has the same name and the same
digits wherever it stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import starmap
from typing import Any, Literal, NamedTuple

Kind = Literal["text", "count", "ratio", "short", "share", "nats", "small", "seconds"]

OPERATORS = {"<=": "≤", ">=": "≥", "==": "=", "!=": "≠"}


class Column(NamedTuple):
    name: str
    """Column of table.parquet."""
    label: str
    """Heading, with the unit."""
    kind: Kind
    """How its values are shown."""
    meaning: str
    """One line for the heading's tooltip and the definitions."""


COLUMNS = tuple(starmap(Column, (
    ("architecture", "Architecture", "text",
     "relu, p_anneal, gated: an L1 penalty; topk, abstopk: the k largest latents per token; batchtopk, matryoshka: "
     "k per token on average; jumprelu: a threshold per latent"),
    ("expansion_factor", "Expansion ×", "small", "d_sae / d_in"),
    ("d_sae", "Width d_sae", "count", "number of latents"),
    ("l1_coefficient", "L1 coefficient", "small", "weight of the L1 penalty, at inputs of variance 1"),
    ("k", "k", "count", "latents that a TopK SAE keeps per token; BatchTopK on average, in training"),
    ("target_l0", "Target L0", "short", "the L0 that a JumpReLU SAE is trained to have"),
    ("l0_coefficient", "L0 coefficient", "small", "weight of a JumpReLU SAE's L0 penalty"),
    ("fvu", "FVU", "ratio", "fraction of variance unexplained; 0 is perfect, 1 is predicting the mean"),
    ("explained_variance", "EV", "ratio", "explained variance, 1 − FVU"),
    ("l0", "L0", "short", "active latents per token, mean"),
    ("l0_fraction", "L0 / live latents", "share", "share of the latents that ever fire that are active on a token"),
    ("l0_per_dim", "L0 / d_in", "share", "active latents per dimension of the activations; 1 is a change of basis"),
    ("l0_effective", "L0 / latents in use", "share", "share of tokens on which an average firing's latent is on"),
    ("effective_latents", "Effective latents", "short",
     "latents that are as spread out if they fire equally often: (Σ n)² / Σ n² of how often each fires"),
    ("ce_loss_recovered", "CE recovered", "ratio",
     "share of the zero-ablation loss that the SAE recovers; none where ablation costs the model nothing"),
    ("ce_delta", "ΔCE, nats", "nats", "cross-entropy added by splicing the SAE in"),
    ("kl", "KL, nats", "nats", "divergence of the spliced model's next-token distribution from the clean one"),
    ("dead_fraction", "Dead", "share", "latents that did not fire in the dead window at the end of training"),
    ("never_fired_fraction", "Never fired", "share", "latents that fired on no token of the evaluated split"),
    ("dense_fraction", "Dense", "share", "latents that fire on more than 10% of the evaluated tokens"),
    ("l2_ratio", "L2 ratio", "ratio", "mean |x̂| / |x|; below 1 is shrinkage"),
    ("relative_reconstruction_bias", "Relative bias", "ratio",
     "E|x̂|² / E⟨x, x̂⟩; below 1 is shrinkage: x̂ divided by it is nearer to x (Gated SAE paper, eq. 10)"),
    ("cosine", "Cosine", "ratio", "mean cosine of x and x̂"),
    ("l1", "L1", "small", "sum of |f| per token, mean, in units of the SAE's latents on raw activations"),
    ("fvu_without_top_norms", "FVU, other norms", "ratio", "FVU without tokens of outlying norm, however many"),
    ("fvu_top_norms", "FVU, top norms", "ratio", "FVU of the tokens of outlying norm"),
    ("top_norms_rows", "Top norms", "share",
     "tokens of outlying norm: over 6 robust deviations, and 3 times, the median"),
    ("top_norms_variance", "Variance in top norms", "share", "share of the variance that they carry"),
    ("ev_resid_var", "EV, residual variance", "ratio", "1 − Σ var(x−x̂) / Σ var(x): blind to a constant offset"),
    ("ev_global", "EV, all elements", "ratio", "variances of all elements about one mean: credits the mean vector"),
    ("ev_scalar_mean", "EV, scalar mean", "ratio", "1 − Σ|x−x̂|² / Σ|x−m|², m one number: credits the mean vector"),
    ("ev_clipped", "EV, clipped", "ratio", "the same, negative values shown as 0"),
    ("stability_mmcs", "MMCS over seeds", "ratio",
     "largest cosine of a latent's direction with one of another seed, mean over latents and seeds"),
    ("stability_recurring_fraction", "Recurring latents", "share",
     "share of the latents that fired whose match in every other seed has a cosine of at least 0.7"),
    ("stability_recurring_variance", "Recurring variance", "share",
     "share of the variance explained that these latents explain alone, (1 − FVU of them) / (1 − FVU), about the "
     "means"),
    ("site", "Site", "text", "place in the model whose activations were reconstructed"),
    ("seed", "Seed", "text", "seed of the initialisation"),
    ("learning_rate", "Learning rate", "small", "Adam's peak learning rate"),
    ("ce_recovered_mean", "CE recovered, of mean", "ratio", "the same score against mean ablation, which is harder"),
    ("ce_clean", "CE clean, nats", "nats", "cross-entropy of the untouched model"),
    ("ce_spliced", "CE spliced, nats", "nats", "cross-entropy with x replaced by x̂"),
    ("ce_mean", "CE mean, nats", "nats", "cross-entropy with x replaced by its mean"),
    ("ce_zero", "CE zero, nats", "nats", "cross-entropy with x replaced by zero"),
    ("kl_mean", "KL mean, nats", "nats", "KL with x replaced by its mean"),
    ("kl_zero", "KL zero, nats", "nats", "KL with x replaced by zero"),
    ("tokens", "Tokens trained", "count", "token rows seen in training, repeats counted"),
    ("unique_tokens", "Unique tokens", "count", "different token rows seen in training"),
    ("dead_window_tokens", "Dead window, tokens", "count", "training tokens over which silence means dead"),
    ("n_rows", "Rows measured", "count", "token rows behind FVU and L0"),
    ("n_groups", "Groups measured", "count", "groups (documents, problems) that these rows are of"),
    ("n_scored_tokens", "Tokens scored", "count", "tokens behind the cross-entropies and KL"),
    ("n_scored_groups", "Groups scored", "count", "groups that these tokens are of"),
    ("train_seconds", "Training, s", "seconds", "wall time of the SAE's share of its pack"),
)))  # fmt: skip
BY_NAME = {column.name: column for column in COLUMNS}


def label(name: str) -> str:
    """A metric's heading; an unknown one keeps its own name."""
    return BY_NAME[name].label if name in BY_NAME else name


def is_number(value: Any) -> bool:
    """Whether there is a value to show (inf counts, NaN, None and text do not)."""
    try:
        return not isinstance(value, str | bool) and not math.isnan(float(value))
    except (TypeError, ValueError):
        return False


def show(name: str, value: Any) -> str:
    """A value in its metric's unit and digits; what is missing is a dash."""
    kind = BY_NAME[name].kind if name in BY_NAME else "small"
    if not is_number(value):
        return str(value) if isinstance(value, str | bool) else "–"
    number = float(value)
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    if kind in ("count", "text"):
        shown = f"{number:,.0f}" if kind == "count" else f"{number:g}"
    elif kind == "share":
        shown = f"{100 * number:.2f}%"
    elif kind == "small" or abs(number) >= 1e5:
        shown = f"{number:.3g}"
    else:
        shown = f"{number:.{1 if kind in ('short', 'seconds') else 4}f}"
    return shown.replace("-", "−")


def show_threshold(name: str, op: str, value: Any) -> str:
    """A criterion's bound, such as `≤ 0.2`, without trailing zeros."""
    if not is_number(value):
        return f"{OPERATORS.get(op, op)} {show(name, value)}"
    share = name in BY_NAME and BY_NAME[name].kind == "share"
    return f"{OPERATORS.get(op, op)} {100 * float(value):g}%" if share else f"{OPERATORS.get(op, op)} {float(value):g}"


def interval(name: str, low: Any, high: Any) -> str:
    """`[low, high]`, or nothing where there is no interval."""
    return f"[{show(name, low)}, {show(name, high)}]" if is_number(low) and is_number(high) else ""


def decimals(value: Any, low: Any = None, high: Any = None) -> dict[str, str]:
    """A score between -1 and 1 that is no column of the table, with its interval."""
    value, *ends = (
        f"{x:.3f}".replace("-", "−") if is_number(x) and math.isfinite(x) else "–" for x in (value, low, high)
    )
    return {"value": value, "interval": "" if "–" in ends else f"[{ends[0]}, {ends[1]}]"}


def cell(name: str, row: Mapping[str, Any], key: str | None = None) -> dict[str, str]:
    """Value and interval of a metric in a row, where it may stand under another key."""
    key = key or name
    return {
        "value": show(name, row.get(key)),
        "interval": interval(name, row.get(f"{key}_low"), row.get(f"{key}_high")),
    }
