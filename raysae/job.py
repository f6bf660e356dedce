"""How a command ends: which mistake or signal becomes which line and exit status."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from errno import EACCES, EPERM, EROFS
from types import FrameType

from raysae.errors import Fault, UserError


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
