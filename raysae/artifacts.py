"""What stages and runs on disk share: hashes that name them, manifests, locks, links."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from raysae.files import SEAL, canonical, read_json, read_sealed, umask

MANIFEST = "manifest.json"
UNREAD = ("tune", "attempts", "state")
"""Parts of a stage that no later one reads: Tune's own records, who tried what, and where the failed could go on from."""


def fingerprint(value: Any, length: int = 12) -> str:
    """Stable hash of a JSON-like value, as hex."""
    return hashlib.blake2b(canonical(value).encode(), digest_size=32).hexdigest()[:length]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a folder, a stage's or one made by hand, which has no seal; Damaged if it is not what was written."""
    if SEAL in read_json(folder / MANIFEST):
        return read_sealed(folder / MANIFEST)
    return read_json(folder / MANIFEST)


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
