"""The cluster files by Ray's own validator, and what it does not look at: start commands and where results go."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "cluster.yaml", *sorted((ROOT / "configs" / "cluster").glob("*.yaml"))]
GPUS_OF_A_NODE = {"p4d.24xlarge": 8, "a2-highgpu-8g": 8}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def config(request):
    return yaml.safe_load(request.param.read_text())


def validate(config):
    validate_config(prepare_config(copy.deepcopy(config)))


def starts(config):
    """The commands that start Ray on a node."""
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def wrong_with(command):
    """What is wrong with a command that starts Ray, or None."""
    if not re.search(r"export [^;]*\bRAY_AUTH_MODE=(token|disabled)\b", command):
        return "authentication is left to Ray's default, which changes with its version"
    if not re.search(r"export [^;]*\bRAY_USAGE_STATS_ENABLED=0\b", command):
        return "usage statistics are on"
    if not re.search(r"export [^;]*\bRAYSAE_OUTPUT=(/|\$HOME/)", command):
        return "results are relative: they would lie in a job's temporary folder"
    if "--head" in command and "--dashboard-host=127.0.0.1" not in command:
        return "the dashboard, which runs any code, is not bound to loopback"
    return None


def test_all_four_are_there():
    assert [path.name for path in FILES] == ["cluster.yaml", "aws_8gpu.yaml", "gcp_8gpu.yaml", "onprem.yaml"]


def test_ray_accepts_it(config):
    validate(config)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda c: c.update(max_wokers=1),
        lambda c: c["provider"].pop("type"),
        lambda c: c.update(setup_commands="pip install raysae"),
        lambda c: c["auth"].update(user="ubuntu"),
    ],
    ids=["unknown key", "no provider type", "commands are text", "unknown auth key"],
)
def test_ray_refuses_a_broken_one(config, break_it):
    break_it(config)
    with pytest.raises(Exception):  # noqa: B017  # jsonschema's, or whatever Ray runs into
        validate(config)


def test_starts_are_explicit_and_safe(config):
    assert starts(config)
    assert [wrong_with(command) for command in starts(config)] == [None] * len(starts(config))


def test_a_start_that_is_not_is_found(config):
    command = starts(config)[0]
    for part in ("RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0", "--dashboard-host=127.0.0.1"):
        assert wrong_with(command.replace(part, ""))
    assert wrong_with(re.sub(r"RAYSAE_OUTPUT=\S+?;", "RAYSAE_OUTPUT=results;", command))


def test_every_node_gets_the_token_and_the_project(config):
    assert config["file_mounts"] == {"~/raysae": ".", "~/.ray/auth_token": "~/.ray/auth_token"}
    assert any("pip install" in command and "~/raysae" in command for command in config["setup_commands"])


def test_workers_join_where_there_are_any(config):
    workers = config["provider"].get("worker_ips") or config.get("max_workers", 0)
    assert bool(workers) == any("--address=$RAY_HEAD_IP" in c for c in config["worker_start_ray_commands"])


def test_cloud_nodes_have_eight_gpus(config):
    for node in config.get("available_node_types", {}).values():
        machine = node["node_config"].get("InstanceType") or node["node_config"]["machineType"]
        assert node["resources"]["GPU"] == GPUS_OF_A_NODE[machine]
