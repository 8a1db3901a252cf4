"""Why a file of weights does not fit a network, in one line with the remedy."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from flax import nnx

from models._catalogue import create, describe, names
from models._entry import Entry
from models._layout import head_of, layout, naming_of, renamed, slots_of
from models._network import Network

# Arrays of other dtypes are quantized, and their scales are missing.
_DTYPES = ("F64", "F32", "F16", "BF16")
_STATISTICS = ("running_mean", "running_var")
_MAX_SHOWN = 6
# Networks whose number of parameters is next to that of a file are compared with it.
_MAX_COMPARED = 4


class Stored(NamedTuple):
    """Shape of an array in a file, and its dtype as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str


def shorten(parts: Iterable[str], separator: str = ", ") -> str:
    """Joins the first few parts, and says how many more there are."""
    parts = list(parts)
    more = len(parts) - _MAX_SHOWN
    shown = separator.join(parts[:_MAX_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown


def prefix_of(model: Network, stored: Iterable[str]) -> str:
    """Returns the prefix that all names in a file share and those of the model lack."""
    stored = tuple(stored)
    prefixes = [""]
    while True:
        rests = [name.removeprefix(prefixes[-1]).partition(".") for name in stored]
        if len({first for first, _, _ in rests}) != 1 or not all(
            r for _, _, r in rests
        ):
            break
        prefixes.append(f"{prefixes[-1]}{rests[0][0]}.")
    return max(prefixes, key=lambda prefix: _num_named(model, _below(stored, prefix)))


def misfit(
    model: Network, stored: Mapping[str, Stored], *, new_head: bool
) -> str | None:
    """Says why a file does not fit a model and what to do, or returns None if it does.

    Args:
      model: the network.
      stored: the arrays in the file, without a shared prefix in their names.
      new_head: whether the head of the model is left as it is.
    """
    naming = naming_of(model, slots_of(model), set(stored))
    expected = layout(model, naming)
    problems = dict(_problems(expected, stored))
    in_head = {name for name in problems if name.startswith(head_of(model, naming))}
    rest = {name: text for name, text in problems.items() if name not in in_head}
    if new_head:
        problems = rest
    if not problems:
        return None
    if not rest:
        return (
            f"only the last layer differs ({shorten(problems.values(), '; ')}); skip "
            "it with new_head=True"
        )
    explanation = (
        _prefix_in_part(model, stored)
        or _in_channels(model, expected, stored, rest)
        or _image_size(model, expected, stored, rest)
        or _other_network(model, expected, stored)
    )
    if explanation:
        return explanation
    listed = shorten((f"\n  {text}" for text in problems.values()), "")
    if in_head and not new_head:
        listed += "\nif the last layer is for other classes, skip it with new_head=True"
    listed += "\nsee docs/networks.md#pretrained-weights"
    return f"{len(problems)} of {len(expected)} arrays differ{listed}"


def _problems(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored]
) -> Iterable[tuple[str, str]]:
    for name, shape in expected.items():
        if name not in stored:
            yield name, f"missing: {name}"
        elif stored[name].shape != shape:
            got = stored[name].shape
            yield name, f"{name} has shape {got}, but {shape} in the model"
        elif stored[name].dtype not in _DTYPES:
            dtype = stored[name].dtype
            yield name, f"{name} has dtype {dtype}, which is not a floating-point type"
    for name in sorted(stored.keys() - expected.keys()):
        yield name, f"unexpected: {name}"


def _below(stored: Iterable[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in stored if name.startswith(prefix)}


def _num_named(model: Network, stored: set[str]) -> int:
    """Returns how many arrays of a model a file has, by their names."""
    own = slots_of(model)
    names_in_file = renamed(model, naming_of(model, own, stored), own).values()
    return len(stored & set(names_in_file))


def _prefix_in_part(model: Network, stored: Mapping[str, Stored]) -> str | None:
    """Recognizes a file that holds the network beside other things."""
    parts = [name.split(".") for name in stored]
    prefixes = {".".join(part[:i]) + "." for part in parts for i in (1, 2)}
    counts = {prefix: _num_named(model, _below(stored, prefix)) for prefix in prefixes}
    best = max(sorted(counts), key=counts.__getitem__, default="")
    here = len(slots_of(model))
    if counts.get(best, 0) < max(0.9 * here, _num_named(model, set(stored)) + 1):
        return None
    others = sorted(name for name in stored if not name.startswith(best))
    return (
        f"its names begin with '{best}', beside others that are not of this network "
        f"({shorten(others)}); save the arrays below '{best}' alone"
    )


def _in_channels(
    model: Network,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
    problems: Mapping[str, str],
) -> str | None:
    """Recognizes weights of this network for images of other channels."""
    (name, problem), *others = problems.items()
    if others or name not in expected or name not in stored:
        return None
    found = stored[name].shape
    if len(expected[name]) < 2 or len(found) < 2:
        return None
    out, own, *kernel = expected[name]
    if own != getattr(model, "in_channels", None) or found != (out, found[1], *kernel):
        return None
    return (
        f"{problem}; it is for images of {found[1]} channels: create the network with "
        f"in_channels={found[1]}"
    )


def _image_size(
    model: Network,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
    problems: Mapping[str, str],
) -> str | None:
    """Recognizes weights of this network for images of another size."""
    size = getattr(model, "image_size", None)
    of_shape = [name for name in problems if name in expected and name in stored]
    if (
        size is None
        or len(of_shape) < len(problems)
        or len(problems) > len(expected) / 5
    ):
        return None
    return (
        f"{shorten(problems.values(), '; ')}; if it is for images of another size, "
        f"create the network with that image_size, as this one is for {size}x{size}"
    )


def _other_network(
    model: Network,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
) -> str | None:
    """Recognizes the weights of another network of the catalogue."""
    found = max(
        ((_fit(candidate, stored), entry) for entry, candidate in _candidates(stored)),
        key=lambda pair: pair[0],
        default=None,
    )
    if found is None or found[0] < 0.9 or found[0] <= _fit(model, stored):
        return None
    entry = found[1]
    remedy = f'load it into models.create("{entry.name}", ...)'
    if model.backbone is not None and not misfit(model.backbone, stored, new_head=True):
        remedy = "load it into model.backbone with new_head=True"
    return (
        f"it looks like {entry.name} ({entry.description}), and this network has "
        f"{len(expected)} arrays where the file has {len(stored)}; {remedy}"
    )


def _candidates(stored: Mapping[str, Stored]) -> Iterable[tuple[Entry, Network]]:
    """Yields abstract networks with about as many parameters as a file."""
    shapes = [x.shape for name, x in stored.items() if not name.endswith(_STATISTICS)]
    num_parameters = sum(map(math.prod, shapes))
    if not num_parameters:
        return
    entries = sorted(
        map(describe, names()),
        key=lambda entry: abs(math.log(num_parameters / entry.num_parameters)),
    )
    for entry in entries[:_MAX_COMPARED]:
        yield entry, _abstract(entry)


def _abstract(entry: Entry) -> Any:
    options = dict(entry.published)
    return nnx.eval_shape(lambda: create(entry.name, rngs=nnx.Rngs(0), **options))


def _fit(model: Network, stored: Mapping[str, Stored]) -> float:
    """Returns the share of arrays that a file and a model have in common."""
    naming = naming_of(model, slots_of(model), set(stored))
    expected, head = layout(model, naming), head_of(model, naming)
    shared = [
        name
        for name in expected.keys() & stored.keys()
        if name.startswith(head) or stored[name].shape == expected[name]
    ]
    return len(shared) / len(expected.keys() | stored.keys())
