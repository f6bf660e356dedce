"""Cost of evaluating eight SAEs together against evaluating one, and of forward passes that start at the site.

    python benchmarks/evaluate_many.py [--repeats 5] [--json FILE]

8 TopK SAEs of 512 latents, k 16, untrained, since their quality does not change what they cost, on TinyStories,
stories260K (5 blocks, d 64), blocks.2.resid_post and blocks.4.resid_post. The target is a ratio of 2. Two ways to ask:

- in a run: the evaluation stage, `RayBench.over_blocks` over a split, from the start of its hosts to their end. First
  the validation split, all of it scored; then the training split, of which the default 50,000 tokens are scored and the
  other rows are reconstructed only. The hosts' start, some ten seconds, is shared: as much as a run pays.
- on a host: `measure_block` on one validation block of about 16,000 tokens, all scored, on a host that is there. The SAEs
  share the clean pass, both ablations and what the rows alone give. Each adds a pass of its own from the site upwards and
  what it makes of the rows. With a cost of F for what is shared and v for each SAE, (F + 8 v) / (F + v) <= 2 needs
  F >= 6 v. In the middle of the model (block 2: 2 of 5 blocks and the head above it) blocks alone have F = 5 + 2 + 2 and
  v = 2, which gives 25 / 11 = 2.3; head and SAE come on top. That ablations start at the site, too, makes one SAE cheaper
  and so the ratio worse: it is no measure of speed by itself.

  whole passes: the same, with every pass from token 0. That the sums are equal is checked. each alone: one SAE after
  another, each with its own clean pass and ablations. The parts are seconds of one evaluation of eight.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import common
import pandas as pd
import quality
import torch

from raysae.activations.store import Store
from raysae.config.sections import ClusterConfig, EvaluationConfig
from raysae.data.tokens import TokenBlock, read_block
from raysae.evaluate import fidelity
from raysae.evaluate.fidelity import Measurement, measure_block
from raysae.models.host import ModelHost
from raysae.on_ray.bench import RayBench
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig
from raysae.sae.train import untrained
from raysae.sweep.trial import input_scale

D_SAE, K, SAES = 512, 16, 8
SITES = (quality.SITE, "blocks.4.resid_post")


def main() -> int:
    args = common.parser(__doc__).parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        quality.make_store(root, 16_384, SITES)
        block = read_block(sorted((root / "tokens").glob("validation-*.parquet"))[0])
        tables = [measure(root / site, root / "store", site, block, args.repeats) for site in SITES]
        with common.local_ray(common.cores()):
            for table, site in zip(tables, SITES, strict=True):
                for split in ("validation", "train"):
                    in_a_run(table, root / site, root, site, split, args.repeats)
    return common.finish(tables, args.json, load)


def make_saes(root: Path, store: Store, site: str) -> list[tuple[str, Path]]:
    made = []
    for seed in range(SAES):
        config = SAEConfig("topk", quality.D_IN, D_SAE, k=K, seed=seed)
        formats.save(untrained(config, input_scale(store, site)), root / f"sae-{seed}")
        made.append((f"sae-{seed}", root / f"sae-{seed}"))
    return made


def measure(root: Path, store: Path, site: str, block: TokenBlock, repeats: int) -> common.Table:
    saes = make_saes(root, Store(store), site)
    host = ModelHost.load(str(quality.model_path()))

    def evaluate(name: str, members: list[tuple[str, Path]]) -> None:
        task = Measurement(store, site, tuple(members), root / name, 16_384, 1.0)
        measure_block(host, block, task)

    def alone() -> None:
        for member in saes:
            evaluate("alone", [member])

    def whole() -> None:
        with mock.patch.object(host, "start_of", lambda site: None):
            evaluate("whole", saes)

    works: dict[str, Callable[[], Any]] = {
        "one": lambda: evaluate("one", saes[:1]),
        "eight": lambda: evaluate("eight", saes),
        "whole": whole,
        "alone": alone,
    }
    evaluate("warm-up", saes[:1])
    seconds = common.alternate(works, repeats)
    sums = {name: pd.read_parquet(root / name / f"{block.name}.parquet") for name in ("eight", "whole")}

    table = common.Table.titled(
        f"{SAES} TopK SAEs of {D_SAE} latents on stories260K, {site}, {sum(len(ids) for ids in block.input_ids)} tokens"
    )
    for name, label in (
        ("one", "one SAE, s"),
        ("eight", "eight together, s"),
        ("whole", "eight together, whole passes, s"),
        ("alone", "eight, each alone, s"),
    ):
        table.add(label, common.spread(seconds[name]))
    table.add("eight / one", common.ratios(seconds["eight"], seconds["one"]), at_most=2.0)
    table.add("whole passes / passes from the site", common.ratios(seconds["whole"], seconds["eight"]))
    table.add("each alone / together", common.ratios(seconds["alone"], seconds["eight"]))
    table.add("sums equal those of whole passes", _equal(sums["eight"], sums["whole"]))
    for name, value in parts(host, lambda: evaluate("parts", saes)).items():
        table.add(f"of eight together: {name}, s", value)
    return table


def in_a_run(table: common.Table, saes_in: Path, root: Path, site: str, split: str, repeats: int) -> None:
    """Add what the evaluation of a split costs in a pool of hosts, for one SAE and for eight."""
    saes = tuple((path.name, path) for path in sorted(saes_in.glob("sae-*")))
    shards = [shard for shard in Store(root / "store").shards if shard.split == split]
    blocks = [{"name": s.name, "file": f"{s.name.rpartition('-')[0]}.parquet", "rows": s.rows} for s in shards]
    bench = RayBench(ClusterConfig(max_restarts=0))  # in the cluster that is there
    rows = sum(s.rows for s in shards)
    scored = min(1.0, EvaluationConfig().max_tokens / rows)
    model = {"name": str(quality.model_path()), "revision": None, "dtype": "float32", "trust_remote_code": False}

    def evaluate(members: tuple[tuple[str, Path], ...]) -> None:
        task = Measurement(root / "store", site, members, saes_in / "run", 16_384, scored)
        bench.over_blocks("evaluate", blocks, root / "tokens", model, task)

    seconds = common.alternate({"one": lambda: evaluate(saes[:1]), "eight": lambda: evaluate(saes)}, repeats)
    name = f"in a run, {rows} rows, {scored:.0%} scored"
    table.add(f"{name}: one SAE, s", common.spread(seconds["one"]))
    table.add(f"{name}: eight together, s", common.spread(seconds["eight"]))
    table.add(f"{name}: eight / one", common.ratios(seconds["eight"], seconds["one"]), at_most=2.0)


def _equal(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    numbers = one.columns.difference(["sae_id", "group"])
    return bool((one[numbers] - other[numbers]).abs().le(1e-6 * other[numbers].abs() + 1e-6).all(axis=None))


def parts(host: ModelHost, work: Callable[[], Any]) -> dict[str, float]:
    """Seconds that `work` spends in its parts, and in all."""
    spent: dict[str, float] = {}
    with (
        timing(spent, "the model's passes", host, "run"),
        timing(spent, "SAEs in them", fidelity.SAE, "__call__"),
        timing(spent, "cross-entropy and KL", fidelity._Clean, "compare"),
        timing(spent, "sums over stored rows", fidelity, "row_sums"),
    ):
        total = common.timed(work)
    spent["the model's passes"] -= spent["SAEs in them"]
    return {**spent, "the rest": total - sum(spent.values())}


@contextmanager
def timing(spent: dict[str, float], name: str, owner: Any, attribute: str) -> Iterator[None]:
    """Add the seconds inside `owner.attribute` to `spent[name]`."""
    original = getattr(owner, attribute)
    spent[name] = 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - start

    with mock.patch.object(owner, attribute, timed):
        yield


if __name__ == "__main__":
    sys.exit(main())
