"""The error that command lines show as one line, without a traceback."""


class UsageError(ValueError):
    """Something that the user can fix; the message says how."""
