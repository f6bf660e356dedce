"""A study in one file that touches no other: its stages, gate and page, the same on every bench."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from small import sae_hashes, stage_of, timeless

from raysae.bench import LocalBench
from raysae.config.sections import ClusterConfig
from raysae.errors import UserError
from raysae.gates.metrics import METRICS

FILE = Path(__file__).resolve().parents[1] / "docs" / "example_study.py"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FILE.parent))
    try:
        yield importlib.import_module("example_study")
    finally:
        METRICS.pop("mean_max_cosine", None)
        sys.path.remove(str(FILE.parent))


def test_the_example_study_on_both_benches(ray_cluster, example, tmp_path):
    job = example.DirectionsJob(output=tmp_path / "local")
    local = example.run(job, LocalBench())
    assert local.decision["verdict"] == "go" and local.decision["criteria"][0]["metric"] == "mean_max_cosine"
    assert local.decision["controls"]["random"]["metrics"]["mean_max_cosine"] < local.decision["criteria"][0]["value"]
    page = local.report.read_text()
    assert "Are the directions found?" in page and "mean largest cosine 0.9" in page and "Cost" in page
    assert [s["stage"] for s in local.ledger["stages"]] == ["store", "sweep", "measurement", "evaluation"]
    assert example.run(job, LocalBench()).path == local.path  # made once

    cluster = ClusterConfig(dashboard=False, num_cpus=2)
    on_ray = example.run(example.DirectionsJob(output=tmp_path / "ray", cluster=cluster))
    assert on_ray.path.name == local.path.name, "where work runs is no part of what a run is"
    both = [stage_of(tmp_path / name, "sweep") for name in ("local", "ray")]
    assert sae_hashes(both[0]) == sae_hashes(both[1]) and len(sae_hashes(both[0])) == 2
    pd.testing.assert_frame_equal(
        *(run.table.drop(columns="train_seconds") for run in (local, on_ray)), check_exact=True
    )
    assert timeless(local.decision) == timeless(on_ray.decision)
    assert (local.path / "directions.json").read_bytes() == (on_ray.path / "directions.json").read_bytes()


def test_its_gate_stops_what_is_no_better_than_chance(example, tmp_path):
    gate = tmp_path / "gate.yaml"
    gate.write_text(FILE.with_name("example_gate.yaml").read_text().replace("0.9", "0.0"))
    training = example.TrainingConfig(tokens=512, batch_size=512, base_learning_rate=1e-9)
    run = example.run(example.DirectionsJob(output=tmp_path, gate=gate, training=training), LocalBench())
    assert run.decision["verdict"] == "no-go" and "random" in run.decision["reason"]


def test_an_unknown_metric_is_one_line(example, tmp_path):
    gate = tmp_path / "gate.yaml"
    gate.write_text(FILE.with_name("example_gate.yaml").read_text().replace("mean_max_cosine", "mean_max_cosin"))
    with pytest.raises(UserError, match="did you mean 'mean_max_cosine'"):
        example.run(example.DirectionsJob(output=tmp_path, gate=gate), LocalBench())
