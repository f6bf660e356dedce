"""Reading the store in training order against a plain sequential read of the same files.

    python benchmarks/store.py [--gigabytes 0.8] [--repeats 7] [--json FILE]

`Store.batches` is drained for one epoch and every batch copied into one preallocated buffer, so that every byte is
touched. The plain read fills a buffer of the same size by `readinto`, file after file. Files are in the page cache (one
untimed pass of each goes first), copies use one thread, and both start a repeat without open files or mappings: this is
a trial's first epoch. Later epochs, whose mappings are there, and conversion to float32 (what the trainer does) are
given beside it; for the latter the plain read converts each buffer, too.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import common
import torch

from raysae.activations import store as store_module
from raysae.activations.store import Store

SITE, D_MODEL, BATCH, SHARD_ROWS = "blocks.6.resid_post", 768, 2048, 65_536


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.8, help="size of the store (default 0.8)")
    args = parser.parse_args()
    load = common.os.getloadavg()[0]
    torch.set_num_threads(1)
    shards = max(1, round(args.gigabytes * 1e9 / (SHARD_ROWS * D_MODEL * 2)))
    with tempfile.TemporaryDirectory() as directory:
        base = torch.randn(SHARD_ROWS, D_MODEL, generator=torch.Generator().manual_seed(0)).bfloat16()
        common.write_store(Path(directory) / "store", SITE, {"train": [base.roll(i, 0) for i in range(shards)]})
        table = measure(Path(directory) / "store", max(args.repeats, 5))
    return common.finish([table], args.json, load)


def measure(path: Path, repeats: int) -> common.Table:
    store = Store(path)
    files = sorted((path / SITE).glob("*.safetensors"))
    steps = store.rows("train") // BATCH
    size = steps * BATCH * D_MODEL * 2
    buffer = torch.empty(BATCH, D_MODEL, dtype=torch.bfloat16)
    floats = torch.empty(BATCH, D_MODEL)
    raw = memoryview(buffer.view(torch.uint8).view(-1).numpy())

    def plain(then: Callable[[], object] = lambda: None) -> None:
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(raw):
                    then()

    def drain(into: torch.Tensor, fresh: bool) -> None:
        if fresh:
            store_module._map_tensor.cache_clear()
        for batch in islice(Store(path).batches(SITE, "train", BATCH), steps):
            into.copy_(batch)

    works = {
        "plain": plain,
        "store": lambda: drain(buffer, fresh=True),
        "store, later epochs": lambda: drain(buffer, fresh=False),
        "plain, float32": lambda: plain(lambda: floats.copy_(buffer)),
        "store, float32": lambda: drain(floats, fresh=True),
    }
    common.alternate(works, 1)
    seconds = common.alternate(works, repeats)
    table = common.Table.titled(
        f"store of {size / 1e9:.2f} GB, {len(files)} shards, batches of {BATCH} x {D_MODEL} bf16"
    )
    for name, taken in seconds.items():
        table.add(f"{name}, GB/s", common.spread([size / s / 1e9 for s in taken]))
    table.add("store / plain", common.ratios(seconds["plain"], seconds["store"]), at_least=0.7)
    table.add("store / plain, later epochs", common.ratios(seconds["plain"], seconds["store, later epochs"]))
    table.add(
        "store / plain, float32", common.ratios(seconds["plain, float32"], seconds["store, float32"]), at_least=0.7
    )
    return table


if __name__ == "__main__":
    sys.exit(main())
