"""Where work runs. A bench puts token blocks before hosts of a model and packs of SAEs before trials; what is done there is
plain functions, and on a CPU has the same bits from every bench.

`LocalBench` is a loop in this process. `raysae.on_ray.bench.RayBench` places on a Ray cluster.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import torch

from raysae.data.tokens import TokenBlock, read_block
from raysae.models.host import ModelHost
from raysae.placement import Placement, device, device_bytes
from raysae.progress import Progress
from raysae.sae.train import Member
from raysae.sweep.prune import Pruning, Rungs
from raysae.sweep.trial import ProposedPack, Rung, Trial, advance, train_proposed, train_whole

if TYPE_CHECKING:
    from raysae.sweep.search import PackSearch


class BlockWork(Protocol):
    """What is done with a block. Picklable: it travels to the hosts."""

    @property
    def root(self) -> Path:
        """Of what it writes."""

    def __call__(self, host: ModelHost, block: TokenBlock) -> Mapping[str, Any]:
        """Do it; returns at least the block's `rows`."""


class Bench(Protocol):
    """Devices and processes to work with, taken when they are first needed."""

    @property
    def device_bytes(self) -> float | None:
        """Memory of a GPU; None without CUDA."""

    def hosts(self, blocks: int) -> Placement:
        """Of hosts of a model for so many blocks."""

    def trials(self) -> Placement:
        """Of trials of a sweep."""

    def over_blocks(
        self, what: str, blocks: Sequence[dict[str, Any]], tokens: Path, model: Mapping[str, Any], work: BlockWork
    ) -> float:
        """Do `work` on each of `blocks` (entries of the token manifest, files below `tokens`), by hosts of a model.

        what: how it is called to the user. model: arguments of `ModelHost.load`. Returns wall seconds when all are done and
        the devices are free again. Raises UserError or CaptureError as the work did.
        """

    def train(self, what: str, trial: Trial, packs: Mapping[str, Sequence[Member]]) -> float:
        """Train one pack per site to its end; nothing is searched or pruned. Returns wall seconds."""

    def search(self, search: PackSearch, trial: Trial, pruning: Pruning) -> dict[str, dict[str, Any]]:
        """Train what a search proposes, or what is left of it. Returns {sae_id: {facts..., message}} of SAEs that failed
        for good."""

    def at_once(
        self, work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], placement: Placement
    ) -> list[tuple[float, Any]]:
        """`work(*a)` for each `a` of `arguments`, as many at once as can be, each with the share of a worker.

        Returns, in their order, (seconds from asking until it began, result).
        """

    def close(self) -> None:
        """Give back what was taken."""


class LocalBench:
    """One thing after another in this process, with torch's threads as they are, on its GPU if there is one."""

    def __init__(self, max_restarts: int = 2) -> None:
        self.max_restarts = max_restarts
        """How often a trial that failed is tried again."""

    @cached_property
    def device_bytes(self) -> float | None:
        return device_bytes()

    def hosts(self, blocks: int) -> Placement:
        return self.trials()

    def trials(self) -> Placement:
        threads = torch.get_num_threads()
        return Placement(1, threads, float(torch.cuda.is_available()), threads)

    def over_blocks(
        self, what: str, blocks: Sequence[dict[str, Any]], tokens: Path, model: Mapping[str, Any], work: BlockWork
    ) -> float:
        start = perf_counter()
        if blocks:
            host = ModelHost.load(**model, device=device())
            with Progress(what, sum(block["rows"] for block in blocks), "tok") as progress:
                for block in blocks:
                    work(host, read_block(tokens / block["file"]))
                    progress.advance(block["rows"])
        return perf_counter() - start

    def train(self, what: str, trial: Trial, packs: Mapping[str, Sequence[Member]]) -> float:
        start = perf_counter()
        with Progress(what, sum(map(len, packs.values())), "SAE") as progress:
            for site, pack in packs.items():
                train_whole(trial, site, pack)
                progress.advance(len(pack))
        return perf_counter() - start

    def search(self, search: PackSearch, trial: Trial, pruning: Pruning) -> dict[str, dict[str, Any]]:
        failed: dict[str, dict[str, Any]] = {}
        if search.nothing_left:
            return failed
        rungs, seen = Rungs(trial.root, pruning), dict[str, int]()

        def train(pack: ProposedPack, restarts: int) -> bool:
            def report(rung: Rung) -> Mapping[str, str]:
                search.reported(rung.metrics)
                advance(progress, seen, pack.state, rung.metrics)
                return {} if rung.final else rungs.reasons(pack.site, rung.metrics)

            try:
                return train_proposed(trial, pack, pruning, report)
            except Exception:
                if not restarts:
                    raise
            return train(pack, restarts - 1)

        with Progress("sweep", search.saes_left * trial.tokens, "SAE-tok") as progress:
            while (pack := search.propose()) is not None:
                try:
                    fits = train(pack, self.max_restarts)
                except Exception as error:
                    failed |= pack.failure(traceback.format_exception_only(error)[-1].strip().splitlines()[-1])
                    search.failed(pack)
                    continue
                if fits:
                    search.trained(pack)
                else:
                    search.did_not_fit(pack)
        return failed

    def at_once(
        self, work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], placement: Placement
    ) -> list[tuple[float, Any]]:
        return [(0.0, work(*given)) for given in arguments]

    def close(self) -> None:
        pass
