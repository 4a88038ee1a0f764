"""The error of a command that the user can mend."""


class CommandError(Exception):
    """Raised by a command to end with exit code 1 and this message, without a traceback."""
