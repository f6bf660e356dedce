"""A study in one file: do SAEs find the directions that made their vectors? `python docs/example_study.py`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raysae.bench import Bench
from raysae.config.load import load_config
from raysae.config.sections import EvaluationConfig, GatedJob, PositiveInt, SweepConfig, TrainingConfig, UserPath
from raysae.files import read_json, read_table, write_json
from raysae.gates.decision import settle
from raysae.gates.metrics import Metric, register
from raysae.job import run_job
from raysae.report import Part
from raysae.report.sweep import config, cost, gate
from raysae.run import Run
from raysae.sae import formats
from raysae.stages.evidence import Measuring, measured, metrics_of
from raysae.stages.saes import Sweep, saes
from raysae.stages.store import vectors
from raysae.studies.study import Study, bench_of

register(Metric("mean_max_cosine", "higher", groups=""))


class DirectionsJob(GatedJob):
    """Whether SAEs find the directions of a sparse code: the mean over these of the largest cosine with a decoder row."""

    directions: PositiveInt = 24
    """How many there are, in 16 dimensions."""
    sweep: SweepConfig = SweepConfig(architectures=("topk",), expansion_factors=(1, 2), search="grid", k=(3,))
    training: TrainingConfig = TrainingConfig(tokens=100_000, batch_size=512, base_learning_rate=1e-3)
    evaluation: EvaluationConfig = EvaluationConfig(bootstrap=100)
    gate: UserPath = Path(__file__).with_name("example_gate.yaml")


def code(directions: int, seed: int, rows: int = 20_000) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """Unit directions [directions, 16], vectors [rows, 16] of three of these each, and the rows' columns."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(directions, 16))
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    x = (rng.random((rows, directions)).argsort(1) < 3) * rng.random((rows, directions)) @ W
    split = np.repeat(["train", "validation", "test"], [rows - 4000, 2000, 2000])
    return W, {"code": x.astype(np.float32)}, {"example_id": np.arange(rows), "group": np.arange(rows), "split": split}


def found(W: np.ndarray, rows: np.ndarray) -> float:
    """The mean over directions [n, d] of the largest cosine with one of `rows` [m, d]."""
    return float((W @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T).max(1).mean())


def run(job: DirectionsJob, bench: Bench | None = None) -> Run:
    with bench_of(job, bench) as bench:
        study, how = Study(job, bench), Measuring(job.evaluation, 1, job.seed)
        given = {"directions": job.directions, "seed": job.seed}
        captured = vectors(given, lambda: code(job.directions, job.seed)[1:], seed=job.seed)
        trained = saes(Sweep(job.sweep, job.training, job.seed), captured)
        swept = study.workspace.make(trained)
        metrics = metrics_of(study.workspace.make(measured(how, "test", captured, trained).evaluation))
        W, rng = code(job.directions, job.seed)[0], np.random.default_rng(job.seed)
        for sae_id in metrics:
            rows = formats.load(swept.path / "saes" / sae_id).parameters["W_dec"].numpy()
            metrics[sae_id] |= {"mean_max_cosine": found(W, rows), "random": found(W, rng.normal(size=rows.shape))}
        best = max(metrics, key=lambda i: metrics[i]["mean_max_cosine"])
        null = {"random": {"kind": "random", "mean_max_cosine": metrics[best]["random"]}}

        def fill(folder: Path) -> None:
            found = {i: [m["mean_max_cosine"], m["random"]] for i, m in metrics.items()}
            write_json(folder / "directions.json", found)
            write_json(
                folder / "decision.json", {**settle(study.gate, str(job.gate), metrics[best], null), "chosen": best}
            )
            read_table(swept.path / "table.parquet").to_parquet(folder / "table.parquet")

        return study.write(fill, [PART, gate.PART, cost.PART, config.PART])


TEMPLATE = """<h1>Are the directions found?</h1>{% for i, (cosine, random) in found.items() %}
<p>{{ i }}: mean largest cosine {{ "%.3f"|format(cosine) }}, of as many random directions {{ "%.3f"|format(random) }}</p>
{% endfor %}"""
PART = Part("directions", "Directions", TEMPLATE, lambda folder: {"found": read_json(folder / "directions.json")})

if __name__ == "__main__":
    run_job(lambda argv: print(run(load_config(DirectionsJob, argv)).path))
