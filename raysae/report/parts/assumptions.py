"""What a gate takes for granted."""

from pathlib import Path

from raysae.report import read as run
from raysae.report.page import Part

PART = Part(
    "assumptions",
    "",
    Path(__file__).with_name("assumptions.html.j2"),
    lambda run_dir: {"assumptions": run.decision(run_dir).get("assumptions")},
)
