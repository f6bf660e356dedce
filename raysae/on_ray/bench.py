"""Work on a Ray cluster: blocks by Ray Data, trials by Ray Tune, other packs and calls as tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
import torch

from raysae.bench import BlockWork
from raysae.config.sections import ClusterConfig
from raysae.on_ray.cluster import Cluster, connect, disconnect
from raysae.on_ray.hosts import map_blocks
from raysae.on_ray.tune import run_sweep
from raysae.placement import Placement, device_bytes, place_hosts, place_trials
from raysae.progress import Progress, say
from raysae.sae.train import Member
from raysae.sweep.prune import Pruning
from raysae.sweep.search import PackSearch
from raysae.sweep.trial import Trial, train_whole


class RayBench:
    """See `raysae.bench.Bench`. The cluster is joined or started when it is first needed; its sizes are asked for anew by
    each stage, since nodes come and go."""

    def __init__(self, cluster: ClusterConfig, wandb_project: str | None = None) -> None:
        self.config, self.wandb_project = cluster, wandb_project

    @cached_property
    def cluster(self) -> Cluster:
        c = connect(self.config)
        say(f"Ray: {c.cpus:g} CPUs, {c.gpus} GPUs; dashboard {c.dashboard or 'off'}")
        return c

    @cached_property
    def device_bytes(self) -> float | None:
        """Asked of a GPU in a task, since a driver touches none."""
        return self.at_once(device_bytes, [()], Placement(1, 0.0, 1.0, 1))[0][1] if self.cluster.gpus else None

    def hosts(self, blocks: int) -> Placement:
        return place_hosts(self.cluster.cpus, self.cluster.gpus, self.config.capture_actors, blocks)

    def trials(self) -> Placement:
        c = self.config
        return place_trials(self.cluster.cpus, self.cluster.gpus, c.cpus_per_trial, c.gpus_per_trial)

    def over_blocks(
        self, what: str, blocks: Sequence[dict[str, Any]], tokens: Path, model: Mapping[str, Any], work: BlockWork
    ) -> float:
        placement = self.hosts(len(blocks))
        start = time.perf_counter()
        map_blocks(what, blocks, tokens, model, work, placement, self.config.max_restarts)
        return time.perf_counter() - start

    def train(self, what: str, trial: Trial, packs: Mapping[str, Sequence[Member]]) -> float:
        placement = self.trials()
        start = time.perf_counter()

        def train(site: str, pack: Sequence[Member]) -> None:
            torch.set_num_threads(placement.threads)
            train_whole(trial, site, pack)

        resources = {"num_cpus": placement.cpus, "num_gpus": placement.gpus, "max_retries": self.config.max_restarts}
        task = ray.remote(**resources)(train)
        running = {task.remote(site, pack): len(pack) for site, pack in packs.items()}
        with Progress(what, sum(running.values()), "SAE") as progress:
            while running:
                (done,), _ = ray.wait(list(running))
                ray.get(done)
                progress.advance(running.pop(done))
        return time.perf_counter() - start

    def search(self, search: PackSearch, trial: Trial, pruning: Pruning) -> dict[str, dict[str, Any]]:
        return run_sweep(search, trial, pruning, self.trials(), self.config.max_restarts, self.wandb_project)

    def at_once(
        self, work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], placement: Placement
    ) -> list[tuple[float, Any]]:
        def task(asked: float, given: tuple[Any, ...]) -> tuple[float, Any]:
            began = max(time.time() - asked, 0.0)
            torch.set_num_threads(placement.threads)
            return began, work(*given)

        _ = self.cluster
        remote = ray.remote(num_cpus=placement.cpus, num_gpus=placement.gpus, max_retries=0)(task)
        return ray.get([remote.remote(time.time(), given) for given in arguments])

    def close(self) -> None:
        if "cluster" in self.__dict__:
            disconnect(self.__dict__.pop("cluster"))
