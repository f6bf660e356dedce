"""Progress of long stages: a bar in a terminal, a plain line now and then under a job or in a log file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_EVERY_S = 10.0


def say(message: str) -> None:
    """One line to the user, at once, without tearing a bar apart."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """Counts `total` units of `what`; `advance(n, note)` moves it. Use as a context manager."""

    def __init__(self, what: str, total: int, unit: str = "it", line_every_s: float = LINE_EVERY_S) -> None:
        self.what, self.total, self.unit, self.line_every_s = what, total, unit, line_every_s
        self.done, self.start = 0, time.monotonic()
        self.last_line = self.start
        self.bar = tqdm(total=total, desc=what, unit=unit, unit_scale=total >= 10_000) if sys.stderr.isatty() else None

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
            if note:
                self.bar.set_postfix_str(note, refresh=False)
        elif time.monotonic() - self.last_line >= self.line_every_s and self.done < self.total:
            self._line(note)

    def _line(self, note: str = "") -> None:
        self.last_line = time.monotonic()
        seconds = max(self.last_line - self.start, 1e-9)
        rate = self.done / seconds
        left = f", {max(self.total - self.done, 0) / rate:.0f} s left" if 0 < self.done < self.total else ""
        say(
            f"{self.what}: {self.done:,}/{self.total:,} {self.unit} in {seconds:.0f} s{left}{' · ' + note if note else ''}"
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        else:
            self._line()
