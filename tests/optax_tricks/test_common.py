"""What every transformation must do, whatever its mathematics, from one table of all.

A row has a factory, its arguments and the extra arguments that its update needs.
"""

import inspect
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_tricks as tricks

LR = 0.1


def loss(params: Any) -> jax.Array:
    """Curvature 0.5 + cos w: of either sign, and near 1 where the tests start."""
    terms = [jnp.sum(0.25 * (w - 1) ** 2 - jnp.cos(w)) for w in jax.tree.leaves(params)]
    return sum(terms, start=jnp.zeros(()))


def grad_fn(params: Any, step: int) -> Any:
    """The gradient of `loss`, by hand since it runs hundreds of times."""
    del step
    return jax.tree.map(lambda w: 0.5 * (w - 1) + jnp.sin(w), params)


def first_axis(grads: Any) -> Any:
    return jax.tree.map(lambda g: (0,) if jnp.ndim(g) > 1 else (), grads)


class Row(NamedTuple):
    """One way to call a public factory."""

    id: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    kwargs: Mapping[str, Any] = MappingProxyType({})
    extra: Mapping[str, Any] = MappingProxyType({})

    def build(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        return self.factory(**{**self.kwargs, **changes})

    def optimizer(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """A chain that descends."""
        tx = self.build(**changes)
        return tx if self.factory in OPTIMIZERS else optax.chain(tx, optax.sgd(LR))


OPTIMIZERS = (tricks.pugd, tricks.step_tuned_sgd)
TWO = {"grad_fn": grad_fn}
COSINE = optax.cosine_decay_schedule(LR, 50)
ROWS = [
    Row("random", tricks.scale_by_random, {"key": 3}),
    Row(
        "random-key", tricks.scale_by_random, {"key": jax.random.key(3), "minval": 0.5}
    ),
    Row("random-half", tricks.scale_by_random, {"key": 3, "probability": 0.5}),
    Row("centralize", tricks.centralize),
    Row("centralize-conv", tricks.centralize, {"conv_only": True}),
    Row("centralize-tuple", tricks.centralize, {"reduction_axes": (0,)}),
    Row("centralize-callable", tricks.centralize, {"reduction_axes": first_axis}),
    Row("bb", tricks.barzilai_borwein_step, {"learning_rate": LR}, TWO),
    Row("bb-schedule", tricks.barzilai_borwein_step, {"learning_rate": COSINE}, TWO),
    Row("unit", tricks.perturbed_unit_step, {}, TWO),
    Row("step-tuned", tricks.step_tuned_sgd, {"learning_rate": LR}, TWO),
    Row("pugd", tricks.pugd, {"learning_rate": LR, "weight_decay": 0.02}, TWO),
    Row("pugd-schedule", tricks.pugd, {"learning_rate": COSINE, "momentum": 0}, TWO),
]
SINGLE = [row for row in ROWS if not row.extra]
DOUBLE = [row for row in ROWS if row.extra]
MEMBERS = [row for row in ROWS if row.id in ("random", "centralize", "bb", "unit")]


def parametrize(rows: list[Row] = ROWS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[row.id for row in rows])


every_row = parametrize()


def make_params(seed: int = 0, dtype: Any = np.float32) -> Any:
    """Leaves over which the rules of every member differ; sizes divide 8 devices."""
    rng = np.random.default_rng(seed)
    tree = {
        "conv": {"kernel": rng.normal(size=(2, 2, 2, 8)), "bias": rng.normal(size=8)},
        "list": [rng.normal(size=(16, 3))],
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def make_mixed() -> Any:
    dtypes = iter([jnp.bfloat16, jnp.float32, jnp.float16])
    return jax.tree.map(lambda x: x.astype(next(dtypes)), make_params())


PARAMS = make_params()
GRADS = grad_fn(PARAMS, 0)


def make_step(
    tx: Any, extra: Mapping[str, Any]
) -> Callable[[Any, Any], tuple[Any, Any]]:
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grad_fn(params, 0), state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def run(tx: Any, extra: Mapping[str, Any], params: Any = PARAMS, steps: int = 3) -> Any:
    """Params and state after a few steps, op by op: compiling is what takes time."""
    step, carry = make_step(tx, extra), (params, tx.init(params))
    for _ in range(steps):
        carry = step(*carry)
    return carry


def is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def plain(tree: Any) -> Any:
    """Typed keys as numbers, which can be compared."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def assert_close(a: Any, b: Any, rtol: float = 2e-5, atol: float = 1e-6) -> None:
    chex.assert_trees_all_close(plain(a), plain(b), rtol=rtol, atol=atol)


def assert_equal(a: Any, b: Any) -> None:
    chex.assert_trees_all_equal(plain(a), plain(b))


def buffers(tree: Any) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(plain(tree))]


def types(tree: Any) -> Any:
    """Shape, dtype, weak type and, on an explicit mesh, sharding of every leaf."""
    return jax.tree.map(jax.typeof, tree)


def test_the_table_has_every_transformation() -> None:
    public = {getattr(tricks, name) for name in tricks.__all__}
    # States are what transformations return, and a schedule is a plain function.
    other = {x for x in public if isinstance(x, type)} | {tricks.triangular_schedule}
    assert {row.factory for row in ROWS} == public - other


# --- Calls ----------------------------------------------------------------------------


@every_row
def test_unknown_extra_arguments_are_dropped(row: Row) -> None:
    tx = row.build()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(PARAMS)
    expected = tx.update(GRADS, state, PARAMS, **row.extra)
    got = tx.update(GRADS, state, PARAMS, **row.extra, value=1.0, unknown=object())
    assert_equal(got, expected)


@every_row
def test_chain_hands_each_member_the_extra_argument_it_needs(row: Row) -> None:
    tx = optax.chain(row.build(), optax.contrib.reduce_on_plateau())
    state = tx.init(PARAMS)
    _, state = tx.update(GRADS, state, PARAMS, **row.extra, value=jnp.float32(1.5))
    assert optax.tree.get(state, "best_value") == 1.5


@parametrize(DOUBLE)
def test_grad_fn_is_called_once_per_update_with_step_zero(row: Row) -> None:
    calls = []

    def counted(params: Any, step: int) -> Any:
        calls.append((step, types(params)))
        return grad_fn(params, step)

    tx = row.build()
    state = tx.init(PARAMS)
    for k in range(1, 4):
        _, state = tx.update(GRADS, state, PARAMS, grad_fn=counted)
        assert calls == [(0, types(PARAMS))] * k


# --- JAX's transformations ------------------------------------------------------------


@every_row
def test_jit_equals_eager_and_compiles_once(row: Row) -> None:
    tx = row.optimizer()
    step = make_step(tx, row.extra)
    chex.clear_trace_counter()  # it knows functions by their source alone
    jitted = jax.jit(chex.assert_max_traces(step, n=1))
    eager = compiled = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        eager, compiled = step(*eager), jitted(*compiled)
        assert_close(compiled, eager)
    for _ in range(97):
        compiled = jitted(*compiled)
    chex.assert_tree_all_finite(plain(compiled))


@every_row
def test_scan_equals_a_loop(row: Row) -> None:
    tx = row.optimizer()
    step, start = make_step(tx, row.extra), (PARAMS, tx.init(PARAMS))
    got, _ = jax.lax.scan(lambda carry, _: (step(*carry), None), start, length=3)
    assert types(got) == types(start)
    assert_close(got, run(tx, row.extra))


@every_row
def test_vmap_over_seeds(row: Row) -> None:
    def train(seed: jax.Array, params: Any) -> Any:
        # The documented way: one transformation per seed, built inside.
        changes = {"key": jax.random.key(seed)} if "key" in row.kwargs else {}
        return run(row.optimizer(**changes), row.extra, params)

    each = [(jnp.int32(seed), make_params(seed)) for seed in range(2)]
    expected = [plain(train(*x)) for x in each]
    got = jax.vmap(train)(*jax.tree.map(lambda *x: jnp.stack(x), *each))
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *expected))


def test_seeds_under_vmap_draw_different_factors() -> None:
    def factor(key: jax.Array) -> jax.Array:
        tx = tricks.scale_by_random(key)
        return tx.update(GRADS, tx.init(PARAMS))[1].random_factor

    factors = jax.vmap(factor)(jax.random.split(jax.random.key(0), 8))
    assert len(set(factors.tolist())) == 8


# Two values of every number; what is left out is no number and cannot be traced.
BB_SWEEP = {
    "learning_rate": [0.05, 0.2],
    "beta": [0.0, 0.8],
    "nu": [1.0, 1.5],
    "min_scale": [0.1, 0.9],
    "max_scale": [1.1, 3.0],
}
SWEEPS = {
    "random-half": {"minval": [-0.5, 1], "maxval": [0.5, 2], "probability": [0.3, 0.9]},
    "bb": BB_SWEEP,
    "unit": {"eps": [0.0, 0.5]},
    "step-tuned": {**BB_SWEEP, "delta": [0.0, 0.5]},
    "pugd": {
        "learning_rate": [0.05, 0.2],
        "momentum": [0.0, 0.8],
        "weight_decay": [0.0, 0.1],
    },
}
NOT_NUMBERS = {"key", "reduction_axes", "conv_only"}


@parametrize([row for row in ROWS if row.id in SWEEPS])
def test_vmap_over_all_hyperparameters(row: Row) -> None:
    sweep = SWEEPS[row.id]
    assert set(sweep) == set(inspect.signature(row.factory).parameters) - NOT_NUMBERS

    def train(values: Any) -> Any:
        return run(row.optimizer(**values), row.extra, steps=2)

    each = [{name: values[i] for name, values in sweep.items()} for i in range(2)]
    expected = [plain(train(values)) for values in each]
    got = jax.vmap(train)({name: jnp.array(values) for name, values in sweep.items()})
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *expected))


# --- Dtypes ---------------------------------------------------------------------------


STATES = tuple(x for x in vars(tricks).values() if isinstance(x, type))


def assert_as_documented(state: Any) -> None:
    """The fields of our states are those of their docstrings, in the dtypes there."""
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, STATES)):
        if isinstance(node, STATES):
            lines = r"^  (\w+): (\w+)"
            kinds = re.findall(lines, inspect.getdoc(type(node)), re.MULTILINE)
            assert [name for name, _ in kinds] == list(node._fields)
            for name, kind in kinds:
                for leaf in jax.tree.leaves(getattr(node, name)):
                    if kind == "typed":
                        assert is_key(leaf)
                    elif kind == "the":  # a tree like the parameters
                        assert jnp.finfo(leaf.dtype).bits >= 32
                    else:
                        assert (leaf.dtype, leaf.shape) == (kind, ())


def assert_types_are_kept(row: Row, params: Any, grads: Any) -> None:
    tx = row.build()
    update = partial(tx.update, **row.extra)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(update, grads, state, params)
    # A ShapeDtypeStruct compares shape, dtype, weak type and sharding.
    assert updates == jax.eval_shape(lambda: grads)
    assert after == state
    assert_as_documented(after)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@every_row
def test_dtypes_are_kept(row: Row, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        params = make_params(0, dtype)
        assert_types_are_kept(row, params, grad_fn(params, 0))


@every_row
def test_mixed_dtypes_are_kept_and_come_close_to_single_precision(row: Row) -> None:
    params = make_mixed()
    grads = grad_fn(params, 0)
    assert_types_are_kept(row, params, grads)
    got, _ = row.build().update(grads, row.build().init(params), params, **row.extra)
    same = jax.tree.map(lambda x: x.astype(jnp.float32), (grads, params))
    exact, _ = row.build().update(
        same[0], row.build().init(same[1]), same[1], **row.extra
    )
    got = jax.tree.map(lambda x: x.astype(jnp.float32), got)
    assert_close(got, exact, rtol=4 * 2**-8, atol=2**-9)


@parametrize([row for row in ROWS if row.factory is not tricks.pugd])
def test_updates_keep_the_dtype_of_the_gradient_not_of_the_parameters(row: Row) -> None:
    # pugd is left out: optax.add_decayed_weights promotes to the wider of the two.
    assert_types_are_kept(row, PARAMS, jax.tree.map(jnp.bfloat16, GRADS))


@parametrize([row for row in ROWS if COSINE not in row.kwargs.values()])
def test_strict_promotion(row: Row) -> None:
    # The schedule is left out: optax's own divide an int by a float.
    params = make_mixed()
    with jax.numpy_dtype_promotion("strict"):
        assert_types_are_kept(row, params, grad_fn(params, 0))


# pugd is left out: the members of optax behind it widen, as they do in optax.sgd.
@parametrize([row for row in ROWS if row.id in SWEEPS and row.id != "pugd"])
def test_hyperparameters_given_as_arrays_do_not_widen(row: Row) -> None:
    changes = {name: jnp.float32(values[0]) for name, values in SWEEPS[row.id].items()}
    params = make_params(0, jnp.bfloat16)
    row = row._replace(kwargs={**row.kwargs, **changes})
    assert_types_are_kept(row, params, grad_fn(params, 0))


def test_gradient_differences_are_averaged_in_single_precision() -> None:
    # With a tenth of each difference added, bfloat16 would lose most of it.
    state = tricks.barzilai_borwein_step(0.1).init(make_params(0, jnp.bfloat16))
    leaves = jax.tree.leaves(state.bb_difference)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


# --- States ---------------------------------------------------------------------------


@every_row
def test_old_and_new_state_can_be_branches_of_cond(row: Row) -> None:
    _, old = run(row.optimizer(), row.extra, steps=1)
    _, new = run(row.optimizer(), row.extra, steps=2)
    assert types(old) == types(new)
    got = jax.jit(lambda keep: jax.lax.cond(keep, lambda: old, lambda: new))(False)
    assert_equal(got, new)


@every_row
def test_abstract_init(row: Row) -> None:
    tx = row.build()
    state = tx.init(PARAMS)
    abstract = jax.eval_shape(lambda: PARAMS)
    assert types(tx.init(abstract)) == types(state)
    assert jax.eval_shape(tx.init, abstract) == jax.eval_shape(lambda: state)


# How many trees like the parameters a state holds.
COPIES = {tricks.barzilai_borwein_step: 1, tricks.step_tuned_sgd: 1, tricks.pugd: 1}


@every_row
def test_map_params(row: Row) -> None:
    tx = row.build()
    specs = jax.tree.map(lambda w: f"spec of {w.shape}", PARAMS)
    mapped = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        tx.init(PARAMS),
        specs,
        transform_non_params=lambda _: None,
    )
    assert jax.tree.leaves(mapped) == COPIES.get(row.factory, 0) * jax.tree.leaves(
        specs
    )


@every_row
def test_donation(row: Row) -> None:
    key = jax.random.key(7)
    own_key = {"key": key} if "key" in row.kwargs else {}
    tx = row.optimizer(**own_key)
    expected = run(tx, row.extra)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    # Buffers shared with the parameters or the caller's key would be lost to them.
    owned = [buffers(tree) for tree in (params, key, state)]
    assert len(set().union(*owned)) == sum(map(len, owned))
    step = make_step(tx, row.extra)
    # Unused arguments would not be donated at all.
    donating = jax.jit(step, donate_argnums=(0, 1), keep_unused=True)
    carry = params, state
    for _ in range(3):
        carry = donating(*carry)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))
    assert_close(carry, expected)
    assert_equal(key, jax.random.key(7))


AXIS_TYPES = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}


@pytest.mark.parametrize("axis_type", AXIS_TYPES.values(), ids=AXIS_TYPES)
@every_row
def test_sharding(row: Row, axis_type: AxisType) -> None:
    tx, traces = row.optimizer(), 0
    expected = run(tx, row.extra)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    # The axis that is averaged over, too.
    specs = {
        "conv": {"kernel": P(None, None, None, "d"), "bias": P("d")},
        "list": [P("d", None)],
    }

    def step(params: Any, state: Any) -> Any:
        nonlocal traces
        traces += 1
        return make_step(tx, row.extra)(params, state)

    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        params = jax.tree.map(put, PARAMS, specs)
        start = carry = params, tx.init(params)
        jitted = jax.jit(step)
        for _ in range(3):
            # Many steps in flight can hang the simulated devices.
            carry = jax.block_until_ready(jitted(*carry))
    assert traces == 1
    assert types(carry) == types(start)
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(carry), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
    assert_close(jax.device_get(plain(carry)), plain(expected))


# --- Optax's wrappers -----------------------------------------------------------------


@every_row
def test_inject_hyperparams(row: Row) -> None:
    # Any other function would be taken for a schedule.
    static = [k for k, v in row.kwargs.items() if v is first_axis]
    plain_tx = row.build()
    injected = optax.inject_hyperparams(row.factory, static_args=static)(**row.kwargs)
    state, own = injected.init(PARAMS), plain_tx.init(PARAMS)
    # Under jit the numbers are traced, which the checks of their range must bear.
    update = jax.jit(lambda g, s, p: injected.update(g, s, p, **row.extra))
    for seed in range(2):
        params = make_params(seed)
        got, state = update(grad_fn(params, 0), state, params)
        expected, own = plain_tx.update(grad_fn(params, 0), own, params, **row.extra)
        assert_close(got, expected)
    if jax.tree.structure(state.inner_state) == jax.tree.structure(own):
        assert_close(state.inner_state, own)  # optax's learning rate has two states


@parametrize([row for row in ROWS if row.id in ("random", "bb", "unit", "step-tuned")])
def test_injected_schedules_reach_the_member(row: Row) -> None:
    name = {
        "random": "minval",
        "bb": "learning_rate",
        "unit": "eps",
        "step-tuned": "nu",
    }[row.id]
    values = [0.1, 0.7]
    wave = lambda count: jnp.array(values)[count]  # noqa: E731
    injected = optax.inject_hyperparams(row.factory)(**{**row.kwargs, name: wave})
    state = injected.init(PARAMS)
    own = row.build().init(PARAMS)
    for value in values:
        got, state = injected.update(GRADS, state, PARAMS, **row.extra)
        assert state.hyperparams[name] == np.float32(value)
        tx = row.build(**{name: value})
        expected, own = tx.update(GRADS, own, PARAMS, **row.extra)
        assert_close((got, state.inner_state), (expected, own))


MASK = {"conv": {"kernel": True, "bias": False}, "list": [True]}
LABELS = jax.tree.map(lambda x: "on" if x else "off", MASK)


@parametrize(SINGLE)
def test_masked_and_partition(row: Row) -> None:
    tx = row.build()
    full, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    masked = optax.masked(tx, MASK)
    got, _ = masked.update(GRADS, masked.init(PARAMS), PARAMS)
    assert_equal(got, jax.tree.map(lambda on, u, g: u if on else g, MASK, full, GRADS))
    parts = optax.partition({"on": tx, "off": optax.set_to_zero()}, LABELS)
    got, _ = parts.update(GRADS, parts.init(PARAMS), PARAMS)
    assert_equal(got, jax.tree.map(lambda on, u, z: u if on else z, MASK, full, zeros))


@pytest.mark.parametrize("mask", [True, lambda p: jax.tree.map(lambda _: True, p)])
@every_row
def test_a_mask_that_is_true_everywhere(row: Row, mask: Any) -> None:
    tx, masked = row.build(), optax.masked(row.build(), mask)
    got, _ = masked.update(GRADS, masked.init(PARAMS), PARAMS, **row.extra)
    expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, **row.extra)
    assert_equal(got, expected)


@parametrize(DOUBLE)
def test_two_gradients_refuse_masks_and_name_a_remedy_that_works(row: Row) -> None:
    parts = {"on": row.build(), "off": optax.set_to_zero()}
    for wrapped in (optax.masked(row.build(), MASK), optax.partition(parts, LABELS)):
        with pytest.raises(ValueError, match=r"optax\.MaskedNode leaves") as error:
            wrapped.init(PARAMS)
    # A state made elsewhere does not help.
    state = row.build().init(PARAMS)
    masked = optax.masked(row.build(), MASK)
    with pytest.raises(ValueError, match=re.escape(str(error.value))):
        masked.update(GRADS, optax.MaskedState(state), PARAMS, **row.extra)

    remedy = re.search(
        r"optax\.chain\((\w+)\(\.\.\.\), optax\.partition", str(error.value)
    )
    assert remedy
    member = next(r for r in MEMBERS if r.factory.__name__ == remedy[1])
    parts = {"on": optax.sgd(LR), "off": optax.set_to_zero()}
    tx = optax.chain(member.build(), optax.partition(parts, LABELS))
    alone = member.optimizer()
    got, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, **row.extra)
    expected, _ = alone.update(GRADS, alone.init(PARAMS), PARAMS, **row.extra)
    assert_close(got, jax.tree.map(lambda on, u: u if on else 0 * u, MASK, expected))


@parametrize(SINGLE)
def test_multi_steps_gives_the_mean_gradient_of_its_mini_steps(row: Row) -> None:
    tx, multi = row.build(), optax.MultiSteps(row.build(), 2)
    update = jax.jit(multi.update)
    grads = [grad_fn(make_params(seed), 0) for seed in range(2)]
    start = state = multi.init(PARAMS)
    idle, state = update(grads[0], state, PARAMS)
    assert_equal(idle, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_equal(state.inner_opt_state, start.inner_opt_state)
    got, state = update(grads[1], state, PARAMS)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    expected, inner = tx.update(mean, tx.init(PARAMS), PARAMS)
    assert_close((got, state.inner_opt_state), (expected, inner))


# Data in four micro-batches, for a gradient that is the mean over them.
MICRO = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 16)), jnp.float32)


def data_loss(params: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean(jnp.tanh(batch @ params["list"][0])) + loss(params)


@jax.jit
def full_batch(params: Any, step: int) -> Any:
    del step
    return jax.grad(data_loss)(params, MICRO.reshape(-1, 16))


@jax.jit
def accumulated(params: Any, step: int) -> Any:
    """The documented way: accumulate inside grad_fn."""
    del step

    def add(total: Any, batch: jax.Array) -> Any:
        grads = jax.grad(data_loss)(params, batch)
        return jax.tree.map(lambda t, g: t + g / len(MICRO), total, grads), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), MICRO)[0]


@parametrize(DOUBLE)
def test_multi_steps_evaluates_grad_fn_on_every_mini_step(row: Row) -> None:
    calls = []

    def counted(params: Any, step: int) -> Any:
        jax.debug.callback(lambda: calls.append(None))
        return grad_fn(params, step)

    multi = optax.MultiSteps(row.build(), 2)
    state = multi.init(PARAMS)
    update = jax.jit(lambda g, s, p: multi.update(g, s, p, grad_fn=counted))
    for _ in range(4):
        updates, state = update(GRADS, state, PARAMS)
    jax.effects_barrier()
    assert (len(calls), state.gradient_step) == (4, 2)
    chex.assert_tree_all_finite(updates)


@parametrize(DOUBLE)
def test_accumulating_inside_grad_fn_equals_the_full_batch(row: Row) -> None:
    tx, results = row.build(), []
    for gradient in (accumulated, full_batch):
        extra = {"grad_fn": gradient}
        state = tx.init(PARAMS)
        for _ in range(2):
            updates, state = tx.update(gradient(PARAMS, 0), state, PARAMS, **extra)
        results.append((updates, state))
    assert_close(*results)


@every_row
def test_apply_if_finite_skips_a_bad_step(row: Row) -> None:
    tx = optax.apply_if_finite(row.optimizer(), 5)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, **row.extra))
    bad = jax.tree.map(lambda g: g.at[..., :1].set(jnp.nan) if g.ndim else g, GRADS)
    _, before = update(GRADS, tx.init(PARAMS), PARAMS)
    skipped, after = update(bad, before, PARAMS)
    assert_equal(skipped, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_equal(after.inner_state, before.inner_state)
    assert_equal(update(GRADS, after, PARAMS)[0], update(GRADS, before, PARAMS)[0])
    chex.assert_tree_all_finite(update(GRADS, after, PARAMS)[0])


# --- Chains ---------------------------------------------------------------------------


def descend(tx: Any, extra: Mapping[str, Any], steps: int) -> Any:
    """Params and state after a chain brought the loss down."""
    params, state = run(tx, extra, steps=steps)
    chex.assert_tree_all_finite((params, plain(state)))
    assert loss(params) < loss(PARAMS) - 0.1
    return params, state


def assert_readable(state: Any, row: Row) -> None:
    """Every field has a name of its own, also with others in the chain."""
    nodes = jax.tree.leaves(
        row.build().init(PARAMS), is_leaf=lambda x: isinstance(x, STATES)
    )
    for node in nodes:
        if isinstance(node, STATES):
            for field, value in node._asdict().items():
                found = optax.tree.get(state, field)
                assert types(found) == types(value)


OTHERS = {
    "clipping": optax.clip_by_global_norm(1.0),
    "decay": optax.add_decayed_weights(0.01),
    "momentum": optax.trace(0.9),
    "adam": optax.scale_by_adam(),
    "schedule": optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, 50)),
}


@pytest.mark.parametrize("place", ["front", "back"])
@parametrize(MEMBERS)
def test_chains_with_members_of_optax(row: Row, place: str) -> None:
    for name, other in OTHERS.items():
        pair = [row.build(), other] if place == "front" else [other, row.build()]
        tx = optax.chain(*pair, optax.scale_by_learning_rate(LR))
        _, state = descend(tx, row.extra, steps=5)
        assert_readable(state, row), name
    every = [row.build(), *OTHERS.values()]
    if place == "back":
        every = every[1:] + every[:1]
    tx = optax.chain(*every, optax.scale_by_learning_rate(LR))
    _, state = descend(tx, row.extra, steps=5)
    assert_readable(state, row)


@pytest.mark.parametrize(
    "pair",
    list(itertools.permutations(MEMBERS, 2)),
    ids=lambda pair: "-".join(row.id for row in pair),
)
def test_members_in_one_chain(pair: tuple[Row, Row]) -> None:
    tx = optax.chain(*(row.build() for row in pair), optax.sgd(LR))
    _, state = descend(tx, TWO, steps=5)
    for row in pair:
        assert_readable(state, row)


@pytest.mark.parametrize("order", [MEMBERS, MEMBERS[::-1]], ids=["forth", "back"])
def test_all_members_in_one_chain(order: list[Row]) -> None:
    tx = optax.chain(*(row.build() for row in order), optax.sgd(LR))
    _, state = descend(tx, TWO, steps=5)
    for row in order:
        assert_readable(state, row)


# --- Flax's optimizer -----------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jnp.tanh(self.hidden(x)))


def net_loss(net: Net) -> jax.Array:
    return jnp.mean((net(jnp.ones((2, 3))) - 1) ** 2)


GRAPHDEF = nnx.graphdef(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))


@jax.jit
def net_grad(params: Any, step: int) -> Any:
    del step
    return jax.grad(lambda p: net_loss(nnx.merge(GRAPHDEF, p)))(params)


@every_row
def test_nnx_optimizer(row: Row) -> None:
    net, tx = Net(nnx.Rngs(0)), row.optimizer()
    before = net_loss(net)
    extra = dict.fromkeys(row.extra, net_grad)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    state = tx.init(params)
    for _ in range(2):
        optimizer.update(net, nnx.grad(net_loss)(net), **extra)
        updates, state = tx.update(net_grad(params, 0), state, params, **extra)
        params = optax.apply_updates(params, updates)
    assert_close(nnx.to_pure_dict(nnx.state(net, nnx.Param)), params)
    assert net_loss(net) < before


# --- Trees ----------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Any
    y: Any


A, B, C = PARAMS["list"][0], PARAMS["conv"]["bias"], jnp.float32(0.7)
EMPTY = jnp.zeros((0, 3))
TREES = {
    "nested": {"a": {"b": {"c": A}, "d": B}, "e": C},
    "list": [A, [B, [C]]],
    "tuple": (A, (B, C)),
    "namedtuple": Pair(A, Pair(B, C)),
    "ordered": OrderedDict(z=A, y=B, x=C),
    "none": {"a": None, "b": A, "c": [None, B], "d": (C, None)},
    "no-entries": {"a": A, "b": B, "c": C, "d": EMPTY, "e": EMPTY.T},
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@every_row
def test_trees(row: Row, tree: Any) -> None:
    tx, flat = row.build(), [A, B, C]
    expected, _ = tx.update(grad_fn(flat, 0), tx.init(flat), flat, **row.extra)
    got, after = tx.update(grad_fn(tree, 0), tx.init(tree), tree, **row.extra)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    assert types(after) == types(tx.init(tree))
    got = [x for x in jax.tree.leaves(got) if x.size]
    assert_close(sorted(got, key=np.size), sorted(expected, key=np.size))


@every_row
def test_a_bare_array(row: Row) -> None:
    tx = row.build()
    got, _ = tx.update(grad_fn(A, 0), tx.init(A), A, **row.extra)
    listed, _ = tx.update(grad_fn([A], 0), tx.init([A]), [A], **row.extra)
    assert_close([got], listed)


@pytest.mark.parametrize("tree", [{}, (), [], {"a": None}, {"a": [{}, ()]}])
@every_row
def test_empty_trees(row: Row, tree: Any) -> None:
    tx = row.build()
    state = tx.init(tree)
    updates, after = tx.update(tree, state, tree, **row.extra)
    assert updates == tree
    assert types(after) == types(state)
    chex.assert_tree_all_finite(plain(after))


@every_row
def test_numpy_leaves(row: Row) -> None:
    """As a checkpoint may restore them."""
    tx = row.build()
    expected = tx.update(GRADS, tx.init(PARAMS), PARAMS, **row.extra)
    grads, params = jax.device_get((GRADS, PARAMS))
    assert_close(tx.update(grads, tx.init(params), params, **row.extra), expected)


@parametrize(SINGLE)
def test_masked_nodes_stay(row: Row) -> None:
    tx = row.build()
    grads = {"a": A, "b": optax.MaskedNode()}
    updates, _ = tx.update(grads, tx.init(grads), grads)
    assert updates["b"] == optax.MaskedNode()
    assert_equal(updates["a"], tx.update({"a": A}, tx.init({"a": A}))[0]["a"])


# --- Values at the edge ---------------------------------------------------------------


@every_row
def test_zero_gradients_give_zero_updates(row: Row) -> None:
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    extra = {name: lambda params, step: zeros for name in row.extra}
    tx = row.build()
    state = tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(zeros, state, zeros, **extra)
        assert_equal(updates, zeros)
    chex.assert_tree_all_finite(plain(state))
    # With weights, what is left is the decay.
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS, **extra)
    decay = row.kwargs.get("weight_decay", 0)
    assert_close(updates, jax.tree.map(lambda w: -LR * decay * w, PARAMS))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_row
def test_non_finite_gradients_stay_visible(row: Row, bad: float) -> None:
    tx = row.build()
    spoilt = {**GRADS, "list": [GRADS["list"][0].at[2, 1].set(bad)]}
    updates, _ = tx.update(spoilt, tx.init(PARAMS), PARAMS, **row.extra)
    assert not jnp.isfinite(updates["list"][0][2, 1])
    if row.extra:  # and in the second gradient alone
        updates, _ = tx.update(
            GRADS, tx.init(PARAMS), PARAMS, grad_fn=lambda params, step: spoilt
        )
        assert not jnp.isfinite(updates["list"][0][2, 1])


COMPLEX = jax.tree.map(lambda x, y: x + 1j * y, PARAMS, make_params(1))


@parametrize(SINGLE)
def test_complex_leaves_are_right(row: Row) -> None:
    tx = row.build()
    parts = [jax.tree.map(part, COMPLEX) for part in (jnp.real, jnp.imag)]
    real, imag = (tx.update(part, tx.init(part))[0] for part in parts)
    got, _ = tx.update(COMPLEX, tx.init(COMPLEX), COMPLEX)
    assert types(got) == types(COMPLEX)
    assert_close(got, jax.tree.map(lambda x, y: x + 1j * y, real, imag))


@parametrize(DOUBLE)
def test_complex_leaves_are_refused(row: Row) -> None:
    tx = row.build()
    message = "real parameters, but got a leaf of dtype complex64"
    with pytest.raises(ValueError, match=message):
        tx.init(COMPLEX)
    with pytest.raises(ValueError, match=message):
        tx.update(COMPLEX, tx.init(PARAMS), COMPLEX, **row.extra)


# --- Keys -----------------------------------------------------------------------------

SEEDS = {
    "int": 3,
    "numpy": np.int64(3),
    "array": jnp.int32(3),
    "typed": jax.random.key(3),
    "legacy": jax.random.PRNGKey(3),
    "legacy-numpy": np.asarray(jax.random.PRNGKey(3)),
}


@pytest.mark.parametrize("key", SEEDS.values(), ids=SEEDS)
def test_forms_of_a_key(key: Any) -> None:
    state = tricks.scale_by_random(key).init(PARAMS)
    assert_equal(state.random_key, jax.random.key(3))
    assert types(state.random_key) == types(jax.random.key(3))
    if isinstance(key, jax.Array):  # it survives a donated state
        assert not set(buffers(key)) & set(buffers(state))


@pytest.mark.parametrize("seed", [-1, 0, 2**31, 2**32 - 1, 2**40])
def test_any_seed_that_jax_takes(seed: int) -> None:
    state = tricks.scale_by_random(seed).init(PARAMS)
    assert_equal(state.random_key, jax.random.key(seed))


def test_the_generator_of_a_key_is_kept() -> None:
    key = jax.random.key(3, impl="rbg")
    tx = tricks.scale_by_random(key)
    _, state = tx.update(GRADS, tx.init(PARAMS))
    assert jax.random.key_impl(state.random_key) == jax.random.key_impl(key)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_batch_of_keys_is_refused(make: Callable[[int], jax.Array]) -> None:
    keys = jax.random.split(make(0), 4)
    with pytest.raises(ValueError, match=r"keys of shape \(4,\)\. Build the .*vmap"):
        tricks.scale_by_random(keys).init(PARAMS)


# --- Convergence ----------------------------------------------------------------------

# Start, minimum, function. The means over the inputs of a unit agree in start and
# minimum of the matrix, since centralization keeps them.
TARGETS = {
    "parabola": (
        jnp.array([-1.0, 10.0, 1.0]),
        jnp.array([1.0, -1.0, 1.0]),
        lambda w: jnp.sum((w - jnp.array([1.0, -1.0, 1.0])) ** 2),
    ),
    "matrix": (
        jnp.array([[0.0, 3.0], [1.0, -1.0], [2.0, 1.0]]),
        jnp.array([[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]]),
        lambda w: jnp.sum((w - jnp.array([[2.0], [1.0], [0.0]])) ** 2),
    ),
    "rosenbrock": (
        jnp.array([0.0, 0.0]),
        jnp.array([1.0, 1.0]),
        lambda w: 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2,
    ),
}
# Learning rate on the quadratic targets and on the valley, and tolerance there: the
# unit-length perturbation of PUGD sees far beyond its walls, so that it ends on the
# valley's floor but not in its minimum.
SETTINGS = {
    "random": (0.1, 1e-3, 0.02),
    "random-half": (0.1, 1e-3, 0.02),
    "centralize": (0.1, 1e-3, 0.02),
    "bb": (0.1, 1e-3, 0.02),
    "unit": (0.1, 3e-3, 0.5),
    "step-tuned": (0.3, 2e-2, 0.02),
    "pugd": (0.01, 3e-3, 0.5),
}


@pytest.mark.parametrize("target", TARGETS)
@parametrize([row for row in ROWS if row.id in SETTINGS])
def test_convergence(row: Row, target: str) -> None:
    start, minimum, f = TARGETS[target]
    valley = target == "rosenbrock"
    steps = 10_000 if valley else 300
    rate = SETTINGS[row.id][valley]
    decayed = optax.cosine_decay_schedule(rate, steps)
    if row.id == "pugd":
        tx = row.build(learning_rate=decayed, weight_decay=0.0)
    elif row.factory in OPTIMIZERS:
        tx = row.build(learning_rate=rate)
    elif row.id == "bb":
        tx = optax.chain(row.build(learning_rate=rate), optax.sgd(rate))
    elif row.id == "unit":
        tx = optax.chain(row.build(), optax.sgd(decayed))
    else:
        tx = optax.chain(row.build(), optax.sgd(rate, momentum=0.9))
    gradient = jax.grad(f)
    extra = {name: lambda w, step: gradient(w) for name in row.extra}

    def step(carry: Any, _: None) -> tuple[Any, None]:
        w, state = carry
        updates, state = tx.update(gradient(w), state, w, **extra)
        return (optax.apply_updates(w, updates), state), None

    w = jax.lax.scan(step, (start, tx.init(start)), length=steps)[0][0]
    np.testing.assert_allclose(w, minimum, atol=SETTINGS[row.id][2] if valley else 1e-3)
    assert f(w) < 0.05 * f(start)


@every_row
def test_python_numbers_as_leaves(row: Row) -> None:
    params = {"a": 1.0, "b": 2.0}
    tx = row.build()
    state = tx.init(params)
    updates, _ = tx.update(params, state, params, grad_fn=lambda p, _: p)
    assert all(jnp.isfinite(u) for u in jax.tree.leaves(updates))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
