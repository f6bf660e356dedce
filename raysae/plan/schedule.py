"""A run's cost before it runs: measured rates, multiplied out by stage with as many workers at once as there will be.

Only arithmetic: what is counted (rows, SAEs, steps) comes from the config and the token stage, the rates from
`calibrate.py`. Tokens and bytes are exact or nearly so. Seconds are as good as the calibration, on the machine as it was
then; pruning, which can save up to half of the sweep, is not counted on.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raysae.placement import Placement
from raysae.plan.budget import ITEMS
from raysae.units import duration, size

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Kind:
    """SAEs that cost the same: reading activations of `d_in`, of one architecture and width."""

    d_in: int
    architecture: str
    d_sae: int


@dataclass(frozen=True)
class SAERates:
    """What an SAE of a kind costs, with as many trials at once as the sweep will have."""

    step: float
    """Seconds of a training step."""
    rung: float
    """Seconds of a rung: measuring, and writing the training state."""
    start: float
    """Seconds of a trial before its first step."""
    rows: float
    """Seconds per row of measuring its reconstruction."""
    size: float
    """Bytes of the SAE on disk. Its training state goes when it has ended."""


@dataclass(frozen=True)
class Entry:
    """A stage of the schedule. `seconds` is wall time, `workers` run at once, `cpu_` and `gpu_seconds` are held by them."""

    stage: str
    seconds: float
    workers: int
    cpus: float
    gpus: float
    cpu_seconds: float
    gpu_seconds: float
    tokens: int
    bytes: int
    done: bool = False
    """Finished by an earlier run; its cost is what it was."""

    def ledger(self) -> dict[str, Any]:
        """As a stage of the ledger; what is done counts as reused."""
        keys = ("seconds", "cpu_seconds", "gpu_seconds", "tokens", "bytes")
        return {"stage": self.stage.split(" ")[0], "reused": self.done, **{key: getattr(self, key) for key in keys}}


@dataclass(frozen=True)
class Rates:
    """What a calibration measured."""

    saes: Mapping[Kind, SAERates]
    ray_start: float
    """Seconds until there is a cluster; the first stage that needs one pays for it."""
    host_start: float
    """Seconds until a pool of model hosts works on its first block, and after its last."""
    trial_start: float
    """Seconds until the first trial's process is there."""
    capture: float
    """Seconds per row of one host, all sites together."""
    columns: float
    """Bytes per row of the row columns."""
    score_clean: float
    """Seconds per scored token of the passes that all SAEs share."""
    score_sae: float
    """Seconds per scored token and SAE of the pass with it spliced in."""
    intervals: float
    """Seconds per SAE and group of the bootstrap."""
    model: Entry | None = None
    """Training the embedded model, where that is still to be done."""


@dataclass(frozen=True)
class Work:
    """What the config asks for, counted."""

    rows: Mapping[str, int]
    """By split."""
    blocks: Mapping[str, Sequence[int]]
    """Rows of each block, by split."""
    groups: Mapping[str, int]
    """By split."""
    widths: Mapping[str, int]
    """d_in by site."""
    dtype: str
    points: Sequence[tuple[str, Kind]]
    """(site, kind) of each SAE, in the order of the sweep."""
    steps: int
    batch_size: int
    rungs: int
    pack_size: int
    max_scored: int
    """Tokens of a split that are scored with the model, at most."""


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of these jobs ends, each begun in order by the first worker that is free."""
    free = [0.0] * max(1, workers)
    for job in seconds:
        heapq.heapreplace(free, free[0] + job)
    return max(free)


def activation_bytes(rows: int, widths: Sequence[int], dtype: str) -> int:
    """Bytes of the activations of so many rows at sites of these widths."""
    return rows * sum(widths) * DTYPE_BYTES[dtype]


def sae_bytes(d_in: int, d_sae: int) -> int:
    """Bytes of an SAE's weights in float32: W_enc, W_dec, b_enc, b_dec. Gates and thresholds are not counted."""
    return 4 * (2 * d_in * d_sae + d_sae + d_in)


def between(known: Mapping[Kind, SAERates], kind: Kind) -> SAERates:
    """Rates of a kind that was not measured: linear in d_sae between those of its architecture and d_in that were."""
    if kind in known:
        return known[kind]
    alike = sorted(
        (k for k in known if (k.d_in, k.architecture) == (kind.d_in, kind.architecture)), key=lambda k: k.d_sae
    )
    x = [k.d_sae for k in alike]
    names = SAERates.__dataclass_fields__
    return SAERates(**{n: float(np.interp(kind.d_sae, x, [getattr(known[k], n) for k in alike])) for n in names})


def capture_entry(work: Work, rates: Rates, placement: Placement) -> Entry:
    """Every row once, at all sites; a host does block after block."""
    each = [rates.capture * rows for split in work.blocks.values() for rows in split]
    rows = sum(work.rows.values())
    size = activation_bytes(rows, list(work.widths.values()), work.dtype) + rates.columns * rows
    return _mapped("store", each, rates.host_start, placement, rows, size)


TUNE_BYTES = 50_000
"""What Tune writes of an SAE: its reports as tables and events, and its part of the experiment's state."""


def sweep_entry(work: Work, rates: Rates, placement: Placement) -> Entry:
    """Trials of packs, one after another on each worker; a member costs in a pack what it costs alone."""
    sites: dict[str, list[SAERates]] = {}
    for site, kind in work.points:
        sites.setdefault(site, []).append(between(rates.saes, kind))
    packs = [
        members[i : i + work.pack_size] for members in sites.values() for i in range(0, len(members), work.pack_size)
    ]
    training = [sum(work.steps * m.step for m in pack) for pack in packs]
    trials = [
        max(m.start for m in pack) + sum(work.steps * m.step + work.rungs * m.rung for m in pack) for pack in packs
    ]
    members = [m for pack in packs for m in pack]
    return Entry(
        stage="sweep",
        seconds=rates.trial_start + makespan(trials, placement.workers),
        workers=min(placement.workers, len(packs)),
        cpus=placement.cpus,
        gpus=placement.gpus,
        cpu_seconds=sum(training) * placement.cpus,
        gpu_seconds=sum(training) * placement.gpus,
        tokens=len(members) * work.steps * work.batch_size,
        bytes=round(sum(m.size + TUNE_BYTES for m in members)),
    )


def evaluation_entry(
    work: Work, rates: Rates, placement: Placement, split: str, points: Sequence[tuple[str, Kind]]
) -> Entry:
    """The SAEs of `points` (site, kind) on a split: each on every row, and scored on up to `max_scored` of its tokens."""
    rows = work.rows[split]
    share = min(1.0, work.max_scored / max(rows, 1))
    per_row = sum(between(rates.saes, kind).rows for _, kind in points)
    sites = len({site for site, _ in points})
    per_scored = sites * rates.score_clean + len(points) * rates.score_sae
    each = [n * (per_row + share * per_scored) for n in work.blocks[split]]
    made = _mapped(f"evaluation ({split})", each, sites * rates.host_start, placement, rows, 0)
    return replace(made, seconds=made.seconds + len(points) * work.groups[split] * rates.intervals)


def _mapped(stage: str, each: Sequence[float], start: float, placement: Placement, tokens: int, size: float) -> Entry:
    """Blocks over a pool of hosts, which hold their devices from the start of the pool to its end."""
    seconds = start + makespan(each, placement.workers)
    held = seconds * placement.workers
    return Entry(
        stage, seconds, placement.workers, placement.cpus, placement.gpus, held * placement.cpus, held * placement.gpus,
        tokens, round(size),
    )  # fmt: skip


def in_words(entries: Sequence[Entry], spent: Mapping[str, Any]) -> str:
    """The schedule as a table, its total, and the budget (`budget.spending` of the entries) where there is one."""
    held = "gpu_seconds" if spent["device"] == "GPU" else "cpu_seconds"

    def line(name: str, wall: str, at_once: str, of: Sequence[Entry]) -> str:
        hours, tokens = sum(getattr(e, held) for e in of) / 3600, sum(e.tokens for e in of)
        return f"{name:26}{wall:>10}{at_once:>26}{hours:>14.3g}{tokens:>16,}{size(sum(e.bytes for e in of)):>11}"

    lines = [f"{'stage':26}{'wall':>10}{'at once':>26}{'device-hours':>14}{'tokens':>16}{'disk':>11}"]
    for e in entries:
        each = f"{e.workers} x {e.cpus:g} CPU" + (f" {e.gpus:g} GPU" if e.gpus else "")
        lines.append(line(e.stage, "done", "", [e]) if e.done else line(e.stage, duration(e.seconds), each, [e]))
    todo = [e for e in entries if not e.done]
    lines.append(line("to do", duration(sum(e.seconds for e in todo)), "", todo))
    lines.append("")
    lines.append(
        f"device-hours are {spent['device']}-hours held; of the disk, activations take "
        f"{spent['gigabytes']['activations']:.3g} GB; pruning is not counted on"
    )
    for item in ITEMS:
        if spent[item]["limit"] is not None:
            over = " OVER BUDGET" if spent[item]["share"] > 1 else ""
            lines.append(
                f"budget.{item}: {spent[item]['spent']:,.4g} of {spent[item]['limit']:,.4g} "
                f"({spent[item]['share']:.0%}){over}"
            )
    return "\n".join(lines)
