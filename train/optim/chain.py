"""The order of the techniques, the base optimizer and weight decay in a chain."""

from collections.abc import Sequence

from train.errors import UsageError, see
from train.optim.techniques import TECHNIQUES

PLACES = {
    "decay": "place of weight decay, if not the usual one",
    "optimizer": "place of the base optimizer, if not after all techniques",
}


def check_order(names: Sequence[str]) -> None:
    """Checks a list of techniques and places.

    Raises:
      UsageError: if a name occurs twice, if two techniques replace the gradient by a
        second one, or if one that does is not the first name.
    """
    if len(set(names)) < len(names):
        raise UsageError(f"a technique is named twice: {','.join(names)}")
    replacing = [name for name in names if _replaces_gradient(name)]
    if len(replacing) > 1:
        raise UsageError(
            f"{' and '.join(replacing)} both replace the gradient: take one of them"
            + see("training.md#optimizers-and-techniques")
        )
    if replacing and names[0] != replacing[0]:
        fixed = [*replacing, *(name for name in names if name not in replacing)]
        raise UsageError(
            f"{replacing[0]} replaces the gradient, so the names before it in "
            f"{','.join(names)} would do nothing: put it first, {','.join(fixed)}"
            + see("training.md#optimizers-and-techniques")
        )


def chain_order(
    techniques: Sequence[str], *, decoupled: bool, clip: bool
) -> tuple[str, ...]:
    """Returns the names of all transforms of a chain, in the order of the chain.

    The given names keep their order. Names that are missing are added as follows:

    * ``optimizer`` comes after all techniques.
    * ``decay`` as L2 regularization comes directly before the optimizer. If
      ``centralize`` or ``optax_centralize`` precedes the optimizer, the decay comes
      directly before it, so it is centralized too. The names before this place do not
      act on the decay. With Step-Tuned SGD, which minimizes the regularized loss,
      ``decay`` is not added: the decay is part of both gradients.
    * ``decay`` that is decoupled comes last, before the learning rate.
    * ``clip`` comes first, or directly after a technique that replaces the gradient.

    Args:
      techniques: names from `TECHNIQUES` and `PLACES`.
      decoupled: whether weight decay is decoupled from the optimizer, rather than L2.
      clip: whether the gradient is clipped.

    Raises:
      UsageError: if L2 decay is named after the optimizer, or decoupled decay before
        it.

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
                + see("training.md#optimizers-and-techniques")
            )
    elif decoupled:
        order.append("decay")
    elif not any(regularizes_both(name) for name in order):
        before = order[:place]
        place = min(
            (before.index(n) for n in _CENTRALIZE if n in before), default=place
        )
        order.insert(place, "decay")
    if clip:
        order.insert(1 if _replaces_gradient(order[0]) else 0, "clip")
    return tuple(order)


# L2 decay is part of the gradient that these act on.
_CENTRALIZE = ("centralize", "optax_centralize")


def _replaces_gradient(name: str) -> bool:
    return name in TECHNIQUES and TECHNIQUES[name].gradients_per_step == 2


def regularizes_both(name: str) -> bool:
    """Returns whether L2 decay is part of both gradients of a technique."""
    return name in TECHNIQUES and TECHNIQUES[name].regularizes_both
