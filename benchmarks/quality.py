"""Reconstruction at equal L0: our architectures against SAELens', dictionary_learning's and sparsify's, on real rows.

    python benchmarks/quality.py [--store PATH] [--architectures relu topk ...] [--tokens 2000000] [--seeds 3] [--quick]

Rows are blocks.2.resid_post (d_model 64) of the test data's stories260K on TinyStories: `--store` names a finished store
of them (`results/stages/store-*` after `jobs/sweep_sae.py --config configs/stories260k.yaml`), else they are captured
here. Every SAE has d_sae 1024 and sees the same batches of 2048 training rows.

- Recipe: each library's own input scale, start and loss, and its shares of warm-up and decay. Learning rates: up to
  six, its own default among them; the best one on validation rows counts, of raysae's only those that leave no more than
  5 % of the latents dead. SAELens' JumpReLU is compared loss by loss: quadratic, step, tanh.
- L0: with seed 0 the sparsity setting is adjusted until L0 is within 3 % of 16, in up to three runs; then every seed
  runs at the setting so found. FVU is read off at L0 = 16 exactly, log FVU taken as linear in log L0 with the slope
  between two of the adjusting runs.
- Measurement: one evaluator (`RowSums`) for all, on raw test rows, with each library's own rule of inference. Dead are
  latents that fire on no training row by that rule. (In training, a latent is dead after a twentieth of the run without
  firing: one threshold for all libraries, whose own are too long for such runs.)

"No worse": our mean FVU exceeds a library's by no more than the standard deviation of their difference. Some 150 SAEs
are trained, two at a time on two cores: about an hour; half of it with --tokens 1000000. --threads and --repeats do
nothing here.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import common
import peers
import torch
from peers import Spec

from raysae.activations.store import Store
from raysae.files import read_json, write_json
from raysae.sae.metrics import RowSums
from raysae.sweep.space import recipe
from raysae.sweep.trial import input_scale

SITE = "blocks.2.resid_post"
D_IN, D_SAE, BATCH = 64, 1024, 2048
TARGET, DEAD_TARGET = 16.0, 5.0
CLOSE, REACHED = 0.03, 0.2
"""Distance of L0 from the target at which the search ends, and beyond which nothing is compared."""
WIDTH = math.sqrt(2**14 / D_SAE)  # learning rates are stated at d_sae 16384 and go with its inverse root
HIGHER = (5e-4, 1e-3, 2e-3, 3e-3, 4e-3)
RATES = {
    "raysae": (2e-4 * WIDTH, *(rate * WIDTH for rate in HIGHER)),  # the first is its default
    "SAELens": (3e-4, *(rate * WIDTH for rate in HIGHER)),
    "dictionary_learning": (3e-4, *(rate * WIDTH for rate in HIGHER)),
    "sparsify": (1e-3 * WIDTH, 2e-3 * WIDTH, 5e-3 * WIDTH),  # the last is its default
}
SHARES = {  # of the steps: warm-up, decay, sparsity warm-up
    "raysae": (0.05, 0.2, 0.1),
    "SAELens": (0.0, 0.2, 0.05),
    "dictionary_learning": (0.05, 0.2, 0.05),
    "sparsify": (0.0, 0.0, 0.0),
}
BY_L1 = {"relu": 0.1, "relu_unit_norm": 0.1, "gated": 0.2, "p_anneal": 0.06}
BY_L0 = {"jumprelu_l0": 6e-4, "jumprelu_tanh": 6e-4}
BY_K = ("topk", "batchtopk", "matryoshka", "abstopk")
START = dict.fromkeys((*BY_K, "jumprelu"), TARGET) | BY_L1 | BY_L0
"""Where the search for the sparsity setting starts, by architecture, for inputs of mean ‖x‖² = 1."""


@dataclass(frozen=True)
class Job:
    """An architecture in a library, on the rows of a store."""

    architecture: str
    library: str
    store: Path
    tokens: int
    seeds: int
    rates: int


@dataclass(frozen=True)
class Way:
    """How a library is asked to train."""

    learning_rate: float
    start: float
    """The sparsity setting to begin with."""
    falling: bool
    """Whether L0 falls as the setting rises."""


@dataclass(frozen=True)
class Point:
    """A trained SAE."""

    setting: float
    seed: int
    fvu: float
    l0: float
    dead: float


@dataclass(frozen=True)
class Outcome:
    """A library's best way."""

    job: Job
    way: Way
    slope: float
    """d log FVU / d log L0 near the target."""
    points: list[Point]
    """Of each seed, on test rows."""
    searched: list[tuple[Way, list[Point]]]
    """What was tried before, on validation rows."""

    @property
    def reached(self) -> bool:
        return all(distance(p.l0) < math.log(1 + REACHED) for p in self.points)

    @property
    def fvu(self) -> list[float]:
        """On test rows at the target; as measured where that is not near."""
        known = self.reached and not math.isnan(self.slope)
        return [p.fvu * ((TARGET / p.l0) ** self.slope if known else 1.0) for p in self.points]


def main() -> int:
    args = arguments()
    load = os.getloadavg()[0]
    here, absent = peers.importable()
    with tempfile.TemporaryDirectory() as directory:
        store = args.store or make_store(Path(directory))
        jobs = [
            Job(architecture, library, store, args.tokens, args.seeds, args.rates)
            for architecture in args.architectures
            for library, made in here.items()
            if architecture in made.names
        ]
        known = earlier(args.earlier, store) if args.earlier else {}
        made = run_all([job for job in jobs if job not in known], args.jobs) | known
        outcomes = [made[job] for job in jobs]
        table = report(outcomes, Store(store), args)
    for library, why in absent.items():
        table.add(library, why)
    status = common.finish([table], args.json, load)
    if args.json is not None:
        found = [asdict(o) | {"job": asdict(o.job) | {"store": None}, "fvu": o.fvu} for o in outcomes]
        write_json(args.json, {**read_json(args.json), "outcomes": found})
    return status


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument(
        "--earlier", type=Path, help="what --json wrote: the other libraries' outcomes are taken from it"
    )
    parser.add_argument("--architectures", nargs="+", default=list(START), choices=list(START))
    parser.add_argument("--tokens", type=int, default=2_000_000, help="training tokens of each SAE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=int, default=6, help="learning rates tried, from the largest")
    parser.add_argument("--jobs", type=int, default=common.cores(), help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="ReLU and TopK, 150k tokens, one seed and learning rate")
    args = parser.parse_args()
    if args.quick:
        args.architectures, args.tokens, args.seeds, args.rates = ["relu", "topk"], 150_000, 1, 1
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def model_path() -> Path:
    """stories260K, as a Hugging Face folder."""
    return _shared() / "models" / "stories260K" / "hf"


def make_store(root: Path, rows_per_block: int = 65_536, sites: Sequence[str] = (SITE,)) -> Path:
    """Capture the rows, by raysae's own functions, as configs/stories260k.yaml has them. Tokens lie in `root/tokens`."""
    from raysae.activations import capture
    from raysae.data.sources import load_problems
    from raysae.data.splits import assign_splits
    from raysae.data.tokens import read_block, tokenize
    from raysae.models.host import ModelHost, fingerprint_of, load_tokenizer

    model = str(model_path())
    text = _shared() / "data" / "tinystories_text" / "tiny_stories.txt"
    problems = load_problems("text", str(text), text_separator=r"(?<!\n)\n(?!\n)", text_replace=("\n\n", "\n"))
    split = assign_splits(problems, 0.1, 0.1, None, 0)
    made = tokenize(split, load_tokenizer(model), 512, "concat", rows_per_block, 0, root / "tokens")
    settings = capture.CaptureSettings(tuple(sites), "bfloat16", 16_384, 0)
    host = ModelHost.load(model)
    for block in made["blocks"]:
        capture.capture_block(host, read_block(root / "tokens" / block["file"]), root / "store", settings)
    manifest = capture.finish(root / "store", made["blocks"], settings, fingerprint_of(model, None, False), 0.0)
    write_json(root / "store" / "manifest.json", manifest)
    return root / "store"


def _shared() -> Path:
    return Path(os.environ.get("RAYSAE_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))


@lru_cache(maxsize=3)
def rows(store: Path, split: str) -> torch.Tensor:
    opened = Store(store)
    return torch.cat([opened.shard(SITE, name) for name in opened.names(split)]).float()


# ----------------------------------------------------------------------------------------------------------------------
# One implementation


def earlier(path: Path, store: Path) -> dict[Job, Outcome]:
    """The other libraries' outcomes in a file that `--json` wrote."""
    found = {}
    for o in read_json(path)["outcomes"]:
        job, way = Job(**o["job"] | {"store": store}), Way(**o["way"])
        searched = [(Way(**way), [Point(**p) for p in points]) for way, points in o["searched"]]
        if job.library != "raysae":
            found[job] = Outcome(job, way, o["slope"], [Point(**p) for p in o["points"]], searched)
    return found


def run_all(jobs: Sequence[Job], workers: int) -> dict[Job, Outcome]:
    """All jobs, those of the slower libraries first, in processes of one thread."""
    outcomes: dict[Job, Outcome] = {}
    start = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(measure, job): job for job in sorted(jobs, key=lambda job: job.library == "raysae")}
        for future in as_completed(futures):
            job, outcome = futures[future], future.result()
            outcomes[job] = outcome
            runs = len(outcome.points) + sum(len(points) for _, points in outcome.searched)
            mean, sd = moments(outcome.fvu)
            shown = f"FVU {mean:.4f} ± {sd:.4f}, {runs} SAEs, {time.perf_counter() - start:.0f} s"
            print(f"{len(outcomes)}/{len(jobs)} {job.architecture}, {job.library}: {shown}", file=sys.stderr)
    return outcomes


def measure(job: Job) -> Outcome:
    """Search for the setting with seed 0, try the other learning rates at it, and run all seeds in the best way."""
    warnings.filterwarnings("ignore")
    first, *others = ways(job)
    points = search(job, first, [])
    spread(job, first, points)  # the slope, without which other learning rates' points at another L0 do not compare
    setting, slope = settle(points, first)
    searched = [(first, points), *((way, [train(job, way, setting, 0)]) for way in others)]
    values = [at_target(points, slope) for _, points in searched]
    way, points = searched[values.index(min(values))]
    search(job, way, points)
    spread(job, way, points)
    setting, slope = settle(points, way)
    return Outcome(job, way, slope, [train(job, way, setting, seed, final=True) for seed in range(job.seeds)], searched)


def ways(job: Job) -> list[Way]:
    """Those that differ in the learning rate."""
    rates = sorted(RATES[job.library], reverse=True)[: job.rates]
    start = START[job.architecture]
    if job.library == "SAELens":  # its inputs have mean ‖x‖² = d_in
        start *= math.sqrt(D_IN) if job.architecture in BY_L1 else D_IN if job.architecture in BY_L0 else 1
    return [Way(rate, start, job.architecture in BY_L1 | BY_L0) for rate in rates]


def search(job: Job, way: Way, points: list[Point]) -> list[Point]:
    """Add SAEs, up to three in all, whose settings close in on the target."""
    while len(points) < 3 and (not points or distance(nearest(points)[0].l0) > CLOSE):
        setting = settle(points, way)[0] if points else way.start
        if any(round_k(job, setting) == p.setting for p in points):
            break
        points.append(train(job, way, setting, 0))
    return points


def spread(job: Job, way: Way, points: list[Point]) -> None:
    """Add SAEs until one has another L0, so that there is a slope."""
    setting = nearest(points)[0].setting
    for factor in (1.25, 2.5):
        if math.isnan(settle(points, way)[1]):
            points.append(train(job, way, factor * setting, 0))


def round_k(job: Job, setting: float) -> float:
    return float(max(1, round(setting))) if job.architecture in BY_K else setting


def train(job: Job, way: Way, setting: float, seed: int, final: bool = False) -> Point:
    """Train one SAE and measure it: on validation rows in a search, on test rows if `final`. The dead latents of other
    libraries are measured at the end only."""
    made, setting = peers.LIBRARIES[job.library], round_k(job, setting)
    store = Store(job.store)
    scale = input_scale(store, SITE)
    shared = recipe(job.tokens, BATCH, *SHARES[job.library], 1_000_000)
    spec = Spec(job.architecture, D_IN, D_SAE, setting, way.learning_rate, seed)
    trainer = made([spec], shared, scale, "cpu")
    trainer.train((x.float() for x in store.batches(SITE, "train", BATCH, seed=seed)), shared.steps)
    reconstruct = trainer.inference()

    def measured(split: str) -> RowSums:
        return row_sums(reconstruct, rows(job.store, split), scale.mean)

    found = measured("test" if final else "validation").metrics()
    counted = final or job.library == "raysae"
    dead = measured("train").metrics()["never_fired_fraction"] if counted else math.nan
    return Point(setting, seed, found["fvu"], found["l0"], dead)


@torch.no_grad()
def row_sums(reconstruct: peers.Reconstruct, x: torch.Tensor, shift: torch.Tensor) -> RowSums:
    sums = RowSums(shift)
    for part in x.split(8192):
        sums.add(part, *reconstruct(part))
    return sums


def distance(l0: float, other: float = TARGET) -> float:
    """How far two L0 are apart, in units of their logarithm."""
    return abs(math.log(l0 / other)) if min(l0, other) > 0 else math.inf


def nearest(points: Sequence[Point]) -> list[Point]:
    """By distance from the target."""
    return sorted(points, key=lambda p: distance(p.l0))


def settle(points: Sequence[Point], way: Way) -> tuple[float, float]:
    """The setting expected to give the target, and d log FVU / d log L0: by the nearest point and the nearest one whose
    L0 differs from its by 5 % or more; without such a one by proportion, and nan."""
    a, *others = nearest(points)
    b = next((p for p in others if 0.05 < distance(p.l0, a.l0) < math.inf), None)
    if b is None:
        wanted = min(4.0, max(0.25, TARGET / max(a.l0, 1e-3)))
        return a.setting * (1 / wanted if way.falling else wanted), math.nan
    gap = math.log(b.l0 / a.l0)
    step = math.log(b.setting / a.setting) / gap * math.log(TARGET / a.l0)
    return a.setting * math.exp(min(1.4, max(-1.4, step))), math.log(b.fvu / a.fvu) / gap


def at_target(points: Sequence[Point], slope: float) -> float:
    """FVU at the target, from the nearest point; inf where that is half or twice it, or known to leave too many dead."""
    point = nearest(points)[0]
    if distance(point.l0) > math.log(2) or 100 * point.dead > DEAD_TARGET:
        return math.inf
    return point.fvu if math.isnan(slope) else point.fvu * (TARGET / point.l0) ** slope


def report(outcomes: Sequence[Outcome], store: Store, args: argparse.Namespace) -> common.Table:
    counts = f"{store.rows('train')} training and {store.rows('test')} test rows"
    table = common.Table.titled(
        f"FVU at L0 {TARGET:g}: {counts}, d_in {D_IN}, d_sae {D_SAE}, {args.tokens} tokens, {args.seeds} seeds"
    )
    for architecture in args.architectures:
        of = {o.job.library: o for o in outcomes if o.job.architecture == architecture}
        for library, o in of.items():
            l0 = sum(p.l0 for p in o.points) / len(o.points)
            dead = 100 * sum(p.dead for p in o.points) / len(o.points)
            how = f"lr {o.way.learning_rate:.1e}, setting {o.points[0].setting:.4g}"
            mean, sd = moments(o.fvu)
            shown = f"{mean:.4f} ± {sd:.4f} (L0 {l0:.1f}, dead {dead:.1f} %; {how})"
            table.add(f"{architecture}: {library}", shown if o.reached else f"not at this L0: {shown}")
        ours = of.pop("raysae")
        table.add(f"{architecture}: raysae reaches the L0", ours.reached)
        for library, o in of.items():
            if o.reached:
                (mean, sd), (theirs, their_sd) = moments(ours.fvu), moments(o.fvu)
                table.add(
                    f"{architecture}: raysae / {library}", mean / theirs, at_most=1 + math.hypot(sd, their_sd) / theirs
                )
        table.add(
            f"{architecture}: dead latents of raysae, %", 100 * max(p.dead for p in ours.points), at_most=DEAD_TARGET
        )
    return table


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 of one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    sys.exit(main())
