"""Capture over Ray Data: token blocks stream into a pool of model hosts, which write shards and return their facts.

No tensor travels through Ray: a block's tokens go in, a name and a row count come out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from raysae.activations import capture
from raysae.bench import BlockWork
from raysae.data.tokens import read_block
from raysae.errors import CaptureError, UserError
from raysae.models.host import ModelHost
from raysae.placement import Placement, device
from raysae.progress import Progress

OURS = re.compile(r"raysae\.errors\.(UserError|CaptureError): (.*)")


class HostActor:
    """A model host in a process of its own, which does `work(host, block)` on one block after another."""

    def __init__(self, model: Mapping[str, Any], work: BlockWork, limit: int, workers: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.work, self.root, self.limit = work, work.root, limit
        capture.attempt(self.root, "start of a host", limit + workers - 1)
        self.host = ModelHost.load(**model, device=device())
        (self.root / "attempts" / "start of a host").unlink(missing_ok=True)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        block = read_block(batch["bytes"][0])
        capture.attempt(self.root, block.name, self.limit)
        facts = self.work(self.host, block)
        (self.root / "attempts" / block.name).unlink(missing_ok=True)
        return {"name": np.array([block.name]), "rows": np.array([facts["rows"]])}


def map_blocks(
    what: str,
    blocks: Sequence[dict[str, Any]],
    tokens: Path,
    model: Mapping[str, Any],
    work: BlockWork,
    placement: Placement,
    max_restarts: int,
) -> None:
    """Do `work` on each of `blocks` (entries of the token manifest, files below `tokens`) in a pool of hosts.

    Returns when all are done and the pool's devices are free again. Raises UserError or CaptureError as the work did.
    """
    if not blocks:
        return
    for stale in (work.root / "attempts").glob("*"):
        stale.unlink()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    files = sorted(str((tokens / block["file"]).resolve()) for block in blocks)
    # One process reads: a block takes milliseconds, and a process for it seconds of CPU.
    read = ray.data.read_binary_files(files, override_num_blocks=len(files), num_cpus=0.1, concurrency=1)
    pool = read.map_batches(
        HostActor,
        fn_constructor_args=(model, work, max_restarts, placement.workers, placement.threads),
        batch_size=1,
        compute=ActorPoolStrategy(size=placement.workers),
        num_cpus=placement.cpus,
        num_gpus=placement.gpus,
    )
    rows = {block["name"]: block["rows"] for block in blocks}
    with Progress(what, sum(rows.values()), "tok") as progress:
        for name in _names(pool):
            progress.advance(rows[name])


def _names(pool: Any) -> Iterator[str]:
    try:
        for batch in pool.iter_batches(batch_size=None, prefetch_batches=0):
            yield from (str(name) for name in batch["name"])
    except RayError as error:
        ours = OURS.findall(str(error))  # Ray hands over a traceback, in which the last of ours is the cause
        if not ours:
            raise
        kind, message = ours[-1]
        raise {"UserError": UserError, "CaptureError": CaptureError}[kind](message.strip()) from None
