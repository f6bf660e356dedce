"""The wheel, in an environment of its own, works from an empty folder; every module and shipped file is in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE_PACKAGES = Path(pytest.__file__).parents[1]
pytestmark = pytest.mark.slow
SMALLEST = {
    "data.examples": 200, "capture.sites": "[blocks.1.resid_post]", "sweep.architectures": "[topk]",
    "sweep.expansion_factors": "[2]", "sweep.samples": 1, "sweep.k_range": "[4,8]", "training.tokens": 20_000,
    "training.batch_size": 512, "evaluation.max_tokens": 1000, "evaluation.bootstrap": 100, "cluster.num_cpus": 2,
    "cluster.dashboard": "false",
}  # fmt: skip


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """A command that sees no checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=kept | env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What is installed from, without what an earlier build left."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("raysae", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    """Built from the sdist, which must hold all that a wheel needs."""
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    done = run(sys.executable, "-c", build, cwd=source)
    assert done.returncode == 0, done.stderr
    (sdist,) = (source / "dist").glob("*.tar.gz")
    pip = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", "dist"]
    done = run(sys.executable, *pip, sdist, cwd=source)
    assert done.returncode == 0, done.stderr
    (file,) = (source / "dist").glob("*.whl")
    return file


def environment(folder: Path, *installed: object) -> Path:
    """The programs of a new virtual environment that has the packages of this one, but of raysae what is `installed`."""
    venv.create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # The .pth files of a folder that is added so, raysae's own among them, are not read
    (packages / "packages.pth").write_text(f"{SITE_PACKAGES}\n")
    programs = folder / "bin"
    pip = f"-m pip --python {programs / 'python'} install --quiet --no-deps --no-index --no-build-isolation".split()
    done = run(sys.executable, *pip, *installed, cwd=folder)
    assert done.returncode == 0, done.stderr
    return programs


def test_the_wheel_holds_every_module_and_shipped_file(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("raysae/")}
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "raysae").rglob("*.py")}
    templates = {str(file.relative_to(ROOT)) for file in (ROOT / "raysae").rglob("*.j2")}
    configs = {f"raysae/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.yaml")}
    assert held == modules | templates | configs | {"raysae/py.typed"} and templates and configs


def test_an_editable_installation_has_the_shipped_files(source, tmp_path):
    programs = environment(tmp_path / "venv", "--editable", source)
    code = (
        "import raysae.evaluate.statistics, raysae.config.load as c; print(c.locate('gate', c.Path('gates/default')))"
    )
    done = run(programs / "python", "-c", code, cwd=tmp_path)
    assert done.stdout.strip() == str(source / "configs/gates/default.yaml"), done.stderr


def test_a_sweep_by_the_name_of_a_shipped_config(wheel, arithmetic_model, tmp_path):
    """All from an empty folder; what needs no extra runs where no extra is installed."""
    programs, work = environment(tmp_path / "venv", wheel), tmp_path / "work"
    work.mkdir()
    done = run(programs / "raysae", "--help", cwd=work)
    assert done.returncode == 0 and "  sweep " in done.stdout, done.stderr
    settings = [word for name, value in SMALLEST.items() for word in (f"--{name}", value)]
    done = run(
        programs / "raysae", "sweep", "--config", "quickstart", "--model.name", arithmetic_model, *settings, cwd=work
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in work.iterdir()] == ["results"]
    (decision,) = work.glob("results/*/decision.json")
    assert json.loads(decision.read_text())["gate"]["name"] == "default"
    assert (decision.parent / "report.html").is_file()

    absent = "import sys; sys.modules.update(dict.fromkeys(['ray', 'optuna', 'wandb', 'matplotlib', 'tensorboard']))\n"
    for argv, status in ((["gate", decision.parent], 3), (["bundle", decision.parent, "--to", "x.tar.gz"], 0)):
        program = f"{absent}sys.argv[1:] = {[*map(str, argv)]}\nfrom raysae.cli import main; main()"
        done = run(programs / "python", "-c", program, cwd=work)
        assert done.returncode == status, done.stdout + done.stderr
    assert (work / "x.tar.gz").is_file()
