"""The commands: `raysae sweep|gate|probe|replicate|bundle ...`, and `jobs/*.py`, which call the same functions.

Each takes its arguments, prints where its results are and returns its exit status. They import what they run when they are
called: help and mistakes take no seconds, and a command runs without the extras that it does not need.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from raysae import __version__
from raysae.config.jobs import BundleJob, GateJob, ProbeJob, ReplicateJob, SweepJob
from raysae.config.load import load_config
from raysae.config.sections import Section
from raysae.errors import UserError
from raysae.job import run_job

if TYPE_CHECKING:
    from raysae.run import Run

NO_GO = 3
EXTRAS = {"ray": ("ray", "optuna", "tensorboard"), "report": ("matplotlib", "jinja2"), "wandb": ("wandb",)}
"""Packages of each extra of the installation."""


def sweep(argv: list[str]) -> int:
    """The main job; with `--plan`, only what it would cost."""
    config = load_config(SweepJob, argv)
    _need("ray", "report", *(["wandb"] if config.tracking.wandb_project else []))
    if config.plan:
        from raysae.studies.plan import plan

        print(plan(config))
        return 0
    from raysae.studies.sweep import run_sweep

    run = run_sweep(config)
    print(_summary(run))
    return NO_GO if config.require_go and not run.go else 0


def gate(argv: list[str]) -> int:
    """A run's decision as an exit status, so that a pipeline stops."""
    from raysae.run import Run

    run = Run.open(load_config(GateJob, argv).run)
    several = run.decision.get("choices") or {}
    for site, choice in several.items() if len(several) > 1 else [("", run.decision)]:
        if site:
            print(f"{site}: {choice['chosen'] or choice['closest'] or 'no SAE'}")
        for c in choice["criteria"]:
            why = f" ({c['reason']})" if c.get("reason") else ""
            value = math.nan if c["value"] is None else c["value"]
            bound = f"{c['metric']} {value:.4g} {c['op']} {c['threshold']:g}"
            print(f"{c['verdict']:6}  {bound}  {c['criterion']}, {c.get('split', 'validation')}{why}")
    print(_verdict(run))
    return 0 if run.go else NO_GO


def probe(argv: list[str]) -> None:
    """Probes of a run that is there; the sweep makes them itself where its config names `probes.labels`."""
    config = load_config(ProbeJob, argv)
    _need("report")
    from raysae import run_folder
    from raysae.data.records import read_records
    from raysae.evaluate import probes
    from raysae.evaluate.linear import Settings
    from raysae.looks import look
    from raysae.run import Run

    run = Run.open(config.run)
    subject, sae_id = run.subject(config.sae), config.sae or str(run.best)
    other = Run.open(config.untrained).subject() if config.untrained else run.untrained_model(sae_id)
    settings = Settings(**config.model_dump(exclude={"run", "labels", "sae", "untrained"}))
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


def replicate(argv: list[str]) -> int:
    """A run made again and compared; NO_GO where it does not replicate."""
    config = load_config(ReplicateJob, argv)
    _need("ray", "report")
    from raysae.run import Run
    from raysae.studies.replicate import in_words, replicate

    comparison = replicate(Run.open(config.run, verify=True), config.output, config.exact)
    print(in_words(comparison))
    return 0 if comparison["replicates"] else NO_GO


def bundle(argv: list[str]) -> None:
    """The archive of a run."""
    config = load_config(BundleJob, argv)
    from raysae.bundle import bundle
    from raysae.run import Run

    print(bundle(Run.open(config.run), config.to, config.weights))


COMMANDS: dict[str, tuple[Callable[[list[str]], int | None], type[Section]]] = {
    "sweep": (sweep, SweepJob),
    "gate": (gate, GateJob),
    "probe": (probe, ProbeJob),
    "replicate": (replicate, ReplicateJob),
    "bundle": (bundle, BundleJob),
}
"""Each command with the config that describes it."""


def main() -> None:
    """The console script: `raysae COMMAND ...`."""
    run_job(_command)


def _command(argv: list[str]) -> int | None:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {name:10} {str(job.__doc__).removeprefix('raysae: ')}" for name, (_, job) in COMMANDS.items()]
        print("\n".join(["usage: raysae COMMAND ...", "", *lines, "", "raysae COMMAND --help has a line per field."]))
        return 0
    if name == "--version":
        print(f"raysae {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown command {name}; {meant}raysae has {', '.join(COMMANDS)}")
    sys.argv[0] = f"raysae {name}"  # the name that its help and usage say
    return COMMANDS[name][0](rest)


def _need(*extras: str) -> None:
    """UserError, before anything runs, where packages of these extras are not installed."""
    absent = {extra: [p for p in EXTRAS[extra] if find_spec(p) is None] for extra in extras}
    absent = {extra: packages for extra, packages in absent.items() if packages}
    if absent:
        packages = [package for names in absent.values() for package in names]
        them = "it" if len(packages) == 1 else "them"
        raise UserError(
            f"{', '.join(packages)}: not installed, and this command needs {them}; "
            f"pip install 'raysae[{','.join(absent)}]'"
        )


def _verdict(run: Run) -> str:
    """The decision, and below it what was traded at each site and what was waived."""
    from raysae.gates.waivers import in_words

    lines: list[str | None] = [f"{run.decision['verdict'].upper()}: {run.decision['reason']}"]
    for site, choice in (run.decision.get("choices") or {}).items():
        if choice["chosen"]:
            score, second = choice["score"], choice["runner_up"]
            on_test = f"; on test {score['test']['in_words']}" if score["test"] else ""
            lines.append(f"{site}: {choice['chosen']}, {choice['candidates'][0]['in_words']}{on_test}")
            lines.append(f"  runner-up {second['sae_id']}: {second['why']}" if second else None)
    lines.append(in_words(run.decision))
    return "\n".join(line for line in lines if line)


def _summary(run: Run) -> str:
    """The run in a few lines: the front of the table, the decision, where to look."""
    table = run.table
    shown = [
        "sae_id", "status", "d_sae", "l0", "fvu", "fvu_low", "fvu_high", "ce_loss_recovered", "ce_delta", "kl",
        "dead_fraction", "pareto", "passes_gate",
    ]  # fmt: skip
    columns = [c for c in shown if c in table]
    rows = table.sort_values(["status", "l0"])[columns].to_string(
        index=False, float_format=lambda v: f"{v:.4g}", na_rep="–"
    )
    return "\n".join(
        [
            rows,
            "",
            _verdict(run),
            f"report   {run.report}",
            f"curves   tensorboard --logdir {(run.path / 'tune').resolve()}",
        ]
    )
