"""What the benchmarks share: repeats, the table with its targets, machine facts, a synthetic store, a local Ray.

Runs that are compared alternate, so that a load that comes and goes falls on both; figures are medians with the
interquartile range in brackets. Import this module before torch and Ray: it sets their environment.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

for _name, _value in {
    "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait slow a busy machine's figures up to fivefold
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # the cluster below listens on 127.0.0.1 only
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(_name, _value)

import torch
from safetensors.torch import save_file

from raysae.files import write_json


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements and their interquartile range."""

    median: float
    low: float
    high: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of a single value, itself."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


@dataclass
class Table:
    """Rows of (name, value, target, ok). A row without a target is there to be known, and is always ok."""

    title: str
    rows: list[dict[str, Any]]

    @classmethod
    def titled(cls, title: str) -> Table:
        return cls(title, [])

    def add(
        self,
        name: str,
        value: Spread | float | str | bool,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        number = value.median if isinstance(value, Spread) else value
        target = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}" if at_most is not None else ""
        ok = not isinstance(number, bool) or number
        if at_least is not None or at_most is not None:
            assert not isinstance(number, str)
            ok = number >= at_least if at_least is not None else number <= (at_most or 0.0)
        stored = asdict(value) if isinstance(value, Spread) else value
        self.rows.append({"name": name, "value": stored, "shown": _shown(value), "target": target, "ok": ok})

    def __str__(self) -> str:
        head = {"name": "", "shown": "value", "target": "target", "ok": "ok"}
        lines = [head, *({**row, "ok": ("yes" if row["ok"] else "NO") if row["target"] else ""} for row in self.rows)]
        width = {key: max(len(str(line[key])) for line in lines) for key in head}
        text = ["  ".join(str(line[key]).ljust(width[key]) for key in head).rstrip() for line in lines]
        return "\n".join([self.title, text[0], "-" * (sum(width.values()) + 6), *text[1:]])


def _shown(value: Spread | float | str | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> dict[str, Any]:
    """Where and when the figures were measured. `load` is the mean number of runnable threads of the last minute."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": cores(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of every benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=5, help="measurements behind each median (default 5)")
    made.add_argument("--threads", type=int, default=cores(), help="torch threads (default: all cores; see RESULTS.md)")
    made.add_argument("--json", type=Path, help="write the tables and the machine's facts to this file")
    return made


def finish(tables: Sequence[Table], json_path: Path | None, load_before: float) -> int:
    """Print the tables, write them if asked to, and return the exit status: 1 where a target or a check was missed."""
    facts = {**machine(), "load_before": round(load_before, 2)}
    for table in tables:
        print(f"\n{table}")
    print(
        f"\n{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']} with {facts['torch_threads']} threads, "
        f"load {facts['load_before']} before and {facts['load']} after, {facts['date']}"
    )
    if json_path is not None:
        write_json(json_path, {"machine": facts, "tables": {table.title: table.rows for table in tables}})
    return 0 if all(row["ok"] for table in tables for row in table.rows) else 1


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each of `works` in `repeats` rounds. Every other round runs backwards, so that none always follows
    the same neighbour's caches."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(repeats):
        for name in list(works) if i % 2 == 0 else reversed(works):
            seconds[name].append(timed(works[name]))
    return seconds


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the ratios within each round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


@contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    """A Ray cluster of this process's own, whatever else runs on the machine."""
    import ray

    ray.init(
        address="local",
        num_cpus=cpus,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _node_ip_address="127.0.0.1",
    )
    try:
        yield
    finally:
        ray.shutdown()


def write_store(path: Path, site: str, shards: dict[str, Sequence[torch.Tensor]]) -> None:
    """A store in `activations.store`'s layout of these bf16 shards [rows, d_model] by split, without row columns."""
    (path / site).mkdir(parents=True)
    listed = []
    for split, parts in shards.items():
        for i, x in enumerate(parts):
            name = f"{split}-{i:05d}-{i:08x}"
            save_file({"x": x}, path / site / f"{name}.safetensors")
            listed.append({"name": name, "split": split, "rows": x.shape[0], "sha256": {}})
    x = shards["train"][0].double()  # one shard is sample enough for the scale of synthetic data
    facts = {
        "d_model": x.shape[1],
        "mean": x.mean(0).tolist(),
        "mean_square_norm": x.square().sum(1).mean().item(),
        "non_finite": 0,
    }
    rows = {split: sum(x.shape[0] for x in parts) for split, parts in shards.items()}
    model = {"name": "synthetic", "revision": None, "class": "none", "weights": None}
    manifest = {"schema_version": 1, "model": model, "sites": {site: facts}, "dtype": "bfloat16", "rows": rows}
    write_json(path / "manifest.json", manifest | {"shards": listed})
