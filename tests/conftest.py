"""Shared fixtures: the folder of real inputs, and one Ray cluster per test session."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from outside import absent

ROOT = Path(__file__).resolve().parents[1]
ON_RAY = (
    "test_bench.py",
    "test_damage.py",
    "test_faults.py",
    "test_flow.py",
    "test_jobs_api.py",
    "test_readme.py",
    "test_replicate.py",
    "test_study.py",
    "test_wheel.py",
)
"""Files whose tests start Ray or use its cluster. Under xdist one worker runs them all, so that there is one cluster."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests go to the workers one by one, those of ON_RAY together and first. (`--dist loadgroup` would do, but for
    pytest 9.2, whose node ids xdist 3.8 cannot mark.)"""
    from xdist.scheduler import LoadScopeScheduling

    class OneCluster(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.split("::")[0].endswith(ON_RAY) else nodeid

    return OneCluster(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of another file that asks for the cluster would start a second one."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()) and item.path.name not in ON_RAY:
            raise pytest.UsageError(f"{item.nodeid} uses ray_cluster: add {item.path.name} to ON_RAY in conftest.py")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and datasets; see outside.py for where they are absent."""
    path = Path(os.environ.get("RAYSAE_TEST_DATA", ROOT.parent / "shared"))
    if not (path / "models").is_dir():
        absent(f"no test data at {path}; set RAYSAE_TEST_DATA")
    return path


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Threads cost the tests' tiny products ten times what they save. Workers of Ray are not touched."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def arithmetic_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's architecture and tokenizer with random weights: a real model that costs no training."""
    import torch

    from raysae.models.embedded import build_model, build_tokenizer

    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    build_model(tokenizer, 32, 3, 2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def ray_cluster():
    """The one local cluster of the session: the files of ON_RAY alone may use it."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    yield
    ray.shutdown()
