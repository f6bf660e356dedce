"""What tests need from outside: its absence is a skip, and a failure where RAYSAE_REQUIRE_DATA asks for it."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NEEDS = """
import outside, browser
def test_data(shared): pass
def test_library(): outside.foreign("no_such_library")
def test_page(tmp_path): browser.visit(tmp_path / "page.html", tmp_path)
"""


@pytest.mark.parametrize(
    ("given", "ends"),
    [
        ({}, {"skipped": 3}),
        ({"CI": "true"}, {"skipped": 3}),
        ({"RAYSAE_REQUIRE_DATA": "1"}, {"failed": 2, "error": 1}),
        ({"RAYSAE_REQUIRE_DATA": "1", "RAYSAE_CHROMIUM": "none"}, {"failed": 1, "skipped": 1, "error": 1}),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_is_absent(given, ends, tmp_path):
    (tmp_path / "test_needs.py").write_text(NEEDS)
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    rules = ("CI", "RAYSAE_REQUIRE_DATA", "RAYSAE_CHROMIUM")
    env = {name: value for name, value in os.environ.items() if name not in rules}
    env |= {"RAYSAE_TEST_DATA": str(tmp_path), "PYTHONPATH": str(TESTS), "PATH": str(tmp_path), **given}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    last = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    ).stdout.splitlines()[-1]
    counted = {word.strip(","): int(number) for number, word in pairwise(last.split()) if number.isdigit()}
    assert counted == ends, last
