"""Print a run's decision and what was waived; exit 0 on a go and 3 on a no-go, so that a pipeline stops.

python jobs/gate.py results/<run>
"""

from raysae.errors import UserError
from raysae.job import NO_GO, run_job, verdict
from raysae.run import Run


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("usage: gate.py RUN, a run's directory such as results/<run>")
    run = Run.open(argv[0])
    for c in run.decision["criteria"]:
        why = f" ({c['reason']})" if c.get("reason") else ""
        print(f"{c['verdict']:6}  {c['metric']} {c['value']:.4g} {c['op']} {c['threshold']:g}  {c['criterion']}{why}")
    print(verdict(run))
    return 0 if run.go else NO_GO


if __name__ == "__main__":
    run_job(main)
