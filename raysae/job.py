"""What every job's entry point shares: how mistakes and verdicts become lines and exit statuses."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from errno import EACCES, EPERM, EROFS
from types import FrameType

from raysae.errors import Fault, UserError
from raysae.gates.waivers import in_words
from raysae.run import Run

NO_GO = 3


def run_job(main: Callable[[list[str]], int | None]) -> None:
    """Call `main(argv)` and exit: 0 sound, 2 bad input or config (one line), 1 a fault, 3 a no-go where asked for,
    130 or 143 interrupted by SIGINT or SIGTERM, with everything stopped that was started; a second signal exits at once.
    """
    caught: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1:
            os._exit(_interrupted(caught))
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except KeyboardInterrupt:
        sys.exit(_interrupted(caught))
    except Exception as error:
        if caught:  # a library made another error of it
            sys.exit(_interrupted(caught))
        error = _of_the_disk(error) or error
        if not isinstance(error, (UserError, Fault)):
            raise
        mistake = isinstance(error, UserError)
        print(f"{'error' if mistake else 'fault'}: {error}", file=sys.stderr)
        sys.exit(2 if mistake else 1)


def _of_the_disk(error: Exception) -> UserError | Fault | None:
    """In words, where the cause is a full disk (from a worker it comes as text) or a file that is not ours to use."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = getattr(cause, "cause", None) or cause.__cause__ or cause.__context__
    said = " ".join(map(str, chain))
    file = next((e.filename for e in chain if isinstance(e, OSError) and e.filename), None)
    named = re.search(r"(?:No space left on device|Disk quota exceeded)[^']{0,40}'([^']+)'", said)
    at = file or (named and named[1]) or "the output root or the temporary folder"
    if "No space left on device" in said or "Disk quota exceeded" in said:
        return Fault(f"disk full at {at}; with room made, the same command goes on from here")
    denied = next((e for e in chain if isinstance(e, OSError) and e.errno in (EACCES, EPERM, EROFS)), None)
    if denied is not None and denied.filename:
        said = f"{denied.filename}: {denied.strerror}; make it yours to use, or name another (--output, for results)"
        return UserError(said)
    return None


def _interrupted(caught: list[int]) -> int:
    """Say so, and the exit status: 128 and the signal's number."""
    print("interrupted; the same command goes on from here", file=sys.stderr, flush=True)
    return 128 + (caught[0] if caught else signal.SIGINT)


def verdict(run: Run) -> str:
    """The decision, and below it what was traded at each site and what was waived."""
    lines: list[str | None] = [f"{run.decision['verdict'].upper()}: {run.decision['reason']}"]
    for site, choice in (run.decision.get("choices") or {}).items():
        if choice["chosen"]:
            score, second = choice["score"], choice["runner_up"]
            on_test = f"; on test {score['test']['in_words']}" if score["test"] else ""
            lines.append(f"{site}: {choice['chosen']}, {choice['candidates'][0]['in_words']}{on_test}")
            lines.append(f"  runner-up {second['sae_id']}: {second['why']}" if second else None)
    lines.append(in_words(run.decision))
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
