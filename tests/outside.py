"""What tests need from outside this checkout: data, a browser, other libraries.

Under RAYSAE_REQUIRE_DATA=1, which `.ci/run` sets, a test fails where it is absent; else the test is skipped.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, NoReturn

import pytest

REQUIRED = os.environ.get("RAYSAE_REQUIRE_DATA") == "1"


def absent(what: str, required: bool = REQUIRED) -> NoReturn:
    """End the test that cannot do without it."""
    if required:
        pytest.fail(f"{what} (and RAYSAE_REQUIRE_DATA=1)")
    pytest.skip(what)


def foreign(name: str) -> Any:
    """The module of a foreign library."""
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # sparsify's Triton decoder cannot run on a CPU
    return importlib.import_module(name) if REQUIRED else pytest.importorskip(name)
