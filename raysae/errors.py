"""What a user can get wrong, as one line: the field, the value, and what would be right."""

from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake in the user's input or config. Jobs print it as one line and exit with status 2."""


class Damaged(UserError):
    """A file is not what was written. The line names it, says how it is seen, and how to mend it.

    mend: what to do; unset, it follows from where the file lies: a stage is deleted and made again, all else comes back by
    running the sweep again.
    """

    def __init__(self, file: Path, how: str, mend: str | None = None) -> None:
        self.file, self.how = file, how
        stage = next((p for p in file.parents if p.parent.name == "stages"), None)
        if mend is None:
            mend = f"delete {stage} and run again" if stage else "run the sweep again, or bring it back"
        super().__init__(f"{file}: {how}; {mend}")

    def __reduce__(self) -> tuple[Any, ...]:
        return UserError, (str(self),)


class Fault(RuntimeError):
    """What could not be done, and what to look at. Jobs print it as one line and exit with status 1."""


class CaptureError(Fault):
    """A block could not be captured; the message names it."""
