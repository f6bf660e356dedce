"""Training steps: ours and those of SAELens, dictionary_learning and sparsify, on identical work.

    python benchmarks/train_step.py [--d-model 64 256 768 2048] [--single 256 768] [--quick] [--json FILE]

Every trainer does whole steps (forward, backward, clipping, optimizer, count of dead latents, decoder norms), as
`peers.py` drives it, on the same batches of 4096 rows in memory. All take turns in one process, so that other load falls
on all; a figure is the median of the rounds with its quartiles.

- Packs: ReLU + L1 SAEs of expansion factors 4 and 8 with four L1 coefficients each (d_model 2048 on a CPU: one of
  factor 4), as one pack of ours, in SAELens' MultiSAETrainer, and in dictionary_learning's loop over its trainers. On
  CUDA also 16 of factors 2 to 32. Twice: with half of the latents firing, as at the start, and with 3 %, for which all
  encoder biases are lowered, as after the first tenth of a training (where ours computes with the entries that fire).
- Singles: one SAE of expansion factor 8 by architecture (k = 32), with no latent dead and with 5 % switched off and
  counted as dead in each library, so that AuxK has the same work.
- Memory: the most that a step holds above what the process held before the SAE was made, in a process of its own. On a
  CPU it is the resident set's high-water mark, reset before the step and counted from after a small SAE's training, so
  that libraries are loaded; malloc is told to give freed pages back. It includes what products pack for themselves. On
  CUDA it is the allocator's count. The bound: weights, gradients, Adam's two moments, and three tensors [batch, d_sae],
  all float32.

Trainers run in float32 and, where bfloat16 products are not far slower here (see BF16_WORTH), with them, too; SAELens'
TopK also with sparse activations. A setting that its first steps show to be 1.5 times slower than another of its library
is left out and named. A library stands for its setting with the highest median. A step counts as 10 d_in d_sae FLOP per
token (4 forward, 6 backward), against the fastest plain product measured between the steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import common
import peers
import torch
from peers import Spec

from raysae.sae.train import Recipe, product_dtype

K, L1 = 32, (0.02, 0.03, 0.05, 0.08)
BY_L1 = ("relu", "relu_unit_norm", "gated", "p_anneal")
BY_TOPK = ("topk", "batchtopk", "matryoshka")
PACK_TARGETS, SINGLE_TARGET, MEMORY_TARGET = {64: 2.2, 256: 3.0, 768: 2.0}, 3.0, 1.3
BF16_WORTH = 0.5
"""bfloat16 is tried where its products reach this share of float32's rate: elsewhere it cannot win."""
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""Freed pages stay with the process, as in raysae's workers: the same for all, and faster for all."""


@dataclass
class Work:
    """Something to time: `run(n)` does it n times. Once is worth `amount`: SAE-tokens, or FLOP for a product."""

    library: str
    run: Callable[[int], None]
    amount: float
    times: int = 1


def main() -> int:
    args = arguments()
    load = os.getloadavg()[0]
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    args.trainers, args.absent = peers.importable(args.libraries)
    tables = []
    for d_model in args.d_model:
        one = d_model >= 2048 and args.device == "cpu" and args.expansions is None
        factors = [4] if one else args.expansions or [4, 8]
        shapes = [(f, c) for f in factors for c in (L1[:1] if one else L1)]
        tables += [packs(d_model, shapes, args, firing) for firing in args.firing]
    if args.device == "cuda" and not args.quick:
        tables.append(packs(768, [((2, 4, 8, 16, 32)[i % 5], L1[i // 5]) for i in range(16)], args))
    for d_model in args.single:
        tables.append(singles(d_model, 8, args))
    if args.single:
        tables.append(memory(max(args.single), 8, args))
    return common.finish(tables, args.json, load)


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--d-model", type=int, nargs="*", default=[64, 256, 768, 2048], help="widths of the packs")
    parser.add_argument("--expansions", type=int, nargs="+", help="of the packs (default 4 8)")
    parser.add_argument("--firing", type=float, nargs="+", default=[0.5, 0.03], help="shares of the packs' latents")
    parser.add_argument("--single", type=int, nargs="*", default=[256, 2048 if cuda else 768], help="widths of singles")
    parser.add_argument("--architectures", nargs="+", default=["relu", "topk", "batchtopk", "jumprelu"])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=20, help="a case's rounds end after this, but for three")
    parser.add_argument("--libraries", nargs="+", default=list(peers.LIBRARIES), choices=list(peers.LIBRARIES))
    parser.add_argument(
        "--compile",
        action="store_true",
        help="SAELens' compile_sae, too; not with dictionary_learning, whose nnsight breaks torch.compile",
    )
    parser.add_argument("--quick", action="store_true", help="small widths, three rounds")
    parser.set_defaults(repeats=7)
    args = parser.parse_args()
    if args.quick:
        args.d_model, args.single, args.repeats, args.seconds = [64], [128], 3, 5
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def packs(
    d_model: int, shapes: Sequence[tuple[int, float]], args: argparse.Namespace, firing: float = 0.5
) -> common.Table:
    """ReLU SAEs of these (expansion factor, L1 coefficient) on one stream, this share of whose latents fires."""
    specs = [Spec("relu", d_model, factor * d_model, l1, 1e-4) for factor, l1 in shapes]
    factors = ", ".join(map(str, sorted({factor for factor, _ in shapes})))
    table = common.Table.titled(
        f"{len(specs)} SAEs: d_model {d_model}, expansion {factors}, ReLU + L1, batch {args.batch}, {firing:.0%} firing, "
        f"{args.device}"
    )
    works, precisions = products(d_model, max(s.d_sae for s in specs), table, args)
    for library in args.trainers:
        works |= steps(library, specs, 0.0, precisions, args, firing)
    if len(specs) > 1:
        alone = [steps("raysae", [s], 0.0, ["auto"], args, firing)["raysae, auto"] for s in specs]
        works["raysae, auto, one by one"] = Work("one by one", lambda n: _each(alone, n), len(specs) * args.batch)
    rates = race(works, table, "", args)

    ours, product = best(rates, works, "raysae"), best(rates, works, "product")
    flop = 10 * d_model * sum(s.d_sae for s in specs) / len(specs)  # of a SAE-token
    share = common.spread([flop * a / b for a, b in zip(rates[ours], rates[product], strict=True)])
    cpu = args.device == "cpu"
    table.add("raysae's FLOP / fastest product", share, at_least=0.8 if cpu and d_model == 768 else None)
    rivals = [library for library in args.trainers if library != "raysae" and best(rates, works, library)]
    rival = max((best(rates, works, library) for library in rivals), key=lambda n: _median(rates, n), default="")
    for library in rivals:
        name = best(rates, works, library)
        target = PACK_TARGETS.get(d_model) if cpu and name == rival else None
        if library == "SAELens" and not cpu and len(specs) == 16:
            target = 4.0
        table.add(f"raysae / {name}", common.ratios(rates[ours], rates[name]), at_least=target)
    if len(specs) > 1:
        auto = str(product_dtype("auto", torch.device(args.device))).removeprefix("torch.")
        pair = rates.get(f"raysae, {auto}", rates[ours]), rates["raysae, auto, one by one"]
        table.add("one pack / its members one by one (3 % are noise)", common.ratios(*pair), at_least=0.97)
    absent(table, ["relu"], args)
    return table


def singles(d_model: int, factor: int, args: argparse.Namespace) -> common.Table:
    """One SAE of each architecture."""
    d_sae = factor * d_model
    table = common.Table.titled(f"one SAE: d_model {d_model}, d_sae {d_sae}, batch {args.batch}, {args.device}")
    plain, precisions = products(d_model, d_sae, table, args)
    for architecture in args.architectures:
        for dead in (0.0, 0.05) if architecture in BY_TOPK else (0.0,):
            case = architecture + (f", {dead:.0%} dead" if architecture in BY_TOPK else "")
            works = dict(plain) if architecture == "relu" else {}
            for library in args.trainers:
                works |= steps(library, [single(architecture, d_model, d_sae)], dead, precisions, args)
            rates = race(works, table, f"{case}: ", args)
            ours = best(rates, works, "raysae")
            if architecture == "relu":
                product = best(rates, works, "product")
                share = [10 * d_model * d_sae * a / b for a, b in zip(rates[ours], rates[product], strict=True)]
                target = 0.5 if args.device == "cuda" and d_sae >= 16_384 else None
                table.add(f"{case}: raysae's FLOP / fastest product", common.spread(share), at_least=target)
            for library in args.trainers:
                name = best(rates, works, library)
                if library != "raysae" and name:
                    target = SINGLE_TARGET if library == "SAELens" and dead and architecture != "matryoshka" else None
                    table.add(f"{case}: raysae / {name}", common.ratios(rates[ours], rates[name]), at_least=target)
    absent(table, args.architectures, args)
    return table


def memory(d_model: int, factor: int, args: argparse.Namespace) -> common.Table:
    """The most that a step holds, over its bound."""
    d_sae = factor * d_model
    bound = 4 * (4 * (2 * d_model * d_sae + d_model + d_sae) + 3 * args.batch * d_sae)
    table = common.Table.titled(
        f"peak memory of a step / bound of {bound / 1e6:.0f} MB: d_model {d_model}, d_sae {d_sae}, batch {args.batch}, "
        f"{args.device}"
    )
    for architecture in args.architectures:
        for library, made in args.trainers.items():
            if architecture in made.names:
                peak = _apart(
                    peak_memory, library, single(architecture, d_model, d_sae), args.batch, args.device, args.threads
                )
                table.add(
                    f"{architecture}: {library}", peak / bound, at_most=MEMORY_TARGET if library == "raysae" else None
                )
    return table


def absent(table: common.Table, architectures: Sequence[str], args: argparse.Namespace) -> None:
    for library, why in args.absent.items():
        if any(a in peers.LIBRARIES[library].names for a in architectures):
            table.add(library, why)


# ----------------------------------------------------------------------------------------------------------------------
# What is timed


def recipe(precision: str, batch: int) -> Recipe:
    """Of a run so long that no schedule moves while it is timed."""
    return Recipe(100_000, batch, 0, 0, 0, dead_after_tokens=10_000_000, precision=precision)


def single(architecture: str, d_model: int, d_sae: int) -> Spec:
    return Spec(architecture, d_model, d_sae, L1[2] if architecture in BY_L1 else K, 1e-4)


def steps(
    library: str,
    specs: Sequence[Spec],
    dead: float,
    precisions: Sequence[str],
    args: argparse.Namespace,
    firing: float = 0.5,
) -> dict[str, Work]:
    """A library's optimizer steps, by setting; none where it lacks the architecture. Its SAEs are made at the first."""
    made, architecture = peers.LIBRARIES[library], specs[0].architecture
    if architecture not in made.names:
        return {}
    autocast = "bfloat16" if library == "raysae" else "autocast"
    settings: list[tuple[str, str, dict[str, Any]]] = [(autocast if p == "bfloat16" else p, p, {}) for p in precisions]
    if made.one_precision:
        settings = [("as it comes", "float32", {})]
    if library == "SAELens":
        if architecture == "topk":
            sparse = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}  # together they fail
            settings.append(("float32, sparse", "float32", sparse))
        if args.compile and len(specs) == 1:
            settings += [(f"{name}, compiled", p, more | {"compile_sae": True}) for name, p, more in settings]
    if library == "dictionary_learning" and architecture in BY_TOPK:
        settings = [(name, p, {"threshold_start_step": 0}) for name, p, _ in settings]  # as after its first 1000 steps
    works = {}
    for name, precision, more in settings:
        trainer: list[peers.Trainer] = []
        batches = cycle(data(specs[0].d_in, args.batch, args.device))

        def run(
            n: int, trainer: list = trainer, precision: str = precision, more: dict = more, batches: Any = batches
        ) -> None:
            if not trainer:
                given = [replace(spec, options=more) for spec in specs]
                trainer.append(made(given, recipe(precision, args.batch), None, args.device))
                trainer[0].train(batches, 1)  # some start from their first batch
                if dead:
                    trainer[0].kill(torch.arange(round(dead * specs[0].d_sae), device=args.device))
                if firing != 0.5:  # as at the start
                    trainer[0].thin(firing)
                if "compile_sae" in more:  # AuxK's branch is compiled when it is first taken
                    trainer[0].train(batches, 3)
            trainer[0].train(batches, n)

        works[f"{library}, {name}"] = Work(library, run, len(specs) * args.batch)
    return works


def data(d_model: int, batch: int, device: str) -> list[torch.Tensor]:
    """Two batches of rows with mean ‖x‖² = 1."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(batch, d_model, generator=generator) / d_model**0.5).to(device) for _ in range(2)]


def products(
    d_model: int, d_sae: int, table: common.Table, args: argparse.Namespace
) -> tuple[dict[str, Work], list[str]]:
    """Plain products, square and of the encoder's shape, in the precisions worth a trial, and these precisions."""
    side = 8192 if args.device == "cuda" else 2048
    works, rate = {}, {}
    for rows, inner, columns in ((args.batch, d_model, d_sae), (side, side, side)):
        for precision in ("float32", "bfloat16"):
            a, b = (
                torch.randn(shape, device=args.device).to(getattr(torch, precision))
                for shape in ((rows, inner), (inner, columns))
            )
            out = a @ b

            def run(n: int, a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
                for _ in range(n):
                    torch.mm(a, b, out=out)

            name = f"product {rows} x {inner} x {columns}, {precision}"
            work = works[name] = Work("product", run, 2.0 * rows * inner * columns)
            rate[name] = work.amount / min(seconds(work, args) for _ in range(3))
            work.times = max(1, round(0.2 * rate[name] / work.amount))
    top = {p: max(r for name, r in rate.items() if name.endswith(p)) for p in ("float32", "bfloat16")}
    precisions = [p for p in top if top[p] >= BF16_WORTH * max(top.values())]
    left_out = "".join(f"; steps in {p} not tried" for p in top if p not in precisions)
    table.add("bfloat16 products / float32 products", f"{top['bfloat16'] / top['float32']:.2f}{left_out}")
    return {name: work for name, work in works.items() if name.endswith(tuple(precisions))}, precisions


def _each(works: Sequence[Work], n: int) -> None:
    for work in works:
        work.run(n)


# ----------------------------------------------------------------------------------------------------------------------
# Timing


def seconds(work: Work, args: argparse.Namespace) -> float:
    def synchronised() -> None:
        work.run(work.times)
        if args.device == "cuda":
            torch.cuda.synchronize()

    return common.timed(synchronised)


def race(works: dict[str, Work], table: common.Table, case: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """`amount` per second of each work by round, also added to the table. Drops what fails, and slow settings."""
    once: dict[str, float] = {}
    for name, work in works.items():
        try:
            work.run(0)
            once[name] = seconds(work, args) / work.times
            if once[name] < 1:
                once[name] = min(once[name], seconds(work, args) / work.times)
            if work.library != "product":
                work.times = max(1, round(0.3 / once[name]))
        except Exception as error:
            table.add(case + name, f"fails: {type(error).__name__}: {error}".splitlines()[0][:90])
    for name in list(once):
        if once[name] > 1.5 * min(s for n, s in once.items() if works[n].library == works[name].library):
            if works[name].library != "product":
                table.add(
                    case + name, f"left out: {works[name].amount / once[name]:.4g} SAE-tokens/s in its first steps"
                )
            del once[name]
            works[name].run = lambda n: None  # frees its SAEs
    rates: dict[str, list[float]] = {name: [] for name in once}
    start = time.perf_counter()
    for i in range(args.repeats):
        if i >= 3 and time.perf_counter() - start > args.seconds:
            break
        for name in list(once) if i % 2 == 0 else reversed(once):
            work = works[name]
            rates[name].append(work.amount * work.times / seconds(work, args))
    for name, values in rates.items():
        product = works[name].library == "product"
        unit = "GFLOP/s" if product else "SAE-tokens/s"
        table.add(f"{case}{name}, {unit}", common.spread([v / 1e9 if product else v for v in values]))
    return rates


def best(rates: dict[str, list[float]], works: dict[str, Work], library: str) -> str:
    """The library's fastest setting, or nothing."""
    names = [name for name in rates if works[name].library == library]
    return max(names, key=lambda name: _median(rates, name), default="")


def _median(rates: dict[str, list[float]], name: str) -> float:
    return statistics.median(rates[name])


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def peak_memory(library: str, spec: Spec, batch: int, device: str, threads: int) -> int:
    """Bytes that the third step holds at most, above what was held before the SAE was made. For a process of its own."""
    torch.set_num_threads(threads)
    precision = "auto" if library == "raysae" else "bfloat16" if device == "cuda" else "float32"

    def train(spec: Spec, batch: int) -> tuple[peers.Trainer, list[torch.Tensor], int]:
        batches = data(spec.d_in, batch, device)
        before = _held("VmRSS", device)
        trainer = peers.LIBRARIES[library]([spec], recipe(precision, batch), None, device)
        trainer.train(cycle(batches), 2)
        return trainer, batches, before

    train(replace(spec, d_in=16, d_sae=64, sparsity=min(spec.sparsity, 4)), 64)
    trainer, batches, before = train(spec, batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    trainer.train(cycle(batches), 1)
    return _held("VmHWM", device) - before


def _held(what: str, device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() if what == "VmRSS" else torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def _apart(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a new process, whose malloc gives freed pages back at once."""
    kept = dict(os.environ)
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(kept)


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in KEEP_PAGES.items()):  # malloc reads them when it starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_PAGES})
    sys.exit(main())
