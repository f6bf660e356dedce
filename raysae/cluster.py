"""Where work runs: the one place that decides between CPU and CUDA, sizes pools, and starts or joins Ray.

GPUs are what Ray says they are, so `--num-gpus=8` on a machine without CUDA schedules like an 8-GPU node and computes on
its CPU. Stages take turns: each pool is gone before the next stage asks for devices, so none waits for another that
waits for it (spec of Ray: a GPU pipeline inside a GPU trial never ends).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from raysae.config import ClusterConfig
from raysae.errors import UserError


def _address() -> str | None:
    """The cluster that `ray job submit` or the user put in the environment."""
    return os.environ.get("RAY_ADDRESS") or ("auto" if os.environ.get("RAY_JOB_ID") else None)


# Ray reads these when it is first imported, so they are set here, before any on_ray module imports it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would end a sweep early as if it were whole
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's classic reporter can be told which columns to show
# glibc's, for the worker processes: keep freed tensors instead of giving their pages back to the kernel, which zeroes them
# anew at each step (a fifth of the CPU time of a step at d_sae 6144, batch 2048).
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
if _address() is None:  # a cluster that is joined has its own
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else each actor pool prints Ray's issue 53727


@dataclass(frozen=True)
class Placement:
    """How many workers of a stage run at once, and what each of them holds and uses."""

    workers: int
    cpus: float
    gpus: float
    threads: int
    """torch threads of a worker."""

    def held(self, seconds: float) -> dict[str, float]:
        """CPU- and GPU-seconds that all workers hold together in so many seconds."""
        return {"cpu_seconds": seconds * self.workers * self.cpus, "gpu_seconds": seconds * self.workers * self.gpus}


@dataclass(frozen=True)
class Cluster:
    """The cluster in use. Sizes are asked for anew by each stage, since nodes come and go."""

    config: ClusterConfig
    dashboard: str | None = None
    started_here: bool = False

    @property
    def cpus(self) -> float:
        """Ray's CPUs."""
        import ray

        return float(ray.cluster_resources().get("CPU", 1))

    @property
    def gpus(self) -> int:
        """Ray's GPUs, of those as many as the config allows."""
        import ray

        total = int(ray.cluster_resources().get("GPU", 0))
        return total if self.config.num_gpus is None else min(self.config.num_gpus, total)

    @cached_property
    def device_bytes(self) -> float | None:
        """Memory of a GPU, asked of one in a task, since a driver touches none; None without CUDA."""
        return at_once(_device_bytes, [()], Placement(1, 0.0, 1.0, 1))[0][1] if self.gpus else None

    def capture(self, blocks: int) -> Placement:
        """Hosts of the model: see `place_hosts`."""
        return place_hosts(self.cpus, self.gpus, self.config.capture_actors, blocks)

    def trials(self) -> Placement:
        """Trials of the sweep: see `place_trials`."""
        return place_trials(self.cpus, self.gpus, self.config.cpus_per_trial, self.config.gpus_per_trial)


def place_hosts(cpus: float, gpus: int, wanted: int | None, blocks: int) -> Placement:
    """One host per GPU; without GPUs, `wanted` hosts or one, sharing all CPUs' threads. Never more hosts than blocks.

    A host holds half a logical CPU at most: the tasks that read its blocks need a share as well, also when a lost node
    has left the pool with a single CPU; a pool that holds all of them never reads.
    """
    if gpus:
        workers = min(wanted or gpus, gpus, max(blocks, 1))
        return Placement(workers, min(0.5, cpus / (2 * gpus)), 1.0, max(1, int(cpus // gpus)))
    workers = max(1, min(wanted or 1, int(cpus), max(blocks, 1)))
    return Placement(workers, 0.5, 0.0, max(1, int(cpus // workers)))


def place_trials(cpus: float, gpus: int, cpus_per_trial: float, gpus_per_trial: float) -> Placement:
    """Trials packed by GPU share where there are GPUs, by CPU share otherwise."""
    if gpus:
        workers = max(1, int(gpus / gpus_per_trial))
        share = min(cpus_per_trial, cpus / workers)
        return Placement(workers, share, gpus_per_trial, max(1, int(share)))
    return Placement(max(1, int(cpus / cpus_per_trial)), cpus_per_trial, 0.0, max(1, int(cpus_per_trial)))


PACK_AT_MOST = 8
"""SAEs in a pack: more have nothing left to share, and a search learns nothing while a pack trains."""
BATCH_SHARE = 0.1
"""What reading a batch once for a pack counts, beside an SAE's step on it."""
MEMORY_SHARE = 0.8
"""Of a device's memory, what a pack may plan on; the rest is the context's and the allocator's."""


def pack_size(
    saes: Sequence[int], placement: Placement, d_in: int, d_sae: int, batch_size: int, memory: float | None
) -> int:
    """SAEs in a trial: every device busy first, then packs as large as pay.

    saes: how many at each site, since a pack is of one. d_in, d_sae: of the largest. memory: bytes of a device, if known.
    On CPUs 1: there a pack gains nothing. Among the sizes that leave no trial's place empty, that of the least time until
    the last pack ends, rounds · (size + BATCH_SHARE), the larger of equals. A pack holds weights, gradients and Adam's
    moments (16 bytes a parameter) of each SAE, and three [batch, d_sae] tensors of one.
    """
    if not placement.gpus:
        return 1
    most = PACK_AT_MOST
    if memory is not None:
        room = MEMORY_SHARE * memory * min(placement.gpus, 1.0) - 12 * batch_size * d_sae
        most = min(most, int(room // (16 * (2 * d_in * d_sae + d_in + d_sae))))

    def packs(size: int) -> int:
        return sum(-(-n // size) for n in saes)

    def seconds(size: int) -> float:
        return -(-packs(size) // placement.workers) * (size + BATCH_SHARE)

    busy = min(placement.workers, sum(saes))
    fitting = [size for size in range(1, most + 1) if packs(size) >= busy]
    return min(fitting, key=lambda size: (round(seconds(size), 6), -size), default=1)


def device() -> torch.device:
    """The device of this worker. Ray sets CUDA_VISIBLE_DEVICES, so device 0 is its own."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_bytes() -> float | None:
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def at_once(
    work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], placement: Placement
) -> list[tuple[float, Any]]:
    """`work(*a)` for each `a` of `arguments`, all at once, each in a process with the share of a worker of `placement`.

    Returns, in their order, (seconds from asking until it began, result). The cluster must be connected.
    """
    import ray

    def task(asked: float, given: tuple[Any, ...]) -> tuple[float, Any]:
        began = max(time.time() - asked, 0.0)
        torch.set_num_threads(placement.threads)
        return began, work(*given)

    remote = ray.remote(num_cpus=placement.cpus, num_gpus=placement.gpus, max_retries=0)(task)
    return ray.get([remote.remote(time.time(), given) for given in arguments])


def connect(config: ClusterConfig) -> Cluster:
    """Join the cluster that the config, the job or RAY_ADDRESS names, else start a local one.

    A local cluster's dashboard listens on 127.0.0.1 only; its other ports, which Ray binds to every interface, ask for
    Ray's token (RAY_AUTH_MODE=token).
    """
    import ray

    started, on_sigterm = False, signal.getsignal(signal.SIGTERM)
    if not ray.is_initialized():
        address = config.address or _address()
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address is not None:
            try:
                ray.init(address=address, **options)
            except ConnectionError as error:
                raise UserError(f"cluster.address: no Ray cluster answers at {address}: {_first_line(error)}") from None
        else:
            ray.init(
                address="local",
                num_cpus=config.num_cpus,
                num_gpus=config.num_gpus,
                include_dashboard=config.dashboard,
                dashboard_host="127.0.0.1",
                **options,
            )
            started = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's exits without stopping what it started
    total = ray.cluster_resources()
    gpus = int(total.get("GPU", 0))
    if config.num_gpus is not None and config.num_gpus > gpus:
        raise UserError(f"cluster.num_gpus: {config.num_gpus} asked, the cluster has {gpus}")
    if gpus and config.gpus_per_trial > gpus:
        raise UserError(f"cluster.gpus_per_trial: {config.gpus_per_trial:g} asked, the cluster has {gpus}")
    if config.cpus_per_trial > total.get("CPU", 0):
        raise UserError(f"cluster.cpus_per_trial: {config.cpus_per_trial:g} asked, the cluster has {total['CPU']:g}")
    url = ray.get_runtime_context().worker.node.webui_url if hasattr(ray.get_runtime_context(), "worker") else None
    return Cluster(config, f"http://{url}" if url else None, started)


def disconnect(cluster: Cluster) -> None:
    """Stop the cluster if `connect` started it."""
    if cluster.started_here:
        import ray

        ray.shutdown()


def output_root(path: Path, given: bool) -> Path:
    """The absolute output root; refuses a relative one inside a job's temporary folder, where results would be lost."""
    if not given and os.environ.get("RAYSAE_OUTPUT"):
        path = Path(os.environ["RAYSAE_OUTPUT"]).expanduser()
    if not path.is_absolute() and "_ray_pkg_" in str(Path.cwd()):
        raise UserError(
            f"output: {path} is relative, inside the job's temporary folder; give an absolute one "
            "(--output or RAYSAE_OUTPUT)"
        )
    return path.absolute()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
