"""Stage directories: named by the hash of what goes in, finished when their manifest is there.

A stage is a function from inputs and a config to a directory. `stage()` gives the directory
`<root>/stages/<name>-<hash>/`; if it holds a `manifest.json` the work is skipped, otherwise the build runs, resuming
whatever it finds, and the manifest is written last, by rename. That is the whole resume story. A lock keeps two drivers
out of one stage; it is the kernel's, so a killed driver leaves none behind.

The manifest lists the stage's files with size and sha256. Sizes are compared whenever a stage is found finished, hashes
(but for small tables, always) by `Stage.verify`; what is damaged is refused with one line, since whoever deletes a
stage should know that a disk did.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raysae.files import (
    SEAL,
    canonical,
    compare,
    contents,
    read_json,
    read_sealed,
    remove_temporaries,
    umask,
    write_sealed,
)

MANIFEST = "manifest.json"
LAYOUT = 2
"""Of the manifest; raised when a stage of an older raysae can no longer be checked against its own."""
SMALL = 1 << 20
"""Bytes up to which a file at the top of a stage, such as a table, is hashed whenever the stage is found finished."""
UNREAD = ("tune", "attempts", "state")
"""Parts of a stage that no later one reads: Tune's own records, who tried what, and where the failed could go on from."""
FAILED = "failed"
"""In a manifest: parts of the stage that failed for good, and why. A run goes on without; the next tries them again."""


class NotMade(LookupError):
    """A stage that was only looked for is not finished."""


@dataclass(frozen=True)
class Stage:
    """A finished stage: where it is, what its manifest says, and whether this call found it finished."""

    path: Path
    manifest: dict[str, Any]
    reused: bool

    @property
    def key(self) -> str:
        """What names it in a later stage's inputs: its folder, and what failed, which a rerun may mend."""
        failed = sorted(self.manifest.get(FAILED) or ())
        return self.path.name + (f"-without-{fingerprint(failed)}" if failed else "")

    def verify(self) -> None:
        """Compare every file with its sha256; Damaged, in one line, for the first that differs."""
        compare(self.path, self.manifest["files"])


def fingerprint(value: Any, length: int = 12) -> str:
    """Stable hash of a JSON-like value, as hex."""
    return hashlib.blake2b(canonical(value).encode(), digest_size=32).hexdigest()[:length]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a folder, a stage's or one made by hand, which has no seal; Damaged if it is not what was written."""
    if SEAL in read_json(folder / MANIFEST):
        return read_sealed(folder / MANIFEST)
    return read_json(folder / MANIFEST)


def stage_path(root: Path, name: str, inputs: Mapping[str, Any]) -> Path:
    """Where the stage of these `inputs` lies, finished or not."""
    return root / "stages" / f"{name}-{fingerprint({'stage': name, 'layout': LAYOUT, **inputs})}"


def finished_stage(root: Path, name: str, inputs: Mapping[str, Any]) -> Stage:
    """The finished stage of these `inputs`; NotMade where there is none."""
    path = stage_path(root, name, inputs)
    if not os.path.lexists(path / MANIFEST):
        raise NotMade(name)
    manifest = read_sealed(path / MANIFEST)
    files = manifest["files"]
    compare(path, files, hashed=lambda name: "/" not in name and files[name]["bytes"] <= SMALL)
    return Stage(path, manifest, reused=True)


def stage(
    root: Path,
    name: str,
    inputs: Mapping[str, Any],
    build: Callable[[Path], Mapping[str, Any]],
    on_wait: Callable[[str], None] = print,
) -> Stage:
    """Run `build(directory)` unless the stage of these `inputs` is finished.

    `build` fills the directory, resuming what it finds there, and returns the manifest's content; a `cost` entry (gpu
    seconds, tokens, bytes) reaches the ledger. Changing anything in `inputs` names another directory. Where the manifest
    says that parts FAILED, the stage stands for the run that made it, and is built again by the next.
    """
    path = stage_path(root, name, inputs)
    with suppress(NotMade):
        return _without_failures(root, name, inputs)
    lock = lock_of(root, path.name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait(f"{name}: another driver works on {path.name}; waiting for it")
        lock.acquire()
    try:
        with suppress(NotMade):
            return _without_failures(root, name, inputs)
        path.mkdir(exist_ok=True)  # under the lock: who had it before may have removed it
        (path / MANIFEST).unlink(missing_ok=True)
        remove_temporaries(path)
        start = time.perf_counter()
        made = dict(build(path))
        cost = {"seconds": time.perf_counter() - start, "bytes": size_of(path), **made.pop("cost", {})}
        remove_temporaries(path)
        manifest = {"stage": name, "inputs": dict(inputs), **made, "cost": cost, "files": contents(path, UNREAD)}
        write_sealed(path / MANIFEST, manifest)
        return Stage(path, read_sealed(path / MANIFEST), reused=False)
    finally:
        if path.is_dir() and not any(
            path.iterdir()
        ):  # a mistake that was found before anything was made leaves nothing
            path.rmdir()
        lock.release()


def _without_failures(root: Path, name: str, inputs: Mapping[str, Any]) -> Stage:
    made = finished_stage(root, name, inputs)
    if made.manifest.get(FAILED):
        raise NotMade(name)
    return made


def lock_of(root: Path, name: str) -> FileLock:
    """The lock of a stage or run below `root`, which everyone may take whom the umask lets."""
    folder = root / "stages" / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / name, mode=0o666 & ~umask())


def size_of(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def link_or_copy(source: Path, target: Path) -> None:
    """Put `source` (a file or folder) at `target`: hard links where the file system allows, copies otherwise."""

    def place(src: str, dst: str) -> str:
        Path(dst).unlink(missing_ok=True)
        try:
            os.link(src, dst)
        except OSError:
            shutil.copy2(src, dst)
        return dst

    if source.is_dir():
        shutil.copytree(source, target, copy_function=place, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        place(str(source), str(target))
