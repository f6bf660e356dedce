"""The two rules of the house: imports point downwards only, and Ray is imported in one package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "raysae"
GROUND = (
    "errors", "config", "files", "artifacts", "seal", "progress", "units", "placement", "environment", "workspace",
)  # fmt: skip
LAYERS = (
    "data", "models", "sae", "activations", "sweep", "bench", "evaluate", "plan", "gates", "report", "looks", "run",
    "run_folder", "job", "bundle", "on_ray", "stages", "studies", "cli",
)  # fmt: skip
"""Upwards."""
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Modules that a file imports when it is loaded or run, not counting what only a type checker reads."""
    tree = ast.parse(file.read_text())
    checked_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) not in checked_only:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
    return names


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_downwards(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":  # the package's face
        return
    order = {name: 0 for name in GROUND} | {name: i + 1 for i, name in enumerate(LAYERS)}
    above = {m for m in imported(file) if m.startswith("raysae.") and order[part_of(m)] > order[own]}
    assert not above


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_ray_is_imported_only_where_work_is_placed(file):
    uses_ray = any(m == "ray" or m.startswith("ray.") for m in imported(file))
    assert not uses_ray or file.parent == PACKAGE / "on_ray"


def test_the_core_runs_without_ray_and_pydantic():
    code = """
import sys
for name in ("ray", "pydantic", "pydantic_settings", "optuna", "wandb"):
    sys.modules[name] = None
import raysae.sae.train, raysae.sae.formats, raysae.activations.store, raysae.activations.capture
import raysae.models.host, raysae.models.embedded, raysae.data.tokens, raysae.sweep.trial, raysae.evaluate.fidelity
import raysae.evaluate.probes, raysae.evaluate.features, raysae.evaluate.nulls, raysae.evaluate.stability
import raysae.evaluate.transfer, raysae.evaluate.risk, raysae.evaluate.invariance
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
