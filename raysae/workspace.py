"""Stages as values, and the workspace that makes them: `<root>/stages/<kind>-<hash>/`.

A `Stage` says what a directory would hold; nothing has run. A `Workspace` makes it, inputs first: where its directory
holds a `manifest.json` the work is skipped, otherwise the build runs, resuming whatever it finds, and the manifest is
written last, by rename. That is the whole resume story. A lock keeps two drivers out of one stage; it is the kernel's,
so a killed driver leaves none behind. `--plan` finds the same values that the job makes.

The manifest lists the stage's files with size and sha256. Sizes are compared whenever a stage is found finished, hashes
(but for small tables, always) before anything new is made from it; what is damaged is refused with one line, since
whoever deletes a stage should know that a disk did.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from raysae.artifacts import MANIFEST, UNREAD, fingerprint, lock_of, size_of
from raysae.files import compare, contents, read_sealed, remove_temporaries, write_sealed
from raysae.progress import say

if TYPE_CHECKING:
    from raysae.bench import Bench

LAYOUT = 2
"""Of the manifest; raised when a stage of an older raysae can no longer be checked against its own."""
SMALL = 1 << 20
"""Bytes up to which a file at the top of a stage, such as a table, is hashed whenever the stage is found finished."""
LONG_TO_READ = 10**10
"""Bytes from which a line says that a stage is being compared with its hashes, at about a gigabyte a second and core."""
FAILED = "failed"
"""In a manifest: parts of the stage that failed for good, and why. A run goes on without; the next tries them again."""


class NotMade(LookupError):
    """A stage that was only looked for is not finished."""


@dataclass(frozen=True)
class Made:
    """A finished stage: where it is, what its manifest says, and whether this job found it finished."""

    path: Path
    manifest: dict[str, Any]
    reused: bool

    @property
    def kind(self) -> str:
        return str(self.manifest["stage"])

    @property
    def key(self) -> str:
        """What names it in the stages that are made from it: its folder, and what failed, which a rerun may mend."""
        failed = sorted(self.manifest.get(FAILED) or ())
        return self.path.name + (f"-without-{fingerprint(failed)}" if failed else "")


Inputs = Mapping[str, Made]
Settings = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Stage:
    """What a directory would hold: a value, of which nothing has run."""

    kind: str
    version: int
    """Raised when the code changes what it makes, so that what an older raysae made is not taken for it."""
    settings: Settings | Callable[[Inputs], Settings]
    """What it depends on beside its inputs; a function of these where their names are not what matters, such as a store's
    of its model's weights wherever they lie."""
    inputs: Mapping[str, Stage | None]
    """Stages that it is made from, by the names that `build` knows them by."""
    build: Callable[[Path, Inputs, Bench], Mapping[str, Any]]
    """Fills the directory, resuming what it finds there, and returns the manifest's content; a `cost` entry (cpu_seconds,
    gpu_seconds, tokens) reaches the ledger."""
    implied: frozenset[str] = field(default=frozenset(), kw_only=True)
    """Inputs that do not name it, since its settings or another input stand for them."""

    def identity(self, inputs: Inputs) -> dict[str, Any]:
        """What names it, given its finished inputs."""
        settings = self.settings(inputs) if callable(self.settings) else self.settings
        named = {n: inputs[n].key if s else None for n, s in self.inputs.items() if n not in self.implied}
        return {"version": self.version, **settings, **named}

    def directory(self, inputs: Inputs) -> str:
        """Name of its directory: `<kind>-<hash>`."""
        return f"{self.kind}-{fingerprint({'stage': self.kind, 'layout': LAYOUT, **self.identity(inputs)})}"


class Workspace:
    """Makes stages below an output root, on a bench, and knows those that a job stands on.

    With `verify` every file of every stage is compared with its sha256, else only those that something new is made from.
    """

    def __init__(self, root: Path, bench: Bench, verify: bool = False) -> None:
        self.root, self.bench, self.verify = root, bench, verify
        self.made: dict[str, Made] = {}
        """The stages of this job so far by directory, in the order in which they were asked for."""
        self._intact: set[str] = set()

    def make(self, stage: Stage) -> Made:
        """The finished stage; what is not there of it and its inputs is made."""
        return self._get(stage, self._build)

    def find(self, stage: Stage) -> Made:
        """The finished stage; NotMade where it, or an input, is not there."""
        return self._get(stage, lambda stage, inputs, directory: self._finished(directory))

    def find_all(self, stages: Iterable[Stage]) -> list[Made]:
        """Those that are there."""
        there = []
        for stage in stages:
            with suppress(NotMade):
                there.append(self.find(stage))
        return there

    def check(self) -> None:
        """Compare every file of the reused stages so far with its sha256, once; Damaged, in one line, if one differs."""
        for name, made in self.made.items():
            if made.reused and name not in self._intact:
                if made.manifest["cost"]["bytes"] > LONG_TO_READ:
                    say(f"verifying {name}")
                compare(made.path, made.manifest["files"])
                self._intact.add(name)

    def _get(self, stage: Stage, get: Callable[[Stage, Inputs, str], Made]) -> Made:
        inputs = {name: self._get(needed, get) for name, needed in stage.inputs.items() if needed is not None}
        directory = stage.directory(inputs)
        if directory not in self.made:
            self.made[directory] = get(stage, inputs, directory)
            if self.verify:
                self.check()
        return self.made[directory]

    def _build(self, stage: Stage, inputs: Inputs, directory: str) -> Made:
        with suppress(NotMade):
            return self._whole(directory)
        path, lock = self.root / "stages" / directory, lock_of(self.root, directory)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"{stage.kind}: another driver works on {directory}; waiting for it")
            lock.acquire()
        try:
            with suppress(NotMade):
                return self._whole(directory)
            path.mkdir(exist_ok=True)  # under the lock: who had it before may have removed it
            (path / MANIFEST).unlink(missing_ok=True)
            remove_temporaries(path)
            self.check()
            start = time.perf_counter()
            facts = dict(stage.build(path, inputs, self.bench))
            cost = {"seconds": time.perf_counter() - start, "bytes": size_of(path), **facts.pop("cost", {})}
            remove_temporaries(path)
            manifest = {"stage": stage.kind, "inputs": stage.identity(inputs), **facts, "cost": cost}
            write_sealed(path / MANIFEST, {**manifest, "files": contents(path, UNREAD)})
            return Made(path, read_sealed(path / MANIFEST), reused=False)
        finally:
            if path.is_dir() and not any(path.iterdir()):  # a mistake that was noticed before anything was made
                path.rmdir()
            lock.release()

    def _finished(self, directory: str) -> Made:
        path = self.root / "stages" / directory
        if not os.path.lexists(path / MANIFEST):
            raise NotMade(directory)
        manifest = read_sealed(path / MANIFEST)
        files = manifest["files"]
        compare(path, files, hashed=lambda name: "/" not in name and files[name]["bytes"] <= SMALL)
        return Made(path, manifest, reused=True)

    def _whole(self, directory: str) -> Made:
        """The finished stage of which no part failed."""
        made = self._finished(directory)
        if made.manifest.get(FAILED):
            raise NotMade(directory)
        return made
