"""The resolved config of a run."""

from pathlib import Path

from raysae.report import read as run
from raysae.report.page import Part

PART = Part(
    "config",
    "Config",
    Path(__file__).with_name("config.html.j2"),
    lambda run_dir: {"config_text": run.config_text(run_dir)},
)
