"""Stability over seeds: do SAEs that differ in their seed alone find the same latents, and do those carry the variance?

Latents of two SAEs are matched by the cosine of their decoder directions, one to one. A latent *recurs* if its match in
every other seed has a cosine of at least RECURS. In d dimensions the best of many directions is close to any other by
chance, so everything stands beside the same matching against random directions. Latents that never fired on the evaluated
split have no part in it, and are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from raysae.activations.store import Store
from raysae.data.tokens import TokenBlock
from raysae.evaluate.fidelity import group_sums
from raysae.evaluate.statistics import Bootstrap, intervals
from raysae.files import read_json, write_atomic, write_json
from raysae.models.host import ModelHost
from raysae.sae.formats import load, load_tensors
from raysae.sweep.collect import CONFIGURATION

RECURS, RECURS_CLOSELY = 0.7, 0.9
EXACT_UP_TO = 4096
"""Most latents that are assigned by the Hungarian method, 2-3 s a pair at this width on one core and cubic in it; wider
SAEs are matched by mutual nearest neighbours."""
ROWS_AT_ONCE = 4096
ENOUGH_SEEDS = 3
"""With fewer the numbers are given with a note."""
REPLICATED = ("fvu", "l0", "ce_loss_recovered")
"""Metrics whose mean and standard deviation over the seeds are given."""
SETS = ("all", "recurring", "recurring_closely", "null")
"""Sets of latents that a reconstruction is made of alone."""
ERRORS = ("total", *SETS)
NULLS = ("random", "same_moments")
"""Kinds of random directions."""
COLUMNS = ("stability_mmcs", "stability_recurring_fraction", "stability_recurring_variance")
"""Columns of the table, each with an interval."""


# ----------------------------------------------------------------------------------------------------------------------
# Matching


class Match(NamedTuple):
    """How the n directions of one dictionary stand to the m of another."""

    best: np.ndarray
    """[n] the largest cosine with any of the other's."""
    best_back: np.ndarray
    """[m] the same from the other's side."""
    matched: np.ndarray
    """[n] the cosine with its own match, -1 where it has none."""
    matched_back: np.ndarray
    """[m] the same from the other's side."""


def match(a: np.ndarray, b: np.ndarray, signed: bool = False) -> Match:
    """Match unit rows a [n, d] with unit rows b [m, d], one to one.

    Up to EXACT_UP_TO rows by the assignment with the largest sum of cosines (Hungarian); above, a row's match is its
    nearest neighbour if it is also the nearest of that one. `signed`: latents of either sign, for which d and -d are one
    direction.
    """
    if max(len(a), len(b)) <= EXACT_UP_TO:
        cosine = np.abs(a @ b.T) if signed else a @ b.T
        rows, columns = linear_sum_assignment(cosine, maximize=True)
        matched, matched_back = np.full(len(a), -1.0), np.full(len(b), -1.0)
        matched[rows] = matched_back[columns] = cosine[rows, columns]
        return Match(cosine.max(1), cosine.max(0), matched, matched_back)
    best, nearest = np.empty(len(a)), np.empty(len(a), int)
    best_back, nearest_back = np.full(len(b), -np.inf), np.zeros(len(b), int)
    for start in range(0, len(a), ROWS_AT_ONCE):  # never all of [n, m] at once
        cosine = a[start : start + ROWS_AT_ONCE] @ b.T
        cosine = np.abs(cosine) if signed else cosine
        part = slice(start, start + len(cosine))
        nearest[part], best[part] = cosine.argmax(1), cosine.max(1)
        closer = cosine.max(0) > best_back
        nearest_back[closer] = start + cosine.argmax(0)[closer]
        best_back = np.maximum(best_back, cosine.max(0))
    mutual = nearest_back[nearest] == np.arange(len(a))
    mutual_back = nearest[nearest_back] == np.arange(len(b))
    return Match(best, best_back, np.where(mutual, best, -1.0), np.where(mutual_back, best_back, -1.0))


def method(width: int) -> str:
    """How directions are matched at this many latents, in words."""
    return "Hungarian" if width <= EXACT_UP_TO else "mutual nearest neighbours"


def directions(W_dec: np.ndarray) -> np.ndarray:
    """Rows [n, d] at unit norm."""
    return W_dec / np.maximum(np.linalg.norm(W_dec, axis=1, keepdims=True), 1e-12)


def random_directions(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """n unit rows, uniform on the sphere: the decoder of an untrained SAE."""
    return directions(rng.standard_normal((n, d), dtype=np.float32))


def random_directions_like(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many unit rows, Gaussian with the second moments of `rows` [n, d] before they are normalised.

    Decoder rows crowd into the subspace in which the activations vary, where chance cosines are larger.
    """
    values, vectors = np.linalg.eigh(rows.T.astype(np.float64) @ rows / len(rows))
    root = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
    return directions(rng.standard_normal((len(rows), rows.shape[1]), dtype=np.float32) @ root.T)


# ----------------------------------------------------------------------------------------------------------------------
# A configuration's seeds


@dataclass
class Seeds:
    """The SAEs of one configuration, matched with each other. Arrays are over all latents; those never fired hold NaN."""

    site: str
    ids: list[str]
    """Their sae_ids, by seed."""
    pairs: list[dict[str, Any]]
    """Each pair of seeds: MMCS in both directions."""
    best: dict[str, np.ndarray] = field(default_factory=dict)
    """By sae_id [d_sae]: the largest cosine with a latent of another seed, mean over the others."""
    matched: dict[str, np.ndarray] = field(default_factory=dict)
    """By sae_id [d_sae]: the matched cosine, least over the others: it recurs at c if this is at least c."""
    null_best: dict[str, np.ndarray] = field(default_factory=dict)
    """By null, of the first seed: its largest cosine with random directions [d_sae]."""
    null_matched: dict[str, np.ndarray] = field(default_factory=dict)
    """By null, of the first seed: as `matched`, against as many random dictionaries as there are other seeds."""

    def sets(self) -> dict[str, np.ndarray]:
        """By sae_id: which latents are in each of SETS [d_sae, len(SETS)] bool."""
        sets = {}
        for i in self.ids:
            least = self.matched[i]
            chance = np.fmax(*self.null_matched.values()) if i == self.ids[0] else np.full_like(least, np.nan)
            sets[i] = np.stack([np.isfinite(least), least >= RECURS, least >= RECURS_CLOSELY, chance >= RECURS], axis=1)
        return sets


def configurations(table: pd.DataFrame) -> list[pd.DataFrame]:
    """The completed SAEs of each configuration that has several, by seed."""
    done = table[table["status"] == "completed"]
    known = [name for name in CONFIGURATION if name in done]
    return [rows.sort_values("seed") for _, rows in done.groupby(known, dropna=False) if len(rows) > 1]


def match_all(table: pd.DataFrame, saes: Path, evaluation: Path, names: Sequence[str], seed: int) -> list[Seeds]:
    """`match_seeds` of every configuration of a table; SAEs that never fired on the evaluated blocks are left out.

    evaluation: where the evaluation left each site's sums, in a folder each.
    """
    seeds = []
    for rows in configurations(table):
        on = {str(i): fired(evaluation / rows["site"].iloc[0], names, str(i)) for i in rows["sae_id"]}
        rows = rows[[bool(on[str(i)].any()) for i in rows["sae_id"]]]
        if len(rows) > 1:
            seeds.append(match_seeds(rows, saes, on, seed))
    return seeds


def match_seeds(rows: pd.DataFrame, saes: Path, fired: Mapping[str, np.ndarray], seed: int) -> Seeds:
    """Match the SAEs of one configuration (`rows` of the table, below `saes` by id) with each other and with the nulls.

    fired: by sae_id, whether each latent fired on the evaluated split [d_sae] bool. seed: of the random directions.
    """
    ids = [str(i) for i in rows["sae_id"]]
    signed = rows["architecture"].iloc[0] == "abstopk"
    unit = {i: directions(load(saes / i).parameters["W_dec"].numpy()[fired[i]]) for i in ids}
    best: dict[str, list[np.ndarray]] = {i: [] for i in ids}
    matched: dict[str, list[np.ndarray]] = {i: [] for i in ids}
    pairs = []
    for n, a in enumerate(ids):
        for b in ids[n + 1 :]:
            pair = match(unit[a], unit[b], signed)
            best[a].append(pair.best)
            best[b].append(pair.best_back)
            matched[a].append(pair.matched)
            matched[b].append(pair.matched_back)
            one, two = float(pair.best.mean()), float(pair.best_back.mean())
            pairs.append({"a": a, "b": b, "mmcs": (one + two) / 2, "mmcs_a_in_b": one, "mmcs_b_in_a": two})
    rng, first = np.random.default_rng([seed, len(fired[ids[0]])]), unit[ids[0]]
    null_best: dict[str, list[np.ndarray]] = {null: [] for null in NULLS}
    null_matched: dict[str, list[np.ndarray]] = {null: [] for null in NULLS}
    for other in ids[1:]:
        uniform = random_directions(len(unit[other]), unit[other].shape[1], rng)
        for null, rival in zip(NULLS, (uniform, random_directions_like(unit[other], rng)), strict=True):
            by_chance = match(first, rival, signed)
            null_best[null].append(by_chance.best)
            null_matched[null].append(by_chance.matched)

    def spread(sae_id: str, values: np.ndarray) -> np.ndarray:
        whole = np.full(len(fired[sae_id]), np.nan)
        whole[fired[sae_id]] = values
        return whole

    return Seeds(
        str(rows["site"].iloc[0]),
        ids,
        pairs,
        {i: spread(i, np.mean(b, axis=0)) for i, b in best.items()},
        {i: spread(i, np.min(m, axis=0)) for i, m in matched.items()},
        {null: spread(ids[0], np.mean(b, axis=0)) for null, b in null_best.items()},
        {null: spread(ids[0], np.min(m, axis=0)) for null, m in null_matched.items()},
    )


def write_matches(root: Path, seeds: Sequence[Seeds]) -> None:
    """The matched configurations of a site: `matches.json`, and `matches.safetensors` by number, field and key."""
    heads: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for n, of_one in enumerate(seeds):
        fields = asdict(of_one)
        heads.append({name: fields.pop(name) for name in ("site", "ids", "pairs")})
        for name, arrays in fields.items():
            tensors |= {f"{n}/{name}/{key}": torch.from_numpy(values) for key, values in arrays.items()}
    root.mkdir(parents=True, exist_ok=True)
    write_atomic(root / "matches.safetensors", lambda path: save_file(tensors, path))
    write_json(root / "matches.json", heads)


def read_matches(root: Path) -> list[Seeds]:
    """What `write_matches` wrote."""
    seeds = [Seeds(**head) for head in read_json(root / "matches.json", list)]
    for name, values in load_tensors(root / "matches.safetensors").items():
        n, field_name, key = name.split("/")
        getattr(seeds[int(n)], field_name)[key] = values.numpy()
    return seeds


# ----------------------------------------------------------------------------------------------------------------------
# The variance that recurring latents carry


@dataclass(frozen=True)
class Errors:
    """Sums by group of the centred squared errors of SETS' latents alone, on a block's stored rows; see `block_errors`."""

    store: Path
    site: str
    saes: Path
    """Folder of SAEs by id."""
    root: Path
    """Where the matches lie, and the sums go."""

    def __call__(self, host: ModelHost, block: TokenBlock) -> dict[str, Any]:
        return block_errors(host.device, block.name, self)


def tasks(seeds: Sequence[Seeds], store: Path, saes: Path, root: Path) -> Iterator[Errors]:
    """What there is to sum, a task per site below its folder of `root`, where its matches are written."""
    for site in sorted({s.site for s in seeds}):
        write_matches(root / site, [s for s in seeds if s.site == site])
        yield Errors(store, site, saes, root / site)


def block_errors(device: Any, name: str, task: Errors) -> dict[str, Any]:
    """Write `<name>.parquet`, columns sae_id, group, ERRORS, below `task.root`; it is there when the block is done.

    Each is Σ ‖r - r̄‖² by group, r̄ the mean of r over the block's rows, so that no constant counts, be it the mean of x or
    that of latents that are left out: r = x for `total`, x - x̂ with the latents of each set alone for the others.
    """
    store, masks = Store(task.store), {i: m for seeds in read_matches(task.root) for i, m in seeds.sets().items()}
    x = store.shard(task.site, name)
    codes, groups = pd.factorize(store.row_columns(name, ("group",))["group"].to_pandas(), sort=True)
    of_group = torch.from_numpy(codes).to(device)
    rows = torch.bincount(of_group, minlength=len(groups)).double()
    shift = store.mean(task.site).to(device, torch.float64)
    frames = []
    for sae_id, mask in masks.items():
        sae = load(task.saes / sae_id).to(device)
        W_dec, sets = sae.parameters["W_dec"].double(), torch.from_numpy(mask).to(device)
        squares = torch.zeros(len(ERRORS), len(groups), dtype=torch.float64, device=device)
        sums = torch.zeros(len(ERRORS), len(groups), x.shape[1], dtype=torch.float64, device=device)
        for start in range(0, x.shape[0], ROWS_AT_ONCE):
            part, here = x[start : start + ROWS_AT_ONCE].to(device).float(), of_group[start : start + ROWS_AT_ONCE]
            f, left = sae.encode(part).double(), part.double() - shift
            for k, residual in enumerate((left, *(left - _decoded(f, W_dec, kept) for kept in sets.T))):
                squares[k].index_add_(0, here, residual.square().sum(1))
                sums[k].index_add_(0, here, residual)
        mean = sums.sum(1, keepdim=True) / max(len(codes), 1)
        errors = squares - 2 * (sums * mean).sum(2) + rows * mean.square().sum(2)
        table = pd.DataFrame(errors.clamp_min(0).T.cpu().numpy(), columns=list(ERRORS))
        frames.append(table.assign(group=groups, sae_id=sae_id))
    table = pd.concat(frames, ignore_index=True)
    write_atomic(task.root / f"{name}.parquet", lambda path: table.to_parquet(path, index=False))
    return {"name": name, "rows": x.shape[0]}


def _decoded(f: Tensor, W_dec: Tensor, kept: Tensor) -> Tensor:
    """What the latents `kept` [d_sae] bool add up to [n, d_in]."""
    return f[:, kept] @ W_dec[kept]


def done(root: Path, name: str) -> bool:
    """Whether the block of this name has been summed below `root`."""
    return (root / f"{name}.parquet").exists()


def fired(root: Path, names: Sequence[str], sae_id: str) -> np.ndarray:
    """[d_sae] bool: whether each latent fired in these blocks, from what the evaluation left below `root`."""
    return sum(load_tensors(root / f"{name}.safetensors")[f"{sae_id}.firings"] for name in names).numpy() > 0  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------------------------------------------
# The outcome


def collect(
    root: Path,
    names: Sequence[str],
    table: pd.DataFrame,
    metrics: Mapping[str, Mapping[str, Any]],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """The content of stability.json: `configurations`, `saes` (columns of the table by sae_id), `nulls`, and the rule.

    root: where the sites' matches and errors lie, in a folder each. table: of the sweep, where the SAEs' settings stand.
    metrics: of the evaluated split, by sae_id. Intervals of cosines
    are t intervals and those of shares of latents Wilson's, over latents with the seeds given; those of shares of variance
    are over groups. Pairs of seeds are too few for one: their least and largest are given.
    """
    confidence = bootstrap.confidence
    sites = sorted(file.parent for file in root.glob("*/matches.json"))
    shares = {site.name: _variance_shares(site, names, bootstrap) for site in sites}
    of_table = table.set_index("sae_id", drop=False)
    saes: dict[str, dict[str, Any]] = {}
    entries, nulls = [], {}
    for seeds in (seeds for site in sites for seeds in read_matches(site)):
        rows, of_site = of_table.loc[seeds.ids], shares[seeds.site]
        for i in seeds.ids:
            saes[i] = {"stability_seeds": len(seeds.ids), **_of_latents(seeds.best[i], seeds.matched[i], confidence)}
            saes[i] |= {f"stability_recurring_variance{end}": v for end, v in of_site[i]["recurring"].items()}
        null = {name: _of_latents(seeds.null_best[name], seeds.null_matched[name], confidence) for name in NULLS}
        larger = max(null.values(), key=lambda n: (n["stability_mmcs"], n["stability_recurring_fraction"]))
        chance = of_site[seeds.ids[0]]["null"]
        larger = larger | {f"stability_recurring_variance{end}": v for end, v in chance.items()}
        head = rows.iloc[0]
        nulls[f"{head['architecture']}-{head['d_sae']}-{seeds.site}"] = larger
        entries.append(_entry(seeds, rows, saes, of_site, null, larger, metrics))
    return {"rule": RULE, "configurations": entries, "saes": saes, "nulls": nulls}


RULE = (
    f"Latents of two seeds are matched by decoder cosine (Hungarian up to {EXACT_UP_TO} latents, mutual nearest "
    "neighbours above); those that never fired on the validation split are left out. MMCS: mean over latents, both ways "
    "and over pairs of seeds, of the largest cosine with a latent of the other seed. A latent recurs if its matched cosine "
    f"is at least {RECURS} ({RECURS_CLOSELY}: closely) in every other seed. Recurring variance: of the variance that "
    "the SAE explains on the validation split, the share that these latents explain alone, (1 - FVU with them alone) / "
    "(1 - FVU), errors taken about their means, so that a constant that all seeds share explains nothing. Null: the same "
    "matching against as many random unit directions, uniform or with the second "
    "moments of the other seed's decoder; of the two the larger is shown."
)


def _entry(
    seeds: Seeds, rows: pd.DataFrame, saes: Mapping[str, Mapping[str, Any]], shares: Mapping[str, Any],
    null: Mapping[str, Any], larger: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    ids = seeds.ids
    facts = {name: rows[name].iloc[0] for name in CONFIGURATION if name in rows}
    facts = {name: value for name, value in facts.items() if not pd.isna(value)}
    mmcs = [pair["mmcs"] for pair in seeds.pairs]
    silent = [int(np.isnan(seeds.matched[i]).sum()) for i in ids]
    entry: dict[str, Any] = {
        **facts,
        "sae_ids": ids,
        "seeds": [int(s) for s in rows["seed"]],
        "note": f"{len(ids)} seeds, and {ENOUGH_SEEDS} were asked for" if len(ids) < ENOUGH_SEEDS else "",
        "method": method(max(len(v) for v in seeds.matched.values()) - min(silent)),
        "never_fired": silent,
        "pairs": seeds.pairs,
        "mmcs": float(np.mean(mmcs)),
        "mmcs_least": float(min(mmcs)),
        "mmcs_largest": float(max(mmcs)),
        "mmcs_null": larger["stability_mmcs"],
        "recurring_fraction_null": larger["stability_recurring_fraction"],
        "recurring_variance_null": larger["stability_recurring_variance"],
        "nulls": {
            name: {"mmcs": n["stability_mmcs"], "recurring_fraction": n["stability_recurring_fraction"]}
            for name, n in null.items()
        },
    }
    for name in ("recurring_fraction", "recurring_closely_fraction", "recurring_variance"):
        column = f"stability_{name}"
        values = [saes[i][column] for i in ids]
        entry |= {name: float(np.mean(values)), f"{name}_least": min(values), f"{name}_largest": max(values)}
    entry["recurring_closely_variance"] = float(np.mean([shares[i]["recurring_closely"][""] for i in ids]))
    for name in REPLICATED:
        each = np.array([metrics[i][name] for i in ids], float)
        entry |= {f"{name}_mean": float(each.mean()), f"{name}_sd": float(each.std(ddof=1))}
    return entry


def _of_latents(best: np.ndarray, matched: np.ndarray, confidence: float) -> dict[str, float]:
    """MMCS and shares of recurring latents of one SAE, over its latents that fired, with intervals over these."""
    best, matched = best[np.isfinite(best)], matched[np.isfinite(matched)]
    n, mean = len(best), float(best.mean())
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * best.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    columns = {"stability_latents": n, "stability_mmcs": mean}
    columns |= {"stability_mmcs_low": mean - half, "stability_mmcs_high": mean + half}
    for name, least in (("recurring", RECURS), ("recurring_closely", RECURS_CLOSELY)):
        count = int((matched >= least).sum())
        low, high = stats.binomtest(count, n).proportion_ci(confidence, "wilson")
        name = f"stability_{name}_fraction"
        columns |= {name: count / n, f"{name}_low": float(low), f"{name}_high": float(high)}
    return columns


def _variance_shares(root: Path, names: Sequence[str], bootstrap: Bootstrap) -> dict[str, dict[str, dict[str, float]]]:
    """By sae_id and set of latents: its share of the variance that all explain, with its interval ("", "_low", "_high").

    (total - error of the set) / (total - error of all) = (1 - FVU of the set) / (1 - FVU of all); nan where all explain
    nothing.
    """

    def shares(totals: np.ndarray) -> np.ndarray:
        explained = totals[:, :1] - totals[:, 1:]
        return explained / np.where(explained[:, :1] > 0, explained[:, :1], np.nan)

    by_sae = {}
    for sae_id, by_group in group_sums(root, names, ERRORS).items():
        ends = [part.tolist() for part in intervals(by_group.to_numpy(), shares, bootstrap)]
        by_sae[sae_id] = {
            name: dict(zip(("", "_low", "_high"), of_set, strict=True))
            for name, *of_set in zip(SETS, *ends, strict=True)
        }
    return by_sae


def by_configuration(stability: Mapping[str, Any]) -> pd.DataFrame:
    """One row per configuration of what was collected, its plain fields: the content of stability.parquet."""
    plain = [{k: v for k, v in e.items() if not isinstance(v, list | dict)} for e in stability["configurations"]]
    return pd.DataFrame(plain).assign(seeds=[len(e["seeds"]) for e in stability["configurations"]])


def columns(stability: Mapping[str, Any]) -> pd.DataFrame:
    """The table's columns of what was collected, by sae_id."""
    return pd.DataFrame(stability["saes"]).T.astype(float).rename_axis("sae_id").reset_index()
