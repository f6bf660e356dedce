"""What every job's entry point shares: how mistakes and verdicts become lines and exit statuses."""

from __future__ import annotations

import sys
from collections.abc import Callable

from raysae.errors import CaptureError, UserError
from raysae.gates.waivers import in_words
from raysae.run import Run

NO_GO = 3


def run_job(main: Callable[[list[str]], int | None]) -> None:
    """Call `main(argv)` and exit: 0 sound, 2 bad input or config (one line), 1 a fault, 3 a no-go where asked for."""
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except CaptureError as error:
        print(f"fault: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def verdict(run: Run) -> str:
    """The decision, and below it what was waived."""
    lines = [f"{run.decision['verdict'].upper()}: {run.decision['reason']}", in_words(run.decision)]
    return "\n".join(line for line in lines if line)


def summary(run: Run) -> str:
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
            verdict(run),
            f"report   {run.report}",
            f"curves   tensorboard --logdir {(run.path / 'tune').resolve()}",
        ]
    )
