"""The names that `--tricks` takes, and the order in which they make a chain."""

from collections.abc import Sequence
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

from train.errors import UsageError

TRICKS = {
    "random": "Random Gradient: one random factor per step on the whole gradient",
    "centralize": "Gradient Centralization: minus its mean for each output unit",
    "barzilai_borwein": "Step-Tuned SGD: a step size from two gradients of a batch",
    "perturbed_unit": "PUGD: a unit step from the gradient at perturbed weights too",
    "sam": "SAM, to compare with: the gradient at weights moved up the slope",
}
PLACES = {
    "decay": "where weight decay enters, if not in its usual place",
    "optimizer": "where the base optimizer stands, if not behind all tricks",
}
TWO_GRADIENTS = ("barzilai_borwein", "perturbed_unit", "sam")


def check_tricks(names: Sequence[str]) -> None:
    """Refuses lists that name something unknown or make no sense."""
    for name in names:
        if name not in TRICKS | PLACES:
            known = "; ".join(f"{k} ({v})" for k, v in (TRICKS | PLACES).items())
            raise UsageError(f"unknown trick {name!r}; known: {known}")
    if len(set(names)) < len(names):
        raise UsageError(f"a trick is named twice: {','.join(names)}")
    pairs = [name for name in names if name in TWO_GRADIENTS]
    if len(pairs) > 1:
        raise UsageError(f"{' and '.join(pairs)} both replace the gradient: take one")
    if pairs and names[0] != pairs[0]:
        mended = [pairs[0], *(name for name in names if name != pairs[0])]
        raise UsageError(
            f"{pairs[0]} replaces the gradient, and with it what the names before it "
            f"in {','.join(names)} make of it: put it first, {','.join(mended)}"
        )


def chain_order(
    tricks: Sequence[str], *, decoupled: bool, clip: bool
) -> tuple[str, ...]:
    """The members of a chain by name, in the order in which the gradient meets them.

    The order given is kept, and what it leaves open is filled in:

    * ``optimizer`` stands behind all tricks.
    * ``decay`` as L2 regularisation enters in front of the first ``centralize`` before
      the optimizer, which projects it too, else directly before the optimizer. So
      Random Gradient and PUGD in front of it leave it alone. Step-Tuned SGD minimises
      the regularised loss: with ``barzilai_borwein`` the decay is no member, but part
      of both gradients, unless it is named.
    * ``decay`` that is decoupled stands at the end, before the rate.
    * ``clip`` acts on the gradient: first, or behind the trick that replaces it.

    Args:
      tricks: names from `TRICKS` and `PLACES`.
      decoupled: whether decay is decoupled from the optimizer, not L2.
      clip: whether the gradient is clipped.

    Raises:
      UsageError: if decay is named on the side of the optimizer where it would be decay
        of the other kind.

    Examples:
      >>> from train.tricks import chain_order
      >>> chain_order(["random", "centralize"], decoupled=False, clip=True)
      ('clip', 'random', 'decay', 'centralize', 'optimizer')
      >>> chain_order(["sam", "optimizer", "centralize"], decoupled=True, clip=False)
      ('sam', 'optimizer', 'centralize', 'decay')
    """
    order = list(tricks)
    if "optimizer" not in order:
        order.append("optimizer")
    place = order.index("optimizer")
    if "decay" in order:
        if decoupled != (order.index("decay") > place):
            side = "behind" if decoupled else "in front of"
            raise UsageError(
                f"decay is on the wrong side of the optimizer in {','.join(order)}: "
                f"name it {side} `optimizer`, or take an optimizer with "
                f"{'L2' if decoupled else 'decoupled'} decay"
            )
    elif decoupled:
        order.append("decay")
    elif "barzilai_borwein" not in order:
        before = order[:place]
        place = before.index("centralize") if "centralize" in before else place
        order.insert(place, "decay")
    if clip:
        order.insert(1 if order[0] in TWO_GRADIENTS else 0, "clip")
    return tuple(order)


def _parse(arguments: list[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in arguments[0].split(",") if name.strip())
    check_tricks(names)
    return names


Tricks = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME,NAME,...",
        instance_from_str=_parse,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(value)],
    ),
]
