"""The seal of a run's folder: written last, it names the stages that the run stands on and hashes every file.

A folder without it is not a finished run. Whoever reads a run compares first: sizes of all files and hashes of those that
lie at the top (decision, table, ledger, config), or of all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from raysae.artifacts import fingerprint
from raysae.errors import Damaged
from raysae.files import compare, contents, read_json, read_sealed, write_sealed

SEAL = "seal.json"
IDENTITY = "identity.json"


def seal(
    folder: Path, stages: Sequence[str], identity: str, added: Collection[str] = (), foreign: Collection[str] = ()
) -> None:
    """Seal what `folder` holds. added: files that a later job put beside the sweep's, which the sweep cannot make again.
    foreign: files that are nobody's here, which are not sealed."""
    files = {name: facts for name, facts in contents(folder, leave=(SEAL,)).items() if name not in set(foreign)}
    kept = [name for name in files if name in set(added)]
    write_sealed(folder / SEAL, {"stages": list(stages), "identity": identity, "files": files, "added": kept})


def check(folder: Path, every_hash: bool = False) -> dict[str, Any]:
    """What the seal says (stages, identity, files, added), if the folder is what it was; Damaged, in one line, if not."""
    said = read_sealed(folder / SEAL)
    compare(folder, said["files"], hashed=lambda name: every_hash or "/" not in name)
    return said


def added(folder: Path, said: Mapping[str, Any], file: Path) -> bool:
    """Whether a file is one that a later job put there."""
    return file.is_relative_to(folder) and file.relative_to(folder).as_posix() in said["added"]


def identity_of(folder: Path) -> str | None:
    """Fingerprint of the identity of the run in a folder, from its seal or else its `identity.json`; None if there is
    neither, Damaged if neither can be read."""
    if not any((folder / name).is_file() for name in (SEAL, IDENTITY)):
        return None
    try:
        return read_sealed(folder / SEAL)["identity"]
    except Damaged:
        pass
    try:
        return fingerprint(read_json(folder / IDENTITY))
    except Damaged as error:
        mend = f"delete {folder} and run again, or give another --run"
        raise Damaged(error.file, error.how, mend) from None
