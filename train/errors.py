"""Errors that the command lines show as one line, without a trace."""


class UsageError(ValueError):
    """Something that the user can mend; the message says how."""
