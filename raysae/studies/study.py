"""What every study shares: stages in a workspace, and a run's folder that is its own, sealed and with a ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysae import run_folder
from raysae.artifacts import fingerprint
from raysae.config.load import dump_yaml
from raysae.config.sections import GatedJob, Job
from raysae.environment import environment
from raysae.errors import Damaged, UserError
from raysae.files import folder_name, is_temporary, output_root, read_json, remove_dead, write_atomic, write_json
from raysae.gates.criteria import load_gate
from raysae.gates.waivers import load_waiver, read_basis
from raysae.looks import look
from raysae.plan.budget import ITEMS, spending
from raysae.report import Part, page, write_report
from raysae.run import Run
from raysae.seal import IDENTITY, identity_of
from raysae.workspace import Stage, Workspace

if TYPE_CHECKING:
    from raysae.bench import Bench

RESERVED = ("stages", "looks", "replications")
"""Folders of an output root that are no run's."""
MADE_FROM = "made_from"


@contextmanager
def bench_of(job: Job, bench: Bench | None = None) -> Iterator[Bench]:
    """The bench, or Ray for the block; it starts when a stage first has work for it."""
    if bench is not None:
        yield bench
        return
    from raysae.on_ray.bench import RayBench

    bench = RayBench(job.cluster, job.tracking.wandb_project)
    try:
        yield bench
    finally:
        bench.close()


class Study:
    """A job, the workspace of its stages, and its run's folder. Nothing has run of a new one.

    A study names its stages and ends with `write`. It says what it was `made_from` and what its `name` is.
    """

    def __init__(self, job: Job, bench: Bench) -> None:
        self.job = job
        self.root = output_root(job.output, given="output" in job.model_fields_set)
        self.workspace = Workspace(self.root, bench, job.verify)
        if isinstance(job, GatedJob):
            self.gate = load_gate(job.gate)
            self.waiver = load_waiver(job.waiver, self.gate, job.basis) if job.waiver else None
            self.basis = read_basis(job.basis, self.waiver) if job.basis else None

    @property
    def name(self) -> str:
        """How the folder of a run without a name begins."""
        return type(self.job).__name__.removesuffix("Job").lower()

    @property
    def made_from(self) -> Mapping[str, Any]:
        """Hashes of what the config names, by the fields' names: the same paths with other content are another run."""
        return {}

    def identity(self) -> dict[str, Any]:
        """What the run's results depend on: its config but for where it runs, what gate, waiver and basis say, and what it
        is made from."""
        content: dict[str, Any] = {}
        if isinstance(self.job, GatedJob):
            waiver = self.waiver.model_dump(mode="json") if self.waiver else None
            content = {"gate": self.gate.model_dump(mode="json"), "waiver": waiver, "basis": self.basis}
        return {**self.job.identity(), **content, MADE_FROM: dict(self.made_from)}

    @cached_property
    def directory(self) -> Path:
        """`<output>/<run>`."""
        run = self.job.run
        if run is None:
            return self.root / f"{self.name}-{fingerprint(self.identity(), 8)}"
        if folder_name(run, "run") in RESERVED:
            raise UserError(f"run: {run!r} is kept for what runs share; give another --run")
        return self.root / run

    def check_run(self) -> None:
        """Refuse a run directory that belongs to another config, or was made from something else."""
        remove_dead(self.directory)
        if not self.directory.is_dir() or all(is_temporary(path.name) for path in self.directory.iterdir()):
            return
        owner = identity_of(self.directory)
        if owner is None:
            raise UserError(f"run: {self.directory} is not empty and no run of raysae; give another --run")
        now = self.identity()
        if owner == fingerprint(now):
            return
        try:
            then = read_json(self.directory / IDENTITY)
        except Damaged:
            then = {}
        if owner == fingerprint(then) and not [*differences(then, now)] and self._are_defaults(then, now):
            return
        for what, made_from in self.made_from.items():
            if what in then.get(MADE_FROM, {}) and then[MADE_FROM][what] != made_from:
                raise UserError(
                    f"run: {self.directory} was made from other content of {what}; bring that back, or give another --run"
                )
        raise UserError(
            f"run: {self.directory} belongs to another config or gate; give another --run, or leave it unset"
        )

    def _are_defaults(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
        """Whether fields that the raysae of then did not have are at their defaults."""
        return not [*differences(later(then, now), {**type(self.job)().identity(), MADE_FROM: self.made_from})]

    def look(self, records: Stage, by: str, ids: Sequence[str]) -> dict[str, Any]:
        """Count a look at the test rows of these records."""
        split, what = self.workspace.make(records).path.name, {"run": self.identity(), "saes": list(ids)}
        return look(self.root, split, by, self.directory.name, what)

    def ledger(self) -> dict[str, Any]:
        """What each stage cost, when it was made: wall seconds, CPU- and GPU-seconds held, tokens, bytes on disk."""
        keys = ("seconds", "cpu_seconds", "gpu_seconds", "tokens", "bytes")
        stages: list[dict[str, Any]] = [
            {"stage": made.kind, "directory": name, "reused": made.reused}
            | {key: made.manifest["cost"].get(key, 0) for key in keys}
            for name, made in self.workspace.made.items()
        ]
        total = {key: sum(s[key] for s in stages) for key in keys}
        return {"stages": stages, "total": total, "budget": spending(stages, self.job.budget.model_dump())}

    def write(self, fill: Callable[[Path], None], parts: Sequence[Part] = ()) -> Run:
        """The run's directory, unless it is there: replaced as one whole by what `fill` writes, and the page of `parts`, or
        of a sweep."""
        directory, ledger, names = self.directory, self.ledger(), list(self.workspace.made)
        reused = all(made.reused for made in self.workspace.made.values())
        whole = reused and run_folder.stands(directory, names, self.job.verify)
        if whole and _limits(Run(directory).ledger) == _limits(ledger):
            return Run(directory)
        self.workspace.check()

        def fill_all(folder: Path) -> None:
            write_json(folder / IDENTITY, self.identity())
            write_atomic(folder / "config.yaml", lambda path: path.write_text(dump_yaml(self.job)))
            write_json(folder / "environment.json", environment())
            write_json(folder / "ledger.json", ledger)
            fill(folder)

        def report(folder: Path) -> None:
            if parts:
                page(parts, folder)
            else:
                write_report(folder)

        run_folder.write(directory, self.root, names, fingerprint(self.identity()), fill_all, report)
        return Run(directory)


def differences(then: Any, now: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the values of `then` that `now` has otherwise. What only `now` has is a field that came later."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key, value in then.items():
            yield from differences(value, now.get(key), f"{name}.{key}" if name else str(key))
    elif then != now:
        yield name


def later(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What only `now` has, by its place."""
    new: dict[str, Any] = {}
    for key, value in now.items():
        if key not in then:
            new[key] = value
        elif isinstance(value, Mapping) and isinstance(then[key], Mapping) and (below := later(then[key], value)):
            new[key] = below
    return new


def _limits(ledger: Mapping[str, Any]) -> list[float | None]:
    """The budget that a ledger was held against."""
    budget = ledger.get("budget") or {}
    return [budget.get(item, {}).get("limit") for item in ITEMS]
