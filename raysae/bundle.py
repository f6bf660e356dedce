"""One archive with all that an auditor of a run needs, and the sha256 of each part.

It holds every file of the run's folder (config, identity, environment, decision, table, metrics, ledger, figures, report,
a replication's outcome), and from the stages it stands on their manifests, which say what went in: the hashes of the data,
of the tokens, of the model's weights and of each shard. Weights are left out unless asked for; their hashes are there
either way. The same run gives the same bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

from raysae.artifacts import MANIFEST, read_manifest
from raysae.errors import UserError
from raysae.files import is_temporary, remove_dead, sha256_of, write_atomic
from raysae.run import Run
from raysae.sae.formats.saelens import WEIGHTS
from raysae.seal import check

CONTENTS = "MANIFEST.json"
ENDING = ".tar.gz"


def bundle(run: Run, path: Path | None = None, weights: bool = False) -> Path:
    """Write the archive of `run` to `path` (beside the run's folder if None), and return where it is.

    Its members lie below `<run>/`, `<run>/MANIFEST.json` first: run, members (sha256 and bytes by name), weights (sha256 by
    SAE and null, whether or not they are in). UserError if `path` is no .tar.gz, or the run or a stage that it stands on is
    damaged or gone.
    """
    name = run.path.resolve().name
    path = Path(path) if path is not None else run.path.resolve().parent / f"{name}{ENDING}"
    if not path.name.endswith(ENDING):
        raise UserError(f"bundle: {path} must end in {ENDING}")
    if not path.resolve().parent.is_dir():
        raise UserError(f"bundle: {path.resolve().parent} is not a folder; make it, or give another path")
    if path.resolve().is_relative_to(run.path.resolve()):
        raise UserError(f"bundle: {path} lies inside the run; give a path outside of it")
    check(run.path, every_hash=True)
    remove_dead(path)
    members = {**_run_files(run.path, weights), **_stage_manifests(run)}
    contents = {
        "run": name,
        "members": {at: {"sha256": sha256_of(file), "bytes": file.stat().st_size} for at, file in members.items()},
        "weights": {file.parent.name: sha256_of(file) for file in sorted(run.path.glob(f"*/*/{WEIGHTS}"))},
    }
    first = (json.dumps(contents, indent=1, sort_keys=True) + "\n").encode()

    def write(temporary: Path) -> None:
        with (
            temporary.open("wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as zipped,
            tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.addfile(_entry(f"{name}/{CONTENTS}", len(first)), io.BytesIO(first))
            for at, file in members.items():
                with file.open("rb") as content:
                    archive.addfile(_entry(f"{name}/{at}", file.stat().st_size), content)

    write_atomic(path, write)
    return path


def _run_files(folder: Path, weights: bool) -> dict[str, Path]:
    """Files of the run's folder by relative name, sorted; what links elsewhere (Tune's experiment) is not the run's."""
    found = {}
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        wanted = weights or file.name != WEIGHTS
        if wanted and file.is_file() and not file.is_symlink() and not is_temporary(file.name):
            found[relative.as_posix()] = file
    return found


def _stage_manifests(run: Run) -> dict[str, Path]:
    """The manifest of each stage in the ledger, as `stages/<stage>.json`."""
    found = {}
    for name in run.sealed["stages"]:
        folder = run.stage_directory(name)
        read_manifest(folder)
        found[f"stages/{name}.json"] = folder / MANIFEST
    return dict(sorted(found.items()))


def _entry(name: str, size: int) -> tarfile.TarInfo:
    """A member without time, owner or the mode of whoever wrote it."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o644, 0
    return entry
