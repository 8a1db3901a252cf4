"""`optax_tricks.nnx` on a network with BatchNorm and dropout."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_tricks

pytest.importorskip("flax")
from flax import nnx

from optax_tricks.nnx import batch_gradients, split

TWO_GRADIENT_TRANSFORMS = {
    "pugd": optax_tricks.pugd(0.1),
    "step_tuned_sgd": optax_tricks.step_tuned_sgd(0.1),
}


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_fn(model, batch):
    x, y = batch
    logits = model(x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), logits


@pytest.fixture
def batch():
    return jax.random.normal(jax.random.key(1), (16, 3)), jnp.arange(16) % 2


@pytest.fixture
def parts():
    return split(Network(nnx.Rngs(0)))


def test_first_gradient_is_that_of_nnx(batch, parts):
    model = nnx.merge(*parts, copy=True)
    (loss, _), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch)
    out = batch_gradients(loss_fn, *parts, batch)
    chex.assert_trees_all_close(out.loss, loss, rtol=1e-6)
    chex.assert_trees_all_close(out.grads, nnx.to_pure_dict(grads), rtol=1e-5)
    # Training a model in place leaves this state behind.
    rest = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
    for name in ("mean", "var"):
        chex.assert_trees_all_close(
            out.model_state["norm"][name], rest["norm"][name], rtol=1e-6
        )


def test_statistics_are_those_of_the_batch(batch, parts):
    graphdef, params, model_state = parts
    out = batch_gradients(loss_fn, graphdef, params, model_state, batch)
    hidden = batch[0] @ params["hidden"]["kernel"] + params["hidden"]["bias"][None]
    norm = out.model_state["norm"]
    chex.assert_trees_all_close(norm["mean"], 0.1 * hidden.mean(0), atol=1e-6)
    chex.assert_trees_all_close(norm["var"], 0.9 + 0.1 * hidden.var(0), atol=1e-5)


@pytest.mark.parametrize("name", TWO_GRADIENT_TRANSFORMS)
def test_two_gradient_transforms_leave_the_state_as_plain_sgd_does(name, batch, parts):
    def step(tx):
        @jax.jit
        def run(params, model_state):
            out = batch_gradients(loss_fn, parts[0], params, model_state, batch)
            tx_ = optax.with_extra_args_support(tx)
            state = tx_.init(params)
            updates, _ = tx_.update(out.grads, state, params, grad_fn=out.grad_fn)
            return out.model_state, updates

        return run(*parts[1:])

    plain_state, plain_updates = step(optax.sgd(0.1))
    state, updates = step(TWO_GRADIENT_TRANSFORMS[name])
    chex.assert_trees_all_equal(state, plain_state)
    difference = optax.tree.sub(updates, plain_updates)
    assert optax.tree.norm(difference) > 1e-3  # the transform did something


def test_second_gradient_has_the_dropout_of_the_first(batch, parts):
    out = batch_gradients(loss_fn, *parts, batch)
    chex.assert_trees_all_equal(out.grad_fn(parts[1], 0), out.grads)
    chex.assert_trees_all_equal(out.grad_fn(parts[1], 1), out.grads)


def test_dropout_changes_from_step_to_step(batch, parts):
    graphdef, params, model_state = parts
    first = batch_gradients(loss_fn, graphdef, params, model_state, batch)
    second = batch_gradients(loss_fn, graphdef, params, first.model_state, batch)
    assert not jnp.allclose(first.aux, second.aux)


def test_second_gradient_is_taken_at_the_given_point(batch, parts):
    graphdef, params, model_state = parts
    out = batch_gradients(loss_fn, graphdef, params, model_state, batch)
    point = jax.tree.map(lambda w: w + 0.1, params)
    there = batch_gradients(loss_fn, graphdef, point, model_state, batch)
    chex.assert_trees_all_close(out.grad_fn(point, 0), there.grads, rtol=1e-6)


def test_nnx_state_works_like_plain_dicts(batch, parts):
    graphdef, params, model_state = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)
    out = jax.jit(lambda p, s: batch_gradients(loss_fn, graphdef, p, s, batch)[:4])(
        params, model_state
    )
    expected = jax.jit(
        lambda p, s: batch_gradients(loss_fn, parts[0], p, s, batch)[:4]
    )(*parts[1:])
    assert isinstance(out[2], nnx.State)
    assert isinstance(out[3], nnx.State)
    chex.assert_trees_all_close(nnx.to_pure_dict(out[2]), expected[2], rtol=1e-6)
    statistics = nnx.to_pure_dict(out[3])["norm"]
    chex.assert_trees_all_close(statistics, expected[3]["norm"], rtol=1e-6)


@pytest.mark.parametrize("name", TWO_GRADIENT_TRANSFORMS)
def test_nnx_optimizer_drives_two_gradient_transforms(name, batch, parts):
    model = Network(nnx.Rngs(0))
    tx = TWO_GRADIENT_TRANSFORMS[name]
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, params, model_state = nnx.split(model, nnx.Param, ...)
    out = batch_gradients(loss_fn, graphdef, params, model_state, batch)
    optimizer.update(model, out.grads, grad_fn=out.grad_fn)

    expected = batch_gradients(loss_fn, *parts, batch)
    updates, _ = tx.update(
        expected.grads, tx.init(parts[1]), parts[1], grad_fn=expected.grad_fn
    )
    chex.assert_trees_all_close(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        optax.apply_updates(parts[1], updates),
        atol=1e-6,
    )


@pytest.mark.parametrize("as_dicts", [False, True], ids=["states", "dicts"])
@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_parameters_that_a_filter_leaves_out_are_frozen(
    batch, grad_accum_steps, as_dicts
):
    model = Network(nnx.Rngs(0))
    is_trained = lambda path, x: isinstance(x, nnx.Param) and "head" in path  # noqa: E731
    graphdef, *parts = nnx.split(model, is_trained, ...)
    if as_dicts:
        parts = list(map(nnx.to_pure_dict, parts))
    params, model_state = parts
    out = batch_gradients(
        loss_fn, graphdef, *parts, batch, grad_accum_steps=grad_accum_steps
    )
    assert list(out.grads) == ["head"]
    chex.assert_trees_all_equal_structs(out.model_state, model_state)
    after = nnx.merge(graphdef, params, out.model_state)
    assert jnp.array_equal(after.hidden.kernel[...], model.hidden.kernel[...])
    assert not jnp.array_equal(after.norm.mean[...], model.norm.mean[...])


def loss_fn_without_aux(model, batch):
    return loss_fn(model, batch)[0], None


class Perceptron(nnx.Module):
    """A network whose loss on a batch is the mean of the losses on its parts."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 8, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x)))


def loss_and_count(model, batch):
    loss, _ = loss_fn(model, batch)
    return loss, {"examples": jnp.float32(len(batch[0]))}


@pytest.mark.parametrize("grad_accum_steps", [2, 4, 16])
def test_accumulated_gradients_are_those_of_the_whole_batch(batch, grad_accum_steps):
    parts = split(Perceptron(nnx.Rngs(0)))
    whole = batch_gradients(loss_and_count, *parts, batch)
    out = batch_gradients(
        loss_and_count, *parts, batch, grad_accum_steps=grad_accum_steps
    )
    chex.assert_trees_all_close(out[:3], whole[:3], rtol=1e-5, atol=1e-7)
    point = jax.tree.map(lambda w: w + 0.1, parts[1])
    chex.assert_trees_all_close(
        out.grad_fn(point, 0), whole.grad_fn(point, 0), rtol=1e-5, atol=1e-7
    )


def weighted_loss(model, batch):
    """The loss as a pair, for examples that have weights."""
    x, y, weights = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
    return ((losses * weights).sum(), weights.sum()), None


WEIGHTS = {
    "uneven": jnp.float32([1, 0, 0, 1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1]),
    "fractions": jnp.linspace(0.0, 0.3, 16),
    "an empty part": jnp.arange(16) % 4,
    "integers": jnp.arange(16),
    "none": jnp.zeros(16),
}


@pytest.mark.parametrize(
    ("weights", "grad_accum_steps", "dtype"),
    [
        *((weights, 4, "float32") for weights in WEIGHTS),
        ("uneven", 1, "float32"),
        ("uneven", 2, "float32"),
        ("uneven", 4, "float16"),
        ("uneven", 4, "bfloat16"),
    ],
)
def test_sums_are_divided_by_the_count_of_the_whole_batch(
    batch, weights, grad_accum_steps, dtype
):
    graphdef, params, model_state = split(Perceptron(nnx.Rngs(0)))
    params = optax.tree.cast(params, dtype)
    x, y = batch
    weights = WEIGHTS[weights]

    def expected(point):
        """The gradient in float32, without parts."""

        def mean(params):
            model = nnx.merge(graphdef, params, model_state)
            (total, count), _ = weighted_loss(model, (x, y, weights))
            return total / jnp.maximum(count, 1e-9)

        return jax.value_and_grad(mean)(optax.tree.cast(point, jnp.float32))

    out = batch_gradients(
        weighted_loss,
        graphdef,
        params,
        model_state,
        (x.astype(dtype), y, weights),
        grad_accum_steps=grad_accum_steps,
    )
    tolerance = {"float32": 1e-6, "float16": 3e-3, "bfloat16": 3e-2}[dtype]
    point = jax.tree.map(lambda w: w + 0.1, params)
    for grads, where in ((out.grads, params), (out.grad_fn(point, 0), point)):
        chex.assert_trees_all_equal_dtypes(grads, params)
        _, right = expected(where)
        chex.assert_trees_all_close(
            optax.tree.cast(grads, jnp.float32), right, atol=tolerance
        )
    loss, _ = expected(params)
    assert out.loss == pytest.approx(float(loss), abs=tolerance)


def test_the_gradient_of_many_items_does_not_overflow(batch):
    """The sum over all items is beyond float16, the mean is not."""
    parts = split(nnx.Linear(3, 1, rngs=nnx.Rngs(0), param_dtype=jnp.float16))

    def loss_fn(model, batch):
        errors = model(batch).astype(jnp.float32) - 7.0
        return (30_000 * jnp.square(errors).sum(), 30_000 * len(batch)), None

    x = batch[0].astype(jnp.float16)
    whole = batch_gradients(loss_fn, *parts, x)
    out = batch_gradients(loss_fn, *parts, x, grad_accum_steps=4)
    assert jnp.isfinite(out.grads["bias"]).all()
    chex.assert_trees_all_close(out.grads, whole.grads, rtol=1e-2)


def test_the_count_may_be_a_number(batch):
    parts = split(Perceptron(nnx.Rngs(0)))

    def as_pair(model, batch):
        loss, aux = loss_fn(model, batch)
        return (loss * len(batch[0]), len(batch[0])), aux

    for grad_accum_steps in (1, 2):
        steps = {"grad_accum_steps": grad_accum_steps}
        mean = batch_gradients(loss_fn, *parts, batch, **steps)
        pair = batch_gradients(as_pair, *parts, batch, **steps)
        chex.assert_trees_all_close(pair[:3], mean[:3], rtol=1e-6, atol=1e-8)


def test_running_statistics_move_with_each_part(batch, parts):
    graphdef, params, model_state = parts

    @partial(jax.jit, static_argnames="grad_accum_steps")
    def state_after(model_state, batch, grad_accum_steps=1):
        return batch_gradients(
            loss_fn_without_aux,
            graphdef,
            params,
            model_state,
            batch,
            grad_accum_steps=grad_accum_steps,
        ).model_state

    found = state_after(model_state, batch, grad_accum_steps=2)
    expected = model_state
    for part in (0, 1):
        half = jax.tree.map(lambda x, part=part: x[part::2], batch)
        expected = state_after(expected, half)
    chex.assert_trees_all_close(found["norm"], expected["norm"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("grad_accum_steps", [3, 32])
def test_parts_of_unequal_size_are_refused(batch, parts, grad_accum_steps):
    message = rf"must divide .* got grad_accum_steps={grad_accum_steps} .* \(16, 3\)"
    with pytest.raises(ValueError, match=message):
        batch_gradients(loss_fn, *parts, batch, grad_accum_steps=grad_accum_steps)


@pytest.mark.parametrize("grad_accum_steps", [0, -2, 2.0, "2", None])
def test_what_is_no_number_of_parts_is_refused(batch, parts, grad_accum_steps):
    message = f"grad_accum_steps must be an int of at least 1, got {grad_accum_steps!r}"
    with pytest.raises(ValueError, match=message):
        batch_gradients(loss_fn, *parts, batch, grad_accum_steps=grad_accum_steps)


@pytest.mark.parametrize("result", [lambda loss: loss, lambda loss: (loss, 1, None)])
def test_a_loss_that_returns_no_pair_is_refused(batch, parts, result):
    def alone(model, batch):
        return result(loss_fn(model, batch)[0])

    with pytest.raises(ValueError, match=r"loss_fn must return a pair \(loss, aux\)"):
        batch_gradients(alone, *parts, batch)
