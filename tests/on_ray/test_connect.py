"""Joining a cluster that is not there ends in bounded time; one that raysae starts is its owner's alone."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysae.errors import UserError
from raysae.on_ray import cluster


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(cluster, "say", lines.append)
    return lines


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_head_that_is_gone_is_waited_for_aloud_and_not_for_long(address, said):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and listens to nobody
        address, began = address.format(taken.getsockname()[1]), time.monotonic()
        with pytest.raises(UserError, match=r"cluster.address: no Ray .* within 0.4 s \(Connection refused\)"):
            cluster.wait_for(address, within=0.4, told_after=0.1)
    assert time.monotonic() - began < 5
    assert said == [f"cluster: waiting for the Ray cluster at {address}, for up to 0.4 s"]


def test_a_head_that_answers_is_not_spoken_of(said):
    with socket.create_server(("127.0.0.1", 0)) as server:
        cluster.wait_for(f"127.0.0.1:{server.getsockname()[1]}", within=0.4, told_after=0.0)
    cluster.wait_for("a-name-of-its-own", within=0.4, told_after=0.0)
    assert said == []


def test_what_takes_long_is_told(said):
    with cluster._telling("quick", after=0.5):
        pass
    with cluster._telling("slow", after=0.01):
        time.sleep(0.7)
    assert said == ["slow"]


def test_workers_get_what_they_need_and_no_secrets():
    for name in ("PATH", "HOME", "https_proxy", "LC_ALL", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "HF_TOKEN"):
        assert cluster.needed(name), name
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "GITHUB_TOKEN",
        "OPENAI_API_KEY",
        "DATABASE_URL",
        "SSH_AUTH_SOCK",
        "MY_SECRET",
    ):
        assert not cluster.needed(name), name
        assert cluster.needed(name, also=[name])
    os.environ["A_SECRET"] = "x"
    try:
        with cluster.environment_of_workers():
            assert "A_SECRET" not in os.environ and os.environ["PATH"]
        assert os.environ["A_SECRET"] == "x"
    finally:
        del os.environ["A_SECRET"]


LOCAL = """
import json, os, stat, subprocess, sys
from pathlib import Path
import psutil
from raysae.config.sections import ClusterConfig
from raysae.on_ray.bench import RayBench
from raysae.placement import Placement

def environment():
    return dict(os.environ)

bench = RayBench(ClusterConfig(num_cpus=1, dashboard=False, pass_env=("PASSED",)))
(_, worker), = bench.at_once(environment, [()], Placement(1, 1.0, 0.0, 1))
heads = [p for p in psutil.Process().children(recursive=True) if p.name() in ("gcs_server", "raylet")]
c = bench.cluster
logs = [f for f in c.folder.rglob("*") if f.is_file()]
found = {
    "worker": worker, "heads": [p.environ()["RAY_AUTH_MODE"] for p in heads],
    "mode": stat.S_IMODE(c.folder.stat().st_mode), "logs": len(logs),
    "leaks": [str(f) for f in logs if b"SECRETXYZ" in f.read_bytes()],
    "token": stat.S_IMODE((Path.home() / ".ray/auth_token").stat().st_mode), "folder": str(c.folder),
    "driver": os.environ["AWS_SECRET_ACCESS_KEY"],
    "in_its_group": [p.name() for p in psutil.Process().children(recursive=True) if os.getpgid(p.pid) == os.getpgrp()],
}
bench.close()
found["left"] = c.folder.exists()
print(json.dumps(found))
"""


def test_a_cluster_that_starts_here_is_its_owners_alone(tmp_path):
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    root = str(Path(__file__).parents[2])
    env = {**kept, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PASSED": "yes"}
    env |= {"AWS_SECRET_ACCESS_KEY": "SECRETXYZ", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", LOCAL], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    warned, found = done.stdout.strip().splitlines()[0], json.loads(done.stdout.strip().splitlines()[-1])
    assert "RAY_AUTH_MODE=disabled is for clusters that are joined" in warned
    assert found["heads"] == ["token"] * 2 and found["token"] == 0o600
    assert found["worker"]["PASSED"] == "yes" and "AWS_SECRET_ACCESS_KEY" not in found["worker"]
    assert found["driver"] == "SECRETXYZ" and found["leaks"] == [] and found["logs"] > 5
    assert found["mode"] == 0o700 and not found["left"]
    assert found["in_its_group"] == [], "a signal to the driver's group is for the driver"
