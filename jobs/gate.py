"""Print a run's decision; exit 0 on a go and 3 on a no-go, so that a pipeline stops.

python jobs/gate.py results/<run>
"""

from raysae.errors import UserError
from raysae.job import NO_GO, run_job
from raysae.run import Run


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("usage: gate.py RUN, a run's directory such as results/<run>")
    run = Run.open(argv[0])
    for c in run.decision["criteria"]:
        print(f"{c['verdict']:4}  {c['metric']} {c['value']:.4g} {c['op']} {c['threshold']:g}  {c['criterion']}")
    print(f"{run.decision['verdict'].upper()}: {run.decision['reason']}")
    return 0 if run.go else NO_GO


if __name__ == "__main__":
    run_job(main)
