"""Ray, which places work, and nothing else: the one package that imports it."""

from __future__ import annotations

import os


def given_address() -> str | None:
    """The cluster that `ray job submit` or the user put in the environment."""
    return os.environ.get("RAY_ADDRESS") or ("auto" if os.environ.get("RAY_JOB_ID") else None)


# Ray reads these when it is first imported, which the modules of this package do.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would end a sweep early as if it were whole
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's classic reporter can be told which columns to show
# glibc's, for the worker processes: keep freed tensors instead of giving their pages back to the kernel, which zeroes them
# anew at each step (a fifth of the CPU time of a step at d_sae 6144, batch 2048).
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
if given_address() is None:  # a cluster that is joined has its own
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else each actor pool prints Ray's issue 53727
