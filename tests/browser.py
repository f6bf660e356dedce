"""A page as a headless Chromium leaves it: its DOM, what it wrote to the console, and what it asked the network for.

Where there is no Chromium its tests are skipped; under RAYSAE_REQUIRE_DATA=1 they fail, unless RAYSAE_CHROMIUM=none says
that none could be installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from outside import REQUIRED, absent

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
)
ITS_OWN = {"clients2.google.com", "accounts.google.com", "update.googleapis.com", "www.google.com"}
"""Hosts that the browser itself looks for, whatever the page; no name is resolved here."""


class Visit(NamedTuple):
    dom: str
    console: list[str]
    asked: list[str]  # addresses that the page asked for, but for files and data


def visit(page: Path, tmp_path: Path, script: str = "", fragment: str = "") -> Visit:
    """Open a page and run `script` at its end. The script stands in a copy beside the page, whose links hold there too."""
    if CHROMIUM is None:
        absent("no Chromium found", REQUIRED and os.environ.get("RAYSAE_CHROMIUM") != "none")
    driven = page.with_name(f"driven-{page.name}")
    driven.write_text(page.read_text() + (f"<script>{script}</script>" if script else ""))
    log = tmp_path / "net.json"
    command = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"{driven.as_uri()}{fragment}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    finally:
        driven.unlink()
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    addresses = set(re.findall(r'"url":\s*"((?:https?|wss?|ftp)://[^"]*)', log.read_text()))
    return Visit(done.stdout, console, sorted(a for a in addresses if urlsplit(a).hostname not in ITS_OWN))
