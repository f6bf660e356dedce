"""Stage directories: named by the hash of what goes in, finished when their manifest is there.

A stage is a function from inputs and a config to a directory. `stage()` gives the directory
`<root>/stages/<name>-<hash>/`; if it holds a `manifest.json` the work is skipped, otherwise the build runs, resuming
whatever it finds, and the manifest is written last, by rename. That is the whole resume story. A lock keeps two drivers
out of one stage; it is the kernel's, so a killed driver leaves none behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

MANIFEST = "manifest.json"


class NotMade(LookupError):
    """A stage that was only looked for is not finished."""


@dataclass(frozen=True)
class Stage:
    """A finished stage: where it is, what its manifest says, and whether this call found it finished."""

    path: Path
    manifest: dict[str, Any]
    reused: bool


def canonical(value: Any) -> str:
    """`value` as JSON with one spelling: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def fingerprint(value: Any, length: int = 12) -> str:
    """Stable hash of a JSON-like value, as hex."""
    return hashlib.blake2b(canonical(value).encode(), digest_size=32).hexdigest()[:length]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    for chunk in iter(lambda: file.read(1 << 20), b""):
        digest.update(chunk)
    return digest.hexdigest()


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it there: readers see all of it or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON by rename, readable, with a trailing newline."""
    text = json.dumps(value, indent=1, default=lambda v: v.item() if hasattr(v, "item") else str(v)) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_json_if(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty where there is no file."""
    return read_json(path) if path.is_file() else {}


def stage_path(root: Path, name: str, inputs: Mapping[str, Any]) -> Path:
    """Where the stage of these `inputs` lies, finished or not."""
    return root / "stages" / f"{name}-{fingerprint({'stage': name, **inputs})}"


def finished_stage(root: Path, name: str, inputs: Mapping[str, Any]) -> Stage:
    """The finished stage of these `inputs`; NotMade where there is none."""
    path = stage_path(root, name, inputs)
    if not (path / MANIFEST).exists():
        raise NotMade(name)
    return Stage(path, read_json(path / MANIFEST), reused=True)


def stage(
    root: Path,
    name: str,
    inputs: Mapping[str, Any],
    build: Callable[[Path], Mapping[str, Any]],
    on_wait: Callable[[str], None] = print,
) -> Stage:
    """Run `build(directory)` unless the stage of these `inputs` is finished.

    `build` fills the directory, resuming what it finds there, and returns the manifest's content; a `cost` entry (gpu
    seconds, tokens, bytes) reaches the ledger. Changing anything in `inputs` names another directory.
    """
    path = stage_path(root, name, inputs)
    if (path / MANIFEST).exists():
        return Stage(path, read_json(path / MANIFEST), reused=True)
    (root / "stages" / ".locks").mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / "stages" / ".locks" / path.name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait(f"{name}: another driver works on {path.name}; waiting for it")
        lock.acquire()
    try:
        if (path / MANIFEST).exists():
            return Stage(path, read_json(path / MANIFEST), reused=True)
        path.mkdir(exist_ok=True)  # under the lock: who had it before may have removed it
        start = time.perf_counter()
        made = dict(build(path))
        cost = {"seconds": time.perf_counter() - start, "bytes": size_of(path), **made.pop("cost", {})}
        manifest = {"stage": name, "inputs": dict(inputs), **made, "cost": cost}
        write_json(path / MANIFEST, manifest)
        return Stage(path, read_json(path / MANIFEST), reused=False)
    finally:
        if path.is_dir() and not any(
            path.iterdir()
        ):  # a mistake that was found before anything was made leaves nothing
            path.rmdir()
        lock.release()


def size_of(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def cpu_seconds() -> float:
    """CPU seconds that this process has used so far, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


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
