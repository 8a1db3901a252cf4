"""The order in which techniques and the base optimizer make a chain."""

from collections.abc import Sequence

from train.errors import UsageError
from train.optim.techniques import TECHNIQUES

PLACES = {
    "decay": "place of weight decay, if not the usual one",
    "optimizer": "place of the base optimizer, if not after all techniques",
}


def check_order(names: Sequence[str]) -> None:
    """Checks a list of techniques and places.

    Raises:
      UsageError: if a name occurs twice, or if the second gradient of a technique would
        replace what those before it made of the first.
    """
    if len(set(names)) < len(names):
        raise UsageError(f"a technique is named twice: {','.join(names)}")
    replacing = [name for name in names if _replaces_gradient(name)]
    if len(replacing) > 1:
        raise UsageError(
            f"{' and '.join(replacing)} both replace the gradient: take one of them"
        )
    if replacing and names[0] != replacing[0]:
        fixed = [*replacing, *(name for name in names if name not in replacing)]
        raise UsageError(
            f"{replacing[0]} replaces the gradient, so the names before it in "
            f"{','.join(names)} would do nothing: put it first, {','.join(fixed)}"
        )


def chain_order(
    techniques: Sequence[str], *, decoupled: bool, clip: bool
) -> tuple[str, ...]:
    """Returns the names of a chain in the order in which the gradient passes them.

    The given order is kept. What it leaves open is filled in as follows:

    * ``optimizer`` comes after all techniques.
    * ``decay`` as L2 regularization comes before the first ``centralize`` that precedes
      the optimizer, which then centralizes it too, or else directly before the
      optimizer. PUGD does not act on it, nor does Random Gradient before
      ``centralize``. Step-Tuned SGD minimizes the regularized loss: with it the decay
      is part of both gradients instead, unless it is named.
    * ``decay`` that is decoupled comes last, before the learning rate.
    * ``clip`` acts on the gradient: it comes first, or after the technique that
      replaces the gradient.

    Args:
      techniques: names from `TECHNIQUES` and `PLACES`.
      decoupled: whether weight decay is decoupled from the optimizer, rather than L2.
      clip: whether the gradient is clipped.

    Raises:
      UsageError: if decay is named on the side of the optimizer where it would be
        decay of the other kind.

    Examples:
      >>> from train.optim.chain import chain_order
      >>> chain_order(["scale_by_random", "centralize"], decoupled=False, clip=True)
      ('clip', 'scale_by_random', 'decay', 'centralize', 'optimizer')
      >>> chain_order(["sam", "optimizer", "centralize"], decoupled=True, clip=False)
      ('sam', 'optimizer', 'centralize', 'decay')
    """
    order = list(techniques)
    if "optimizer" not in order:
        order.append("optimizer")
    place = order.index("optimizer")
    if "decay" in order:
        if decoupled != (order.index("decay") > place):
            side = "after" if decoupled else "before"
            raise UsageError(
                f"decay is on the wrong side of the optimizer in {','.join(order)}: "
                f"name it {side} `optimizer`, or take an optimizer with "
                f"{'L2' if decoupled else 'decoupled'} decay"
            )
    elif decoupled:
        order.append("decay")
    elif not any(regularizes_both(name) for name in order):
        before = order[:place]
        place = before.index("centralize") if "centralize" in before else place
        order.insert(place, "decay")
    if clip:
        order.insert(1 if _replaces_gradient(order[0]) else 0, "clip")
    return tuple(order)


def _replaces_gradient(name: str) -> bool:
    return name in TECHNIQUES and TECHNIQUES[name].gradients_per_step == 2


def regularizes_both(name: str) -> bool:
    """Whether a technique takes L2 decay as part of both of its gradients."""
    return name in TECHNIQUES and TECHNIQUES[name].regularizes_both
