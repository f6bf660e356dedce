"""How an SAE is measured: what each number of a sweep's page means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raysae.report import read as run
from raysae.report.page import Part


def read(run_dir: Path) -> dict[str, Any]:
    windows = run.table(run_dir)["dead_window_tokens"].dropna().unique()
    evaluation = run.config(run_dir).get("evaluation") or {}
    return {
        "dead_windows": sorted(int(tokens) for tokens in windows),
        "bootstrap": evaluation.get("bootstrap"),
        "confidence": evaluation.get("confidence"),
    }


PART = Part("method", "How it was measured", Path(__file__).with_name("method.html.j2"), read)
