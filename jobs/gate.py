"""Print a run's decision and what was waived; exit 0 on a go and 3 on anything else, so that a pipeline stops.

python jobs/gate.py results/<run>
"""

import math
from typing import Any

from raysae.errors import UserError
from raysae.job import NO_GO, run_job, verdict
from raysae.run import Run


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("usage: gate.py RUN, a run's directory such as results/<run>")
    run = Run.open(argv[0])
    several = run.decision.get("choices") or {}
    for site, choice in several.items() if len(several) > 1 else [("", run.decision)]:
        if site:
            print(f"{site}: {choice['chosen'] or choice['closest'] or 'no SAE'}")
        show(choice["criteria"])
    print(verdict(run))
    return 0 if run.go else NO_GO


def show(criteria: list[dict[str, Any]]) -> None:
    """A line per criterion, with the split that its value is from."""
    for c in criteria:
        why = f" ({c['reason']})" if c.get("reason") else ""
        value = math.nan if c["value"] is None else c["value"]
        bound = f"{c['metric']} {value:.4g} {c['op']} {c['threshold']:g}"
        print(f"{c['verdict']:6}  {bound}  {c['criterion']}, {c.get('split', 'validation')}{why}")


if __name__ == "__main__":
    run_job(main)
