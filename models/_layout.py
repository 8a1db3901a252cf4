"""Names and shapes of the arrays of a network in a file, as in torchvision and timm.

A name in a file is the path of a module and PyTorch's name of its array. Networks name
their modules as torchvision or timm does, so paths need no translation. Where these two
differ, `Network.other_names` and `Network.other_shapes` translate.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from models._layers import FrozenBatchNorm, UpConv
from models._network import Network

_Variable = nnx.Variable[jax.Array]


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """One array of a file.

    Attributes:
      variables: the variables of the model whose values the array holds.
      to_torch: a function from the values to the array as in PyTorch.
      from_torch: the inverse of `to_torch`.
    """

    variables: tuple[_Variable, ...]
    to_torch: Callable[..., jax.Array]
    from_torch: Callable[[jax.Array], tuple[jax.Array, ...]]

    @property
    def values(self) -> tuple[jax.Array, ...]:
        return tuple(variable.get_value() for variable in self.variables)

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = jax.eval_shape(self.to_torch, *self.values).shape
        return shape


def _unchanged(variable: _Variable) -> Slot:
    return Slot((variable,), lambda x: x, lambda x: (x,))


def _conv(kernel: _Variable) -> Slot:
    # (height, width, in, out) in Flax, (out, in, height, width) in PyTorch.
    return Slot(
        (kernel,),
        lambda k: k.transpose(3, 2, 0, 1),
        lambda w: (w.transpose(2, 3, 1, 0),),
    )


def _conv_transpose(kernel: _Variable) -> Slot:
    # PyTorch computes the gradient of a convolution, so its kernel is mirrored and has
    # the shape (in, out, height, width).
    return Slot(
        (kernel,),
        lambda k: k[::-1, ::-1].transpose(2, 3, 0, 1),
        lambda w: (w.transpose(2, 3, 0, 1)[::-1, ::-1],),
    )


def _linear(kernel: _Variable) -> Slot:
    return Slot((kernel,), lambda k: k.T, lambda w: (w.T,))


def _attention(module: nnx.MultiHeadAttention) -> dict[str, Slot]:
    """Returns the arrays of an attention layer, by PyTorch's names.

    PyTorch stacks query, key and value in one matrix, with the heads side by side.
    """
    parts = (module.query, module.key, module.value)
    heads, width, outputs = module.num_heads, module.in_features, module.out_features

    def fuse(*kernels: jax.Array) -> jax.Array:
        return jnp.concatenate([k.reshape(width, -1).T for k in kernels])

    def split(weight: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(w.T.reshape(width, heads, -1) for w in jnp.split(weight, 3))

    return {
        "qkv.weight": Slot(tuple(part.kernel for part in parts), fuse, split),
        "qkv.bias": Slot(
            tuple(_bias(part) for part in parts),
            lambda *biases: jnp.concatenate([b.reshape(-1) for b in biases]),
            lambda bias: tuple(b.reshape(heads, -1) for b in jnp.split(bias, 3)),
        ),
        "proj.weight": Slot(
            (module.out.kernel,),
            lambda k: k.reshape(-1, outputs).T,
            lambda w: (w.T.reshape(heads, -1, outputs),),
        ),
        "proj.bias": _unchanged(_bias(module.out)),
    }


def _bias(module: nnx.LinearGeneral) -> _Variable:
    if module.bias is None:
        raise ValueError("attention without biases has no layout in a weights file")
    return module.bias


_NORMS = (
    nnx.BatchNorm,
    FrozenBatchNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
    nnx.LayerNorm,
)
_NORM_NAMES = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _module_slots(module: nnx.Module) -> dict[str, Slot]:
    """Returns the arrays of a module, but not of its submodules.

    Keys are PyTorch's names.
    """
    if isinstance(module, nnx.MultiHeadAttention):
        return _attention(module)
    if isinstance(module, nnx.Conv | UpConv | nnx.Linear):
        slots = {"weight": _weight(module)}
        if module.bias is not None:
            slots["bias"] = _unchanged(module.bias)
        return slots
    variables = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, nnx.Param | nnx.BatchStat)
    }
    if isinstance(module, _NORMS):
        variables = {_NORM_NAMES[name]: value for name, value in variables.items()}
    return {name: _unchanged(variable) for name, variable in variables.items()}


def _weight(module: nnx.Conv | UpConv | nnx.Linear) -> Slot:
    if isinstance(module, nnx.Conv):
        return _conv(module.kernel)
    if isinstance(module, UpConv):
        return _conv_transpose(module.kernel)
    return _linear(module.kernel)


def slots_of(model: Network) -> dict[str, Slot]:
    """Returns all arrays of a model, by the names of the modules in the model."""
    return {
        ".".join(map(str, (*path, name))): slot
        for path, module in nnx.iter_modules(model)
        # The arrays of an attention layer include its linear maps.
        if not isinstance(module, nnx.LinearGeneral)
        for name, slot in _module_slots(module).items()
    }


def renamed(model: Network, naming: str | None, names: Iterable[str]) -> dict[str, str]:
    """Returns the names in a file by the model's own names, in the order given."""
    rename = model.other_names.get(naming) if naming else None
    return {name: rename(name) if rename else name for name in names}


def naming_of(model: Network, names: Iterable[str], found: set[str]) -> str | None:
    """Returns the naming under which a model shares most names with a file."""
    names = tuple(names)

    def num_shared(naming: str | None) -> int:
        return len(found & set(renamed(model, naming, names).values()))

    return max((None, *model.other_names), key=num_shared)


def layout(model: Network, naming: str | None) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the arrays in a file.

    The model may be abstract (`nnx.eval_shape`).
    """
    slots = slots_of(model)
    return {
        in_file: model.other_shapes.get(in_file, slots[name].shape)
        for name, in_file in renamed(model, naming, slots).items()
    }


def head_of(model: Network, naming: str | None = None) -> tuple[str, ...]:
    """Returns what names of arrays in the head begin with, in a model and in a file."""
    paths = tuple(f"{module}." for module in model.head_paths)
    names = [name for name in slots_of(model) if name.startswith(paths)]
    return (*paths, *renamed(model, naming, names).values())
