"""Probe an SAE of a run for what its latents say of the steps of a problem, beside the baselines that it must beat.

python jobs/probe.py results/<run> --labels step_type,operation --rows 4000
"""

from raysae.activations.store import Store
from raysae.config import ProbeJob, load_config
from raysae.data.records import read_records
from raysae.evaluate import probes
from raysae.job import run_job
from raysae.run import Run


def main(argv: list[str]) -> None:
    config = load_config(ProbeJob, argv)
    run = Run.open(config.run)
    subject = subject_of(run, config.sae)
    other = subject_of(Run.open(config.untrained), None) if config.untrained else None
    settings = probes.Settings(**config.model_dump(exclude={"run", "labels", "sae", "untrained"}))
    problems = read_records(run.stage("records") / "records.parquet")
    table, facts = probes.probe(subject, problems, config.labels, settings, other)
    probes.write(run.path / "probes", table, facts, settings, sae_id=config.sae or run.best, site=subject.site)
    print(probes.summary(table, facts))
    print(f"\n{config.sae or run.best}: {run.path / 'probes' / 'probes.parquet'}, probes.json beside it")


def subject_of(run: Run, sae_id: str | None) -> probes.Subject:
    sae_id = sae_id or run.best
    sae = run.sae(sae_id)
    return probes.Subject(Store(run.stage("store")), run.site(sae_id), sae)


if __name__ == "__main__":
    run_job(main)
