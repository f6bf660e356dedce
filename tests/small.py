"""The main job at a size that takes seconds: its config, and what two runs of it must agree in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from raysae.artifacts import fingerprint
from raysae.bench import LocalBench
from raysae.config.jobs import SweepJob
from raysae.files import read_json_if, read_sealed
from raysae.seal import SEAL, seal
from raysae.studies.sweep import SweepStudy
from raysae.workspace import Made, Stage, Workspace

GATE = Path(__file__).resolve().parents[1] / "configs" / "gates" / "default.yaml"


def small_values(model_path: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A grid of four SAEs on 600 generated problems, several shards, several rungs; sections in `changes` are merged."""
    values: dict[str, Any] = {
        "output": str(output),
        "data": {"source": "arithmetic", "examples": 400},
        "model": {"name": str(model_path)},
        "capture": {"sites": ["blocks.1.resid_post"], "rows_per_shard": 4000},
        "sweep": {
            "architectures": ["relu", "topk"],
            "expansion_factors": [2, 4],
            "search": "grid",
            "l1_coefficients": [0.05],
            "k": [4],
            "prune": {"enabled": False},
        },
        "training": {"tokens": 40_000, "batch_size": 512, "rungs": 4, "base_learning_rate": 5e-4},
        "evaluation": {"max_tokens": 1000, "bootstrap": 100},
        "gate": str(GATE),
        "cluster": {"dashboard": False, "num_cpus": 2},
    }
    for section, fields in changes.items():
        values[section] = {**values.get(section, {}), **fields} if isinstance(fields, dict) else fields
    return values


def small_job(model_path: Path, output: Path, **changes: Any) -> SweepJob:
    return SweepJob.model_validate(small_values(model_path, output, **changes))


def make(root: Path, kind: str, settings: dict[str, Any], build: Callable[[Path], Mapping[str, Any]]) -> Made:
    """The stage that `build` fills, below `root`, in a workspace of its own as another job's."""
    stage = Stage(kind, 1, settings, {}, lambda path, inputs, bench: build(path))
    return Workspace(root, LocalBench()).make(stage)


def study(job: SweepJob) -> SweepStudy:
    """The job as stages, which this process would make."""
    return SweepStudy(job, LocalBench())


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def sae_hashes(run: Path) -> dict[str, str]:
    """SHA-256 of each SAE's weights in a run: equal bits, equal hashes."""
    return {
        file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted((run / "saes").glob("*/sae_weights.safetensors"))
    }


def reseal(run: Path) -> None:
    """Seal a run's folder, altered or made by hand, as if it had been written so."""
    said = read_sealed(run / SEAL) if (run / SEAL).exists() else {"stages": [], "added": []}
    identity = fingerprint(read_json_if(run / "identity.json"))
    seal(run, said["stages"], identity, said["added"])


def stage_of(output: Path, name: str) -> Path:
    (found,) = (output / "stages").glob(f"{name}-*")
    return found


def timeless(value: Any) -> Any:
    """A decision without the time at which it was taken."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if not key.endswith("_at")}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value
