"""Pages of the documentation that messages name."""

_PAGES = "https://github.com/optax-tricks/optax_tricks/blob/main/docs/"


def see(page: str) -> str:
    """Returns the end of a message that a page of docs/ explains.

    >>> see("faq.md")
    ' See https://github.com/optax-tricks/optax_tricks/blob/main/docs/faq.md'
    """
    return f" See {_PAGES}{page}"
