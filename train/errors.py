"""Errors that the command lines show as one line, without a trace."""


class UsageError(Exception):
    """Something that the user can mend; the message says how."""
