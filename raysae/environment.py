"""What a run was made with: this code, Python, packages and machine. Written when it is made, not when it is looked at."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from raysae import __version__

PACKAGE = Path(__file__).resolve().parent
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG")
"""Environment variables that change how, and with that in which order, sums are computed."""


def environment() -> dict[str, Any]:
    """Code version, Python, packages and devices of this process. No host name, user, path or secret."""
    return {
        "raysae": {"version": __version__, **code_version(PACKAGE)},
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {
            name: version
            for name, version in sorted({(d.metadata["Name"], d.version) for d in metadata.distributions()})
            if name
        },
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def code_version(package: Path) -> dict[str, Any]:
    """`commit` of the git checkout that holds `package`, and whether its files differ from it (`dirty`).

    Both None where the package is no part of a checkout. A virtual environment inside somebody's checkout is none: git
    must know the package's own files.
    """
    none: dict[str, Any] = {"commit": None, "dirty": None}
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return none
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", ".")
    return none if commit is None or changed is None else {"commit": commit, "dirty": changed != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None where it is absent or refuses."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    """The processor's model, as Linux names it; what Python knows elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or sys.platform
