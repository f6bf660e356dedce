"""What a user can get wrong, as one line: the field, the value, and what would be right."""


class UserError(ValueError):
    """A mistake in the user's input or config. Jobs print it as one line and exit with status 2."""


class Fault(RuntimeError):
    """What could not be done, and what to look at. Jobs print it as one line and exit with status 1."""


class CaptureError(Fault):
    """A block could not be captured; the message names it."""
