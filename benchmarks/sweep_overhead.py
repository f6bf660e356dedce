"""A sweep through Ray Tune against nothing but the training steps of its SAEs, one after another.

    python benchmarks/sweep_overhead.py [--steps 240] [--repeats 3] [--json FILE]

Sixteen SAEs (relu and topk, expansion factors 4 and 8, four coefficients each) of d_in 96, one to a trial, no pruning.

- sweep: `RayBench.search` from start to end, in a Ray cluster that is already up: trials' processes with their
  imports, searching, reading the store, validation at rungs, reports, checkpoints, saving the SAEs.
- steps: `Pack.train` of each SAE over the same batches of the same store, summed, in this process with all cores'
  threads. Building the SAE and opening the store are left out. Half of them run before the sweep, half after it.

The target is on sweep / steps. The sweep runs a trial per core with a thread each, so where threads scale badly it may
beat the sum. That is a gain of its placement, not of low overhead: `wait` therefore gives the share of the cores' time,
from start to end, in which no trial was in its training steps (by the trials' own clocks, which count a core that
another process takes as used).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from itertools import islice
from pathlib import Path

import common
import torch

from raysae.activations.store import Store
from raysae.config.sections import ClusterConfig
from raysae.on_ray.bench import RayBench
from raysae.sae.train import Member, Pack
from raysae.sweep.prune import Pruning
from raysae.sweep.search import PackSearch
from raysae.sweep.space import Common, members, proposals, recipe
from raysae.sweep.trial import Trial, input_scale

SITE, D_IN, BATCH, RUNGS = "blocks.2.resid_post", 96, 2048, 5
COMMON = Common()
PLAN = proposals(
    {SITE: D_IN}, ("relu", "topk"), (4, 8), {"relu": (0.02, 0.05, 0.1, 0.2), "topk": (4, 8, 16, 32)}, samples=0
)


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=240, help="training steps of each SAE (default 240)")
    parser.set_defaults(repeats=1)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory, common.local_ray(common.cores()):
        store = write_activations(Path(directory) / "store")
        rounds = [measure(store, Path(directory) / f"round-{i}", args.steps) for i in range(args.repeats)]
    found = {name: [r[name] for r in rounds] for name in rounds[0]}
    title = (
        f"sweep of {len(PLAN)} SAEs, d_in {D_IN}, {args.steps} steps of {BATCH} rows, {common.cores()} trials at once"
    )
    table = common.Table.titled(title)
    for name, values in found.items():
        table.add(name, common.spread(values))
    table.add("sweep / steps", common.ratios(found["sweep, s"], found["steps, s"]), at_most=1.25)
    return common.finish([table], args.json, load)


def write_activations(path: Path) -> Path:
    """Sparse combinations of 512 directions: what an SAE can learn, so that latents live and coefficients matter."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(512, D_IN, generator=generator), dim=1)

    def rows(count: int) -> torch.Tensor:
        on = torch.rand(count, 512, generator=generator) < 8 / 512
        return ((on * torch.rand(count, 512, generator=generator)) @ directions).bfloat16()

    common.write_store(path, SITE, {"train": [rows(65_536) for _ in range(4)], "validation": [rows(8192)]})
    return path


def measure(store: Path, root: Path, steps: int) -> dict[str, float]:
    """Seconds of the sweep and of the bare steps, and where the sweep's time went."""
    shared = recipe(steps * BATCH, BATCH, 0.05, 0.2, 0.1, 1_000_000)
    saes = [member for p in PLAN for member in members(p, p.coefficient or 0, D_IN, [0], COMMON)]
    trial = Trial(Store(store), shared, RUNGS, 0, root, {"model_name": "synthetic"})
    bench = RayBench(ClusterConfig(max_restarts=0))  # in the cluster that is there
    placement = bench.trials()
    search = PackSearch(PLAN, {SITE: D_IN}, {}, [0], COMMON, pack_size=1, seed=0)

    def bare(member: Member) -> float:
        opened = Store(store)
        scale = input_scale(opened, SITE)
        pack = Pack([member], shared, scale)
        batches = islice(opened.batches(SITE, "train", BATCH), steps)
        return common.timed(lambda: pack.train(batches))

    def sweep() -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # Tune's tables
            errors = bench.search(search, trial, Pruning())
        if errors:
            raise RuntimeError(f"trials failed: {errors}")

    bare(saes[0])  # warm-up
    seconds = [bare(member) for member in saes[1::2]]
    wall = common.timed(sweep)
    seconds += [bare(member) for member in saes[0::2]]
    last = [file.read_text().splitlines()[-1] for file in (root / "history").glob("*.jsonl")]
    trained = sum(json.loads(line)["train_seconds"] for line in last)
    return {
        "sweep, s": wall,
        "steps, s": sum(seconds),
        "training within the trials, s": trained,
        "wait, share of the cores' time": 1 - trained / (wall * placement.workers),
    }


if __name__ == "__main__":
    sys.exit(main())
