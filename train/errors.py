"""Errors that command lines show as one line, without a traceback."""


def see(page: str) -> str:
    """Returns the end of a message that a page of docs/ explains.

    >>> see("data.md#bad-files")
    '; see docs/data.md#bad-files'
    """
    return f"; see docs/{page}"


class UsageError(ValueError):
    """Something that the user can fix; the message says how."""


class NonFiniteLossError(ArithmeticError):
    """The loss or the parameters are no longer finite.

    Attributes:
      step: the first step whose loss or parameters were not finite.
    """

    def __init__(self, seed: int, step: int, epoch: int):
        super().__init__(
            f"the loss of seed {seed} is not finite at step {step} (epoch {epoch}): "
            "lower the learning rate, or clip the gradient"
        )
        self.step = step
