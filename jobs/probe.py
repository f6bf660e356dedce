"""Probe an SAE of a run for what its latents say of the steps of a problem, beside the baselines that it must beat.

python jobs/probe.py results/<run> --labels step_type,operation --rows 4000

The sweep does the same for its chosen SAE where its config names `probes.labels`.
"""

from pathlib import Path

from raysae import run_folder
from raysae.config import ProbeJob, load_config
from raysae.data.records import read_records
from raysae.evaluate import probes
from raysae.job import run_job
from raysae.looks import look
from raysae.run import Run


def main(argv: list[str]) -> None:
    config = load_config(ProbeJob, argv)
    run = Run.open(config.run)
    subject, sae_id = run.subject(config.sae), config.sae or str(run.best)
    other = Run.open(config.untrained).subject() if config.untrained else run.untrained_model(sae_id)
    settings = probes.Settings(**config.model_dump(exclude={"run", "labels", "sae", "untrained"}))
    records = run.stage("records", verify=True)
    if config.split == "test":
        looked = look(
            run.path.resolve().parent, records.name, "probes", run.path.resolve().name, config.model_dump(mode="json")
        )
        print(f"look {looked['number']} at the test rows")
    problems = read_records(records / "records.parquet")
    table, facts = probes.probe(subject, problems, config.labels, settings, other)

    def write(folder: Path) -> None:
        probes.write(folder / "probes", table, facts, settings, sae_id=sae_id, site=subject.site)

    run_folder.add(run.path, write, ["probes"])
    print(probes.summary(table, facts))
    print(f"\n{sae_id}: {run.path / 'probes' / 'probes.parquet'}, probes.json beside it")


if __name__ == "__main__":
    run_job(main)
