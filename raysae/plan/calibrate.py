"""Seconds and bytes of a run's parts, measured on a small piece of it: plain functions; `planning.py` places them.

Every part is the run's own: the model host captures real sequences, `train_pack` trains each kind of SAE on them with the
schedules shortened to a few steps, and the measurement of a block is that of the evaluation. A training of few steps
stands for a long one because its sparsity, on which a step's cost depends, goes through the same rise: at d_sae 512 and
40 steps the projection was within 25 % of the full training (`benchmarks/RESULTS.md`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raysae.activations.capture import CaptureSettings, capture_block, finish
from raysae.activations.store import Store
from raysae.artifacts import MANIFEST, size_of
from raysae.data.tokens import TokenBlock, read_block
from raysae.evaluate import fidelity
from raysae.evaluate.rows import row_sums
from raysae.evaluate.statistics import Bootstrap
from raysae.files import write_json
from raysae.models.host import ModelHost
from raysae.placement import device
from raysae.plan.schedule import SAERates
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig
from raysae.sae.train import Member, Recipe, untrained
from raysae.sweep.trial import Rung, Trial, input_scale, train_pack

ROWS_AT_MOST, ROWS_AT_FIRST = 8192, 512
SECONDS_OF_CAPTURE, SECONDS_OF_TRAINING = 3.0, 20.0
"""About how long the timed parts take, whatever the model."""
STEPS_AT_FIRST, STEPS_AT_LEAST, STEPS_AT_MOST = 8, 12, 60


def head(block: TokenBlock, rows: int) -> TokenBlock:
    """The first sequences of a block, until they have so many kept tokens; at least one."""
    count, have = 0, 0
    for mask in block.loss_mask:
        if count and have >= rows:
            break
        count, have = count + 1, have + int(mask.sum())
    return block.first(count)


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall seconds of a call, with the device's work done."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclass(frozen=True)
class HostWork:
    """What one model host measures, given a training block: `<root>/host.json`, and below `root` a small store.

    rates: `work` (seconds of all this), `capture` (per row, all sites), `columns` (bytes per row), `rows` (per row, by
    place in `saes`), `score_clean`, `score_sae` (per scored token), `intervals` (per SAE and group).
    """

    validation: Path
    """Token file of the other block in the store."""
    root: Path
    settings: CaptureSettings
    saes: tuple[tuple[str, SAEConfig], ...]
    """An SAE of each kind, and its site."""
    bootstrap: Bootstrap
    threads: int
    """Of a host when there is one to each share of the blocks, as in the run."""

    def __call__(self, host: ModelHost, block: TokenBlock) -> dict[str, Any]:
        torch.set_num_threads(self.threads)
        begun = time.perf_counter()
        first = head(block, ROWS_AT_FIRST)
        capture_block(host, first, self.root / "warm", self.settings)
        spent = seconds_of(lambda: capture_block(host, first, self.root / "warm", self.settings))
        rows = min(ROWS_AT_MOST, max(ROWS_AT_FIRST, int(SECONDS_OF_CAPTURE * first.rows / spent)))
        parts = [head(block, rows), head(read_block(self.validation), rows)]
        seconds = seconds_of(lambda: capture_block(host, parts[0], self.root, self.settings))
        capture_block(host, parts[1], self.root, self.settings)
        entries = [{"name": part.name, "rows": part.rows} for part in parts]
        write_json(self.root / MANIFEST, finish(self.root, entries, self.settings, {"name": "calibration"}, 1.0))
        rates = {
            "capture": seconds / parts[0].rows,
            "columns": size_of(self.root / "rows") / sum(part.rows for part in parts),
            **self._measuring(host, parts[1]),
        }
        write_json(self.root / "host.json", {**rates, "work": time.perf_counter() - begun})
        return {"rows": block.rows}

    def _measuring(self, host: ModelHost, block: TokenBlock) -> dict[str, Any]:
        """Rates of measuring SAEs on a captured block. What SAEs share is told from what each takes by measuring one,
        then three."""
        store, rows = Store(self.root), []
        for i, (site, config) in enumerate(self.saes):
            formats.save(untrained(config, input_scale(store, site)), self.root / "saes" / str(i))
            sae = formats.load(self.root / "saes" / str(i)).to(host.device)
            row_sums({"sae": sae}, store, site, block.name)
            rows.append(seconds_of(partial(row_sums, {"sae": sae}, store, site, block.name)) / block.rows)
        site = self.saes[0][0]

        def measure(count: int) -> float:
            members = tuple((f"sae{i}", self.root / "saes" / "0") for i in range(count))
            to = self.root / f"measured{count}"
            task = fidelity.Measurement(self.root, site, members, to, self.settings.tokens_per_forward, 1.0)
            return seconds_of(lambda: fidelity.measure_block(host, block, task))

        measure(1)
        one, three = measure(1), measure(3)
        own = max(three - one, 0.0) / 2
        to, mean = self.root / "measured3", store.mean(site)
        spent = seconds_of(lambda: fidelity.collect(to, [block.name], mean, self.bootstrap))
        return {
            "rows": rows,
            "score_clean": max(one - own, 0.0) / block.rows,
            "score_sae": max(own / block.rows - rows[0], 0.0),
            "intervals": spent / 3 / len(set(block.groups)),
        }


def shorten(recipe: Recipe, steps: int) -> Recipe:
    """The recipe in so few steps, its schedules in proportion."""
    share = steps / recipe.steps
    return replace(
        recipe,
        steps=steps,
        warmup_steps=round(share * recipe.warmup_steps),
        decay_steps=round(share * recipe.decay_steps),
        sparsity_warmup_steps=round(share * recipe.sparsity_warmup_steps),
        dead_after_tokens=max(recipe.batch_size, round(share * recipe.dead_after_tokens)),
        resample_steps=tuple(max(1, round(share * step)) for step in recipe.resample_steps),
    )


def calibrate_training(trial: Trial, members: Sequence[tuple[str, Member]]) -> list[SAERates]:
    """Train each of `members` (site, SAE) alone for a few steps on the store of `trial`, below its `root`.

    `rows` of the rates is left 0: a host measures it.
    """
    found = []
    share = SECONDS_OF_TRAINING / len(members)
    for site, member in members:
        _train(trial, site, member, STEPS_AT_FIRST)  # maps the shards, warms the caches
        per_step = _train(trial, site, member, STEPS_AT_FIRST)[0] / STEPS_AT_FIRST
        steps = min(STEPS_AT_MOST, max(STEPS_AT_LEAST, int(share / max(per_step, 1e-9))))
        training, start, rung = _train(trial, site, member, steps)
        size = size_of(trial.root / "saes" / member.sae_id)
        found.append(SAERates(training / steps, rung, start, 0.0, size))
    return found


def _train(trial: Trial, site: str, member: Member, steps: int) -> tuple[float, float, float]:
    """Seconds (in steps, before the first rung but not in steps, of a rung) of a training with two rungs, of which the
    first writes its state."""
    marks: list[tuple[float, float]] = []  # when a rung was reported, and when it was done with
    trained: list[float] = []

    def report(rung: Rung) -> list[str]:
        reached = time.perf_counter()
        trained.append(rung.metrics[member.sae_id]["train_seconds"])
        if not rung.final:
            rung.save(trial.root / "state")
        marks.append((reached, time.perf_counter()))
        return []

    begun = time.perf_counter()
    train_pack(replace(trial, recipe=shorten(trial.recipe, steps), rungs=2), site, [member], report, device=device())
    # Between two rungs lie the steps and the second's measuring; its writing is like the first's.
    measuring = max(marks[1][0] - marks[0][1] - (trained[1] - trained[0]), 0.0)
    rung = measuring + marks[0][1] - marks[0][0]
    return trained[1], max(marks[0][0] - begun - trained[0] - measuring, 0.0), rung
