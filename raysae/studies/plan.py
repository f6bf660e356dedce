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
from typing import TYPE_CHECKING, Any

import torch

from raysae.activations.capture import CaptureSettings
from raysae.activations.store import Store
from raysae.artifacts import size_of
from raysae.config.jobs import SweepJob
from raysae.evaluate.nulls import TRAINED
from raysae.files import read_json
from raysae.models.embedded import trial_of_training
from raysae.plan.budget import spending
from raysae.plan.calibrate import HostWork, calibrate_training
from raysae.plan.schedule import (
    Entry,
    Kind,
    Rates,
    SAERates,
    Work,
    capture_entry,
    evaluation_entry,
    in_words,
    sweep_entry,
)
from raysae.progress import say
from raysae.sae.train import Member
from raysae.studies.study import bench_of
from raysae.studies.sweep import SweepStudy
from raysae.sweep.space import Common, Proposal, members
from raysae.workspace import Made

if TYPE_CHECKING:
    from raysae.bench import Bench


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


def plan(job: SweepJob, bench: Bench | None = None) -> Plan:
    """The schedule of a job. Nothing is written into the run's directory.

    UserError as for the run itself: a mistake in the config, or a budget that is certainly too small.
    """
    with bench_of(job, bench) as bench:
        return _plan(SweepStudy(job, bench), bench)


def _plan(study: SweepStudy, bench: Bench) -> Plan:
    study.prepare()
    job, workspace = study.job, study.workspace
    tokens = workspace.make(study.tokens)
    ahead = [study.model.stage, study.captured.store, study.saes, study.validation.nulls, study.validation.sums]
    have = {made.kind: made for made in workspace.find_all(stage for stage in ahead if stage is not None)}
    entries = [_done(made) for made in workspace.made.values()]
    rates = None
    if "measurement" not in have:
        work, points = count(study, tokens)
        rates = _calibrate(study, bench, tokens, points, have.get("model"))
        trials = bench.trials()
        work = replace(work, pack_size=study.sweep.pack_size(bench, study.widths))
        left = []
        if "store" not in have:
            left.append(capture_entry(work, rates, bench.hosts(len(tokens.manifest["blocks"]))))
        if "sweep" not in have:
            left.append(sweep_entry(work, rates, trials))
        nulls = job.evaluation.nulls
        beside = 1 + sum(kind not in TRAINED for kind in nulls)  # SAEs and their nulls, at most
        controls = {(site, k.architecture): (site, k) for site, k in sorted(work.points, key=lambda p: p[1].d_sae)}
        shuffled = list(controls.values()) if "shuffled_rows" in nulls else []
        widest = max(work.points, key=lambda point: point[1].d_sae)
        for split, measured in (("validation", [*list(work.points) * beside, *shuffled]), ("test", [widest] * beside)):
            hosts = bench.hosts(len(work.blocks[split]))
            left.append(evaluation_entry(work, rates, hosts, split, measured))
        left[0] = replace(left[0], seconds=left[0].seconds + rates.ray_start)
        entries += [rates.model] if rates.model is not None else []
        entries += left
    budget = spending([entry.ledger() for entry in entries], job.budget.model_dump())
    return Plan(tuple(entries), budget, rates, left_out(job))


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


def _done(made: Made) -> Entry:
    """A finished stage at what it did cost."""
    c = made.manifest["cost"]
    seconds, cpu, gpu, tokens, size = (
        c.get(k, 0) for k in ("seconds", "cpu_seconds", "gpu_seconds", "tokens", "bytes")
    )
    return Entry(made.kind, seconds, 1, 0.0, 0.0, cpu, gpu, tokens, size, done=True)


def count(study: SweepStudy, tokens: Made) -> tuple[Work, list[Proposal]]:
    """What the config asks for, and a proposal of each kind of SAE that has to be timed."""
    c, widths = study.job, study.widths
    proposed = study.sweep.points(widths)[0]
    kinds = {
        p: Kind(widths[p.site], p.architecture, max(1, round(p.expansion_factor * widths[p.site]))) for p in proposed
    }
    blocks: dict[str, list[int]] = {split: [] for split in tokens.manifest["rows"]}
    for block in tokens.manifest["blocks"]:
        blocks[block["split"]].append(block["rows"])
    shared = study.sweep.recipe
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


def _calibrate(
    study: SweepStudy, bench: Bench, tokens: Made, points: Sequence[Proposal], embedded: Made | None
) -> Rates:
    """Rates of this machine, measured in a folder that is gone afterwards. `embedded` is that model, if trained."""
    c, widths, model = study.job, study.widths, study.model
    training = None
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=study.root) as name:
        folder = Path(name)
        made = {} if embedded is None else {"model": embedded}
        if model.stage is not None and embedded is None:
            say("plan: timing the training of the embedded model")
            seconds, trained = trial_of_training(folder / "model", c.seed)
            threads = torch.get_num_threads()
            size = size_of(folder / "model")
            training = Entry("model", seconds, 1, threads, 0.0, seconds * threads, 0.0, trained, size)
            made = {"model": Made(folder / "model", {"stage": "model"}, reused=False)}
        begun = time.perf_counter()
        trials = bench.trials()
        ray_start = time.perf_counter() - begun

        say("plan: timing capture and measurement")
        blocks = {block["split"]: block for block in reversed(tokens.manifest["blocks"])}
        settings = CaptureSettings(tuple(widths), c.capture.dtype, c.capture.tokens_per_forward, c.seed)
        configs = tuple((p.site, _member(p, study, Common()).config) for p in points)
        threads = bench.hosts(len(tokens.manifest["blocks"])).threads
        work = HostWork(
            tokens.path / blocks["validation"]["file"], folder / "store", settings, configs, study.measuring.bootstrap,
            threads,
        )  # fmt: skip
        (folder / "store").mkdir()
        wall = bench.over_blocks("plan", [blocks["train"]], tokens.path, model.loading(made), work)
        host = read_json(folder / "store" / "host.json")

        saes = len(study.sweep.points(widths)[0]) * len(c.sweep.seeds)
        many = max(1, min(trials.workers, -(-saes // study.sweep.pack_size(bench, study.widths))))
        say(f"plan: timing {len(points)} kinds of SAEs, {many} at once")
        common = study.sweep.common(Store(folder / "store"))
        chosen = [(p.site, _member(p, study, common)) for p in points]
        work_of = [(study.sweep.trial(folder / "store", folder / f"trial{i}", {}, 2), chosen) for i in range(many)]
        measured = bench.at_once(calibrate_training, work_of, trials)
    rates_of: dict[Kind, SAERates] = {}
    for i, (_, config) in enumerate(configs):
        each = [rates[i] for _, rates in measured]
        mean = {f: fmean(getattr(r, f) for r in each) for f in SAERates.__dataclass_fields__}
        rates_of[Kind(config.d_in, config.architecture, config.d_sae)] = SAERates(**{**mean, "rows": host["rows"][i]})
    return Rates(
        saes=rates_of,
        ray_start=ray_start,
        host_start=max(wall - host["work"], 0.0),
        trial_start=max(began for began, _ in measured),
        **{name: host[name] for name in ("capture", "columns", "score_clean", "score_sae", "intervals")},
        model=training,
    )


def _member(proposal: Proposal, study: SweepStudy, common: Common) -> Member:
    """An SAE of a proposal, with a typical coefficient where the search would choose it."""
    s, (_, stated) = study.job.sweep, study.sweep.coefficients(proposal.architecture)
    typical = math.sqrt(stated[0] * stated[1]) if s.search == "optuna" else median(stated)
    return members(proposal, typical, study.widths[proposal.site], s.seeds[:1], common)[0]
