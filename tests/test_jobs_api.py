"""`ray job submit` to a head with 8 logical GPUs: the job runs there, and its results are where they were asked for."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from small import small_values, write_config

import raysae

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def head():
    """The environment that reaches a head with 8 logical GPUs on 2 CPUs."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a short path: Ray puts sockets there
    gcs, dashboard, agent = free_port(), free_port(), free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}
    command = [
        RAY, "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", "--num-cpus=2", "--num-gpus=8",
        "--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--object-store-memory=200000000",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{dashboard}"
    try:
        yield {**env, "RAY_API_SERVER_ADDRESS": url}
    finally:
        process.terminate()  # `--block` takes down what it started
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def submit(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    """The job, submitted as the README says, once the head can take one; returns when it has ended."""
    excludes = '{"excludes": [".git", ".venv", "results", "tests"]}'
    command = [RAY, "job", "submit", "--working-dir", str(ROOT), "--runtime-env-json", excludes, "--"]
    for _ in range(60):
        done = subprocess.run(
            [*command, sys.executable, "jobs/sweep_sae.py", *arguments],
            env=env, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        if "submitted successfully" in done.stdout:
            return done
        time.sleep(2)
    raise AssertionError(f"the head took no job: {done.stdout}{done.stderr}")


@pytest.mark.timeout(900)
def test_the_quickstart_runs_through_the_jobs_api(head, arithmetic_model, tmp_path):
    output = tmp_path / "results"
    values = small_values(arithmetic_model, output, sweep={"pack_size": 2})
    values["cluster"] = {"capture_actors": 2}  # of 8: two cores would take minutes to start eight
    values["gate"] = "configs/gates/default.yaml"
    done = submit(head, "--config", str(write_config(tmp_path / "job.yaml", values)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 GPUs" in done.stdout and "dashboard http" in done.stdout and "tensorboard --logdir" in done.stdout
    (directory,) = {file.parent for file in output.glob("*/decision.json")}
    run = raysae.Run.open(directory)
    assert set(run.table["status"]) == {"completed"} and len(run.saes) == 4
    assert run.ledger["total"]["gpu_seconds"] > 0

    # Without an absolute output the results would be lost with the job's folder.
    lost = submit(head)
    assert lost.returncode != 0 and "error: output:" in lost.stdout + lost.stderr
