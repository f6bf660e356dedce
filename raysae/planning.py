"""`plan`: a run's schedule before it runs, from a calibration that takes seconds to a minute.

Records and tokens are made as the run would make them, which it then takes over; the rest is measured on a small piece in
a folder of its own, below the output root, that is gone afterwards. The calibration runs where the run would: hosts and
trials get the devices and threads of their placement, and as many trials as will run at once are timed at once.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from raysae.activations.capture import CaptureSettings
from raysae.activations.store import Store
from raysae.artifacts import Stage, size_of
from raysae.budget import spending
from raysae.calibrate import HostWork, calibrate_training
from raysae.config import SweepJob
from raysae.evaluate.nulls import TRAINED
from raysae.files import read_json
from raysae.flow import Flow
from raysae.models.embedded import trial_of_training
from raysae.progress import say
from raysae.sae.train import Member
from raysae.schedule import Entry, Kind, Rates, SAERates, Work, capture_entry, evaluation_entry, in_words, sweep_entry
from raysae.stages import coefficients
from raysae.sweep.space import Common, Proposal, members


@dataclass(frozen=True)
class Plan:
    """The schedule of a run by stage, what it would spend of its budget, and the rates behind it."""

    entries: tuple[Entry, ...]
    budget: dict[str, Any]
    rates: Rates | None
    left_out: tuple[str, ...]
    """What the run will do besides, which is not projected."""

    def __str__(self) -> str:
        besides = f"\nnot projected: {', '.join(self.left_out)}" if self.left_out else ""
        return in_words(self.entries, self.budget) + besides


def plan(config: SweepJob) -> Plan:
    """The schedule of the job of `config`. Nothing is written into the run's directory.

    UserError as for the run itself: a mistake in the config, or a budget that is certainly too small.
    """
    flow = Flow(config)
    try:
        return _plan(flow)
    finally:
        flow.close()


def _plan(flow: Flow) -> Plan:
    tokens = flow.prepare().tokens
    made = flow.made(tokens)
    entries = [_done(stage) for stage in flow.finished]
    have = [stage.manifest["stage"] for stage in made]
    rates = None
    if "evaluation" not in have:
        work, points = count(flow, tokens)
        model = next((str(s.path) for s in made if s.manifest["stage"] == "model"), None)
        rates = _calibrate(flow, tokens, points, model)
        trials = flow.cluster.trials()
        work = replace(work, pack_size=flow.pack_size(trials))
        ahead = []
        if "store" not in have:
            ahead.append(capture_entry(work, rates, flow.cluster.capture(len(tokens.manifest["blocks"]))))
        if "sweep" not in have:
            ahead.append(sweep_entry(work, rates, trials))
        beside = 1 + sum(kind not in TRAINED for kind in flow.config.evaluation.nulls)  # SAEs and their nulls, at most
        controls = {(site, k.architecture): (site, k) for site, k in sorted(work.points, key=lambda p: p[1].d_sae)}
        shuffled = list(controls.values()) if "shuffled_rows" in flow.config.evaluation.nulls else []
        widest = max(work.points, key=lambda point: point[1].d_sae)
        for split, measured in (("validation", [*list(work.points) * beside, *shuffled]), ("test", [widest] * beside)):
            hosts = flow.cluster.capture(len(work.blocks[split]))
            ahead.append(evaluation_entry(work, rates, hosts, split, measured))
        ahead[0] = replace(ahead[0], seconds=ahead[0].seconds + rates.ray_start)
        if rates.model is not None:
            entries.append(rates.model)
        entries += ahead
    budget = spending([entry.ledger() for entry in entries], flow.config.budget.model_dump())
    return Plan(tuple(entries), budget, rates, left_out(flow.config))


def left_out(config: SweepJob) -> tuple[str, ...]:
    """The stages after the measurement that the config asks for and no schedule projects."""
    e = config.evaluation
    extra = [kind for kind in e.nulls if kind not in ("untrained", "random_encoder")]
    asked = {
        f"nulls ({', '.join(extra)})": bool(extra),
        "stability": len(config.sweep.seeds) > 1,
        "features": e.features != "none",
        "probes": bool(config.probes.labels),
        "transfer": bool(config.transfer),
        "invariance": e.invariance > 0,
    }
    return tuple(name for name, wanted in asked.items() if wanted)


def _done(stage: Stage) -> Entry:
    """A finished stage at what it did cost."""
    c = stage.manifest["cost"]
    seconds, cpu, gpu, tokens, size = (
        c.get(k, 0) for k in ("seconds", "cpu_seconds", "gpu_seconds", "tokens", "bytes")
    )
    return Entry(stage.manifest["stage"], seconds, 1, 0.0, 0.0, cpu, gpu, tokens, size, done=True)


def count(flow: Flow, tokens: Stage) -> tuple[Work, list[Proposal]]:
    """What the config asks for, and a proposal of each kind of SAE that has to be timed."""
    c, widths = flow.config, flow.widths()
    proposed = flow.points(widths)
    kinds = {
        p: Kind(widths[p.site], p.architecture, max(1, round(p.expansion_factor * widths[p.site]))) for p in proposed
    }
    blocks: dict[str, list[int]] = {split: [] for split in tokens.manifest["rows"]}
    for block in tokens.manifest["blocks"]:
        blocks[block["split"]].append(block["rows"])
    shared = flow.recipe()
    work = Work(
        rows=tokens.manifest["rows"],
        blocks=blocks,
        groups=tokens.manifest["examples"],
        widths=widths,
        dtype=c.capture.dtype,
        points=[(p.site, kind) for p, kind in kinds.items() for _ in c.sweep.seeds],
        steps=shared.steps,
        batch_size=shared.batch_size,
        rungs=c.training.rungs,
        pack_size=1,
        max_scored=c.evaluation.max_tokens,
    )
    return work, to_time(kinds)


def to_time(kinds: Mapping[Proposal, Kind]) -> list[Proposal]:
    """Of each d_in and architecture the narrowest, the middle and the widest; the rest lies between."""
    first: dict[Kind, Proposal] = {}
    for proposal, kind in kinds.items():
        first.setdefault(kind, proposal)
    chosen: list[Proposal] = []
    for of in dict.fromkeys((k.d_in, k.architecture) for k in first):
        alike = sorted((k for k in first if (k.d_in, k.architecture) == of), key=lambda k: k.d_sae)
        chosen += [first[k] for k in dict.fromkeys((alike[0], alike[len(alike) // 2], alike[-1]))]
    return chosen


def _calibrate(flow: Flow, tokens: Stage, points: Sequence[Proposal], model: str | None) -> Rates:
    """Rates of this machine, measured in a folder that is gone afterwards. `model` is the embedded one's, if trained."""
    c, widths = flow.config, flow.widths()
    training = None
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=flow.root) as name:
        folder = Path(name)
        if c.model.name != "embedded":
            model = c.model.name
        elif model is None:
            say("plan: timing the training of the embedded model")
            seconds, trained = trial_of_training(folder / "model", c.seed)
            model, threads = str(folder / "model"), torch.get_num_threads()
            size = size_of(folder / "model")
            training = Entry("model", seconds, 1, threads, 0.0, seconds * threads, 0.0, trained, size)
        begun = time.perf_counter()
        trials = flow.cluster.trials()
        ray_start = time.perf_counter() - begun

        say("plan: timing capture and measurement")
        blocks = {block["split"]: block for block in reversed(tokens.manifest["blocks"])}
        settings = CaptureSettings(tuple(widths), c.capture.dtype, c.capture.tokens_per_forward, c.seed)
        configs = tuple((p.site, _member(p, flow, Common()).config) for p in points)
        work = HostWork(
            tokens.path / blocks["validation"]["file"], folder / "store", settings, configs, flow.bootstrap
        )
        (folder / "store").mkdir()
        placement = flow.cluster.capture(len(tokens.manifest["blocks"]))
        wall = flow._map_blocks("plan", [blocks["train"]], tokens.path, folder / "store", model, work, placement)
        host = read_json(folder / "store" / "host.json")

        many = max(1, min(trials.workers, -(-len(flow.points(widths)) * len(c.sweep.seeds) // flow.pack_size(trials))))
        say(f"plan: timing {len(points)} kinds of SAEs, {many} at once")
        common = flow.common(Store(folder / "store"))
        chosen = [(p.site, _member(p, flow, common)) for p in points]
        work_of = [
            (flow.trial(folder / "store", flow.recipe(), 2, folder / f"trial{i}", {}), chosen) for i in range(many)
        ]
        from raysae.on_ray.cluster import at_once

        measured = at_once(calibrate_training, work_of, trials)
    saes: dict[Kind, SAERates] = {}
    for i, (_, config) in enumerate(configs):
        each = [rates[i] for _, rates in measured]
        mean = {f: fmean(getattr(r, f) for r in each) for f in SAERates.__dataclass_fields__}
        saes[Kind(config.d_in, config.architecture, config.d_sae)] = SAERates(**{**mean, "rows": host["rows"][i]})
    return Rates(
        saes=saes,
        ray_start=ray_start,
        host_start=max(wall - host["work"], 0.0),
        trial_start=max(began for began, _ in measured),
        **{name: host[name] for name in ("capture", "columns", "score_clean", "score_sae", "intervals")},
        model=training,
    )


def _member(proposal: Proposal, flow: Flow, common: Common) -> Member:
    """An SAE of a proposal, with a typical coefficient where the search would choose it."""
    s = flow.config.sweep
    ranges, values = coefficients(s)
    low, high = ranges[proposal.architecture]
    typical = math.sqrt(low * high) if s.search == "optuna" else median(values[proposal.architecture])
    d_in = flow.widths()[proposal.site]
    return members(proposal, typical, d_in, s.seeds[:1], common)[0]
