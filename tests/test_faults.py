"""Whatever is killed in mid-run, the rerun ends with the same rows and, on a CPU with a grid, the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small import sae_hashes, small_job, small_values, stage_of, write_config

import raysae
from raysae.activations import capture
from raysae.activations.store import Store
from raysae.errors import CaptureError

ROOT = Path(__file__).resolve().parents[1]
LONGER = {"tokens": 80_000, "rungs": 8}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, arithmetic_model, tmp_path_factory) -> raysae.Run:
    return raysae.sweep(small_job(arithmetic_model, tmp_path_factory.mktemp("undisturbed"), training=LONGER))


def rows_of(output: Path) -> dict[str, int]:
    store = Store(stage_of(output, "store"))
    store.verify()
    return {shard.name: shard.rows for shard in store.shards}


def wait_for(what: Callable[[], object], seconds: float = 120) -> object:
    """The first true value of `what()`; fails after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("what was waited for did not happen")


def sweep_while_killing(find_pid: Callable[[], int | None], model: Path, output: Path) -> raysae.Run:
    """The run of `undisturbed` while the process that `find_pid` finds is killed, once; fails where none was."""
    killed: list[int] = []

    def kill() -> None:
        pid = wait_for(find_pid)
        assert isinstance(pid, int) and pid != os.getpid()
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    run = raysae.sweep(small_job(model, output, training=LONGER))
    thread.join()
    assert killed
    return run


def same(run: raysae.Run, undisturbed: raysae.Run) -> None:
    assert rows_of(run.path.parent) == rows_of(undisturbed.path.parent)
    assert sae_hashes(run.path) == sae_hashes(undisturbed.path)
    assert list(run.table["fvu"]) == list(undisturbed.table["fvu"])


def test_a_killed_capture_actor(ray_cluster, undisturbed, arithmetic_model, tmp_path):
    def actor() -> int | None:  # at work on a block, when one shard is done already
        if not list(tmp_path.glob("stages/store-*/shards/*.json")):
            return None
        for file in tmp_path.glob("stages/store-*/attempts/train-*"):
            try:
                return int(file.read_text().split()[-1])
            except (OSError, IndexError):
                continue
        return None

    same(sweep_while_killing(actor, arithmetic_model, tmp_path), undisturbed)


def test_a_killed_trial(ray_cluster, undisturbed, arithmetic_model, tmp_path):
    def trial() -> int | None:  # one with a checkpoint, and more to do
        for file in tmp_path.glob("stages/sweep-*/tune/*/result.json"):
            lines = file.read_text().splitlines()
            if len(lines) >= 2 and not json.loads(lines[-1])["final"]:
                return json.loads(lines[-1])["pid"]
        return None

    same(sweep_while_killing(trial, arithmetic_model, tmp_path), undisturbed)


def start_job(config: Path) -> subprocess.Popen:
    log = config.with_suffix(".log").open("a")
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "sweep_sae.py"), "--config", str(config)],
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


@pytest.mark.timeout(900)
def test_a_killed_driver(undisturbed, arithmetic_model, tmp_path):
    """Killed in the capture, killed again in the sweep, then left alone."""
    output = tmp_path / "results"
    config = write_config(tmp_path / "job.yaml", small_values(arithmetic_model, output, training=LONGER))
    captured, trained = "stages/store-*/shards/*.json", "stages/sweep-*/history/*.jsonl"
    shards: dict[Path, int] = {}
    for sign in (captured, trained):
        driver = start_job(config)
        try:
            wait_for(lambda sign=sign, driver=driver: list(output.glob(sign)) or driver.poll() is not None)
            assert driver.poll() is None, config.with_suffix(".log").read_text()
        finally:
            driver.kill()
            driver.wait()
        shards = {file: file.stat().st_mtime_ns for file in output.glob(captured)} | shards
    assert not list(output.glob("*/decision.json"))
    driver = start_job(config)
    assert driver.wait(timeout=400) == 0, config.with_suffix(".log").read_text()
    assert all(file.stat().st_mtime_ns == made for file, made in shards.items())  # not captured again
    (directory,) = {file.parent for file in output.glob("*/decision.json")}
    same(raysae.Run.open(directory), undisturbed)


@pytest.mark.timeout(900)
def test_a_lost_node(undisturbed, arithmetic_model, tmp_path):
    """A node of a simulated cluster goes in the capture, another in the sweep."""
    script = Path(__file__).with_name("lose_nodes.py")
    config = small_values(arithmetic_model, tmp_path / "results", training=LONGER)
    config["cluster"] = {"capture_actors": 2, "max_restarts": 4}
    done = subprocess.run(
        [sys.executable, str(script), str(write_config(tmp_path / "job.yaml", config))],
        capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("removed a node") == 2
    (directory,) = {file.parent for file in (tmp_path / "results").glob("*/decision.json")}
    same(raysae.Run.open(directory), undisturbed)


def test_a_block_that_always_kills_its_host_fails_with_its_name(ray_cluster, arithmetic_model, tmp_path, monkeypatch):
    real = capture.Capture

    class Deadly(real):
        def __call__(self, host, block):
            if block.name.startswith("train-00001"):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(host, block)

    monkeypatch.setattr(capture, "Capture", Deadly)
    with pytest.raises(CaptureError, match=r"train-00001-\w+ killed its host 2 times"):
        raysae.sweep(small_job(arithmetic_model, tmp_path, cluster={"max_restarts": 1}))
    assert not list(tmp_path.glob("stages/store-*/manifest.json"))
    monkeypatch.setattr(capture, "Capture", real)
    assert rows_of(raysae.sweep(small_job(arithmetic_model, tmp_path)).path.parent)
