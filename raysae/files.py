"""Files that others can rely on: whole or absent, readable by whoever may, and noticed when they are not what was written.

A file or folder is made beside its place, synced to disk, and renamed there, so that neither a reader, a kill nor a power
cut ever finds half of it. `contents` lists the files of a folder with size and sha256, `compare` finds the first that is
another. JSON that states its own hash (`write_sealed`) is the list's own cover.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from raysae.errors import Damaged, UserError

LONGEST_NAME = 180
"""Bytes in the name of a folder: file systems allow 255, and a temporary name says more."""
SEAL = "seal"
"""The key of sealed JSON under which the hash of all the rest stands."""
_TEMPORARY = re.compile(r"\.(?P<of>.+?)\.(?:(?P<host>[0-9a-f]{8})-)?(?P<pid>\d+)\.tmp")


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it there: readers see all of it or none.

    The file and its folder are synced, so that what was written before a power cut is there after it. Its mode is what the
    umask leaves, whatever library wrote it.
    """
    temporary = _temporary(path)
    try:
        write(temporary)
        _settle_file(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON by rename, readable, with a trailing newline. What is not finite is null: NaN is no JSON."""
    text = json.dumps(plain(value), indent=1, default=str, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text))


def plain(value: Any) -> Any:
    """`value` as JSON holds it: with null for every number that is not finite, and arrays and their numbers as Python's."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill beside `folder`, which it replaces as one whole at the end; nothing is left of it after an error.

    Where the system can exchange two folders (Linux, but not on NFS) there is no moment without one; elsewhere a kill at
    the wrong one leaves the old folder as `.<name>.old`, which comes back the next time.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(folder)
    temporary, old = _temporary(folder), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    _remove(temporary)
    made = temporary / folder.name  # what is written inside may say what it is called
    made.mkdir(parents=True)
    try:
        yield made
        settle(made)
        if not os.path.lexists(folder):
            made.rename(folder)
        elif not _exchange(made, folder):
            _remove(old)
            folder.rename(old)
            made.rename(folder)
            _remove(old)
        sync(folder.parent)
    finally:
        _remove(temporary)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system has no such step."""
    if not sys.platform.startswith("linux"):
        return False
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return rename(here, os.fsencode(one), here, os.fsencode(other), both) == 0
    return False


def settle(folder: Path) -> None:
    """Sync every file and folder below `folder` to disk, and give the files the mode that the umask leaves."""
    for below, _, names in os.walk(folder):
        for name in names:
            file = Path(below, name)
            if not file.is_symlink():
                _settle_file(file)
        sync(Path(below))


def _settle_file(file: Path) -> None:
    with suppress(PermissionError):  # another's file, hard-linked: its owner has seen to it
        file.chmod(0o666 & ~umask())
    sync(file)


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to disk."""
    with suppress(OSError):  # some file systems sync no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def umask() -> int:
    """The process's umask, read without setting it where the system says it: other threads create files meanwhile."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


# ----------------------------------------------------------------------------------------------------------------------
# What dead writers leave


@lru_cache(maxsize=1)
def _host() -> str:
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


def _temporary(path: Path) -> Path:
    """A name beside `path` that says who writes there."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is somebody's that has not been renamed to its place."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporaries(folder: Path) -> None:
    """Remove all temporary files and folders below `folder`, which nobody else writes to now."""
    for below, folders, names in os.walk(folder):
        for name in filter(is_temporary, [*folders, *names]):
            _remove(Path(below, name))


def remove_dead(path: Path) -> None:
    """Remove what writers of `path` left beside it that are no longer running."""
    for file in path.parent.glob(f".{_literal(path.name)}.*.tmp"):
        found = _TEMPORARY.fullmatch(file.name)
        if found and found["of"] == path.name and found["host"] in (None, _host()) and not _runs(int(found["pid"])):
            _remove(file)


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_json(path: Path, kind: type = dict) -> Any:
    """The mapping (or other `kind`) in a JSON file; Damaged, in one line that names the file, if it holds none."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(path, "is missing") from None
    except OSError as error:
        raise Damaged(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise Damaged(path, "is not JSON") from None
    if not isinstance(value, kind):
        wanted = "mapping" if kind is dict else kind.__name__
        raise Damaged(path, f"holds a {type(value).__name__}, not a {wanted}")
    return value


def read_json_if(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty where there is no file."""
    return read_json(path) if path.is_file() else {}


def read_table(path: Path) -> Any:
    """The pandas table in a Parquet file; Damaged, in one line that names the file, if it holds none."""
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(path, "is missing") from None
    except Exception as error:  # a damaged file can fail anywhere in its reader
        raise Damaged(path, f"is not a Parquet table ({type(error).__name__})") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    for chunk in iter(lambda: file.read(1 << 20), b""):
        digest.update(chunk)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# What a folder holds


def contents(folder: Path, leave: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of each file below `folder` by relative name, sorted; synced, and with the umask's mode.

    Without links, temporary files, and what has a name of `leave` directly below `folder`.
    """
    found: list[Path] = []
    for below, folders, names in os.walk(folder):
        at_top = Path(below) == folder
        folders[:] = [name for name in folders if not is_temporary(name) and not (at_top and name in leave)]
        files = (Path(below, name) for name in names if not is_temporary(name) and not (at_top and name in leave))
        found += [file for file in files if not file.is_symlink()]
        sync(Path(below))
    found.sort(key=lambda file: file.relative_to(folder).as_posix())

    def facts(file: Path) -> dict[str, Any]:
        _settle_file(file)
        return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        every = zip(found, pool.map(facts, found), strict=True)
        return {file.relative_to(folder).as_posix(): fact for file, fact in every}


def compare(
    folder: Path, files: Mapping[str, Mapping[str, Any]], hashed: Callable[[str], bool] = lambda name: True
) -> None:
    """Damaged for the first of `files` (as of `contents`) that is not what it was: by its size, and by its sha256 where
    `hashed(name)` says so."""

    def check(item: tuple[str, Mapping[str, Any]]) -> None:
        name, facts = item
        file = folder / name
        if not file.is_file():
            raise Damaged(file, "is missing")
        size = file.stat().st_size
        if size != facts["bytes"]:
            raise Damaged(file, f"has {size:,} bytes, not {facts['bytes']:,}")
        if hashed(name) and sha256_of(file) != facts["sha256"]:
            raise Damaged(file, "does not match its sha256")

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(check, files.items()):
            pass


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with the hash of the rest under SEAL, so that no byte of it changes unnoticed."""
    value = json.loads(json.dumps(plain(value), default=str, allow_nan=False))
    write_json(path, {**value, SEAL: _seal(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote; Damaged if it is anything else."""
    value = read_json(path)
    seal = value.pop(SEAL, None)
    if seal is None:
        raise Damaged(path, f"has no {SEAL}")
    if seal != _seal(value):
        raise Damaged(path, "does not match its own hash")
    return value


def _seal(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def canonical(value: Any) -> str:
    """`value` as JSON with one spelling: sorted keys, no spaces. TypeError for what JSON does not know."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


# ----------------------------------------------------------------------------------------------------------------------
# Names that become paths


def folder_name(value: Any, field: str) -> str:
    """`value`, if it can be the name of one folder: UserError, naming the field or file that it is from, otherwise."""
    why = _no_folder_name(value)
    if why:
        shown = repr(value if not isinstance(value, str) or len(value) <= 60 else f"{value[:57]}...")
        raise UserError(f"{field}: {shown} is not the name of a folder: {why}")
    return value


def is_folder_name(value: Any) -> bool:
    """Whether `value` can be the name of one folder."""
    return not _no_folder_name(value)


def _no_folder_name(value: Any) -> str:
    if not isinstance(value, str):
        return f"it is a {type(value).__name__}"
    if not value.strip():
        return "it is empty"
    if not value.isprintable() or value != value.strip():
        return "it holds control characters, or blanks at its ends"
    if "/" in value or "\\" in value:
        return "it is a path"
    if value.startswith("."):
        return "it starts with a dot"
    return f"it is longer than {LONGEST_NAME} bytes" if len(value.encode()) > LONGEST_NAME else ""


def inside(folder: Path, *names: str) -> Path:
    """`folder/<names>`; UserError if a link on the way leads out of `folder`."""
    path = folder.joinpath(*names)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: leads out of {folder}; remove the link")
    return path


def output_root(path: Path, given: bool) -> Path:
    """The absolute output root; refuses a relative one inside a job's temporary folder, where results would be lost."""
    if not given and os.environ.get("RAYSAE_OUTPUT"):
        path = Path(os.environ["RAYSAE_OUTPUT"]).expanduser()
    if not path.is_absolute() and "_ray_pkg_" in str(Path.cwd()):
        raise UserError(
            f"output: {path} is relative, inside the job's temporary folder; give an absolute one "
            "(--output or RAYSAE_OUTPUT)"
        )
    path = path.absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"output: {there} is not a folder; give another (--output or RAYSAE_OUTPUT)")
    for folder in (there, path / "stages"):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"output: {folder} cannot be written to; give one that is yours (--output or RAYSAE_OUTPUT)"
            )
    return path
