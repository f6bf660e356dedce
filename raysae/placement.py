"""How many workers of a stage run at once and what each of them holds: arithmetic over CPUs, GPUs and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


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


def device_bytes() -> float | None:
    """Memory of that device; None without CUDA."""
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
