"""A run's folder, replaced as one whole: made beside its place, sealed, and renamed there.

So a reader, or whoever comes after a kill, never sees the table of one run beside the decision of another. What others put
into the folder stays: the results of later jobs as long as the run stands on the same stages, anything else always.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from raysae.artifacts import link_or_copy, lock_of
from raysae.errors import Damaged
from raysae.files import is_temporary, read_sealed, whole_folder
from raysae.progress import say
from raysae.report import write_report
from raysae.seal import SEAL, added, check, seal


def stands(folder: Path, stages: Sequence[str], every_hash: bool = False) -> bool:
    """Whether `folder` is the sealed run of these stages; if not, it is to be written (again), and a line says why.

    Damaged where a file is that only a later job can make again.
    """
    if not os.path.lexists(folder / SEAL):
        return False
    said: Mapping[str, Any] = {"added": []}
    try:
        said = read_sealed(folder / SEAL)
        check(folder, every_hash)
    except Damaged as error:
        if os.path.lexists(error.file) and added(folder, said, error.file):
            mend = "delete it, and let the job that made it make it again"
            raise Damaged(error.file, error.how, mend) from None
        say(f"{error.file} {error.how}: {folder} is written again from its stages")
        return False
    return said["stages"] == list(stages)


def write(
    folder: Path, root: Path, stages: Sequence[str], identity: str, fill: Callable[[Path], None],
    report: Callable[[Path], object] = write_report,
) -> None:  # fmt: skip
    """Replace `folder` by what `fill` writes into an empty one, its report, and what is kept of the old one; sealed."""
    with lock_of(root, f"run-{folder.name}"), whole_folder(folder) as made:
        fill(made)
        kept, foreign = _keep(folder, made, stages)
        report(made)
        seal(made, stages, identity, kept, foreign)


def add(folder: Path, fill: Callable[[Path], None], names: Collection[str], shown: bool = True) -> None:
    """Let `fill` write files or folders of these names into a copy of a sealed run, which then replaces it, seal and,
    where they are `shown` there, report renewed."""
    folder = folder.resolve()
    with lock_of(folder.parent, f"run-{folder.name}"), whole_folder(folder) as made:
        said = check(folder)
        foreign = {*_link(folder, made, lambda name: True)} - {*said["files"]}
        fill(made)
        if shown and "report.html" in said["files"]:
            write_report(made)
        new = [f.relative_to(made).as_posix() for name in names for f in (made / name, *(made / name).rglob("*"))]
        seal(made, said["stages"], said["identity"], {*said["added"], *new}, foreign - {*new})


def _keep(old: Path, new: Path, stages: Sequence[str]) -> tuple[list[str], set[str]]:
    """Link into `new` what `old` holds beside the sweep's own files: the names that later jobs added, and all others."""
    said: Mapping[str, Any] = {"stages": None, "files": {}, "added": []}
    with suppress(Damaged):
        said = read_sealed(old / SEAL)
    stale = [] if said["stages"] == list(stages) else said["added"]
    if stale:
        say(f"{', '.join(stale)}: of other stages, left out of {old}")
    gone = {SEAL, *(name for name in said["files"] if name not in said["added"]), *stale}
    kept = _link(old, new, lambda name: name not in gone and not os.path.lexists(new / name))
    return said["added"], {*kept} - {*said["added"]}


def _link(old: Path, new: Path, wanted: Callable[[str], bool]) -> list[str]:
    """Link the files below `old` whose names are wanted into `new`, and return these names; links stay links."""
    linked = []
    for below, folders, names in os.walk(old):
        folders[:] = [name for name in folders if not is_temporary(name)]
        for name in [*names, *(f for f in folders if Path(below, f).is_symlink())]:
            file = Path(below, name)
            relative = file.relative_to(old).as_posix()
            if is_temporary(name) or not wanted(relative):
                continue
            linked.append(relative)
            if file.is_symlink():
                (new / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, new / relative, follow_symlinks=False)
            else:
                link_or_copy(file, new / relative)
    return linked
