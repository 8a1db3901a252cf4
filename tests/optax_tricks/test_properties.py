"""Properties that the papers prove or state, on inputs chosen by hypothesis."""

from functools import partial

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, assume, given, settings

import optax_tricks

# `x64` does not change between examples, so sharing it among them is harmless.
prove = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
Z = 5.0  # The bound of a standard score. The keys are fixed, so no test is flaky.


def decimals(low: float, high: float) -> st.SearchStrategy[float]:
    """Floats of three decimals, whose products are never subnormal."""
    return st.floats(low, high).map(lambda value: round(value, 3))


def arrays(*shape: int, bound: float = 100.0) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float64, shape, elements=decimals(-bound, bound))


def trees(bound: float = 100.0) -> st.SearchStrategy[dict[str, np.ndarray]]:
    """One leaf of each rank up to three."""
    return st.fixed_dictionaries(
        {
            "x": arrays(2, 1, 2, bound=bound),
            "y": arrays(3, 2, bound=bound),
            "z": arrays(2, bound=bound),
            "s": arrays(bound=bound),
        }
    )


def vector(tree: optax.Params) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def norm(tree: optax.Params) -> float:
    return float(np.linalg.norm(vector(tree)))


def device(tree: optax.Params, dtype: str = "float64") -> optax.Params:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


# --- Gradient centralization ----------------------------------------------------------

# Shapes and axes to reduce; None stands for the default, all axes but the last.
WEIGHTS = [
    ((5, 3), None),
    ((5, 3), (1,)),
    ((1, 4), None),
    ((1, 4), (0, 1)),
    ((4, 1), None),
    ((2, 3, 4), None),
    ((2, 3, 4), (0,)),
    ((2, 3, 4), (-1, 1)),
    ((3, 2, 2, 3), None),
    ((3, 2, 2, 3), (1, 3)),
    ((2, 1, 2, 2, 2), None),
    ((2, 1, 2, 2, 2), (1,)),
]


@pytest.mark.parametrize(("shape", "argument"), WEIGHTS)
def test_centralize_is_the_orthogonal_projection_off_the_mean(shape, argument, x64):
    axes = tuple(range(len(shape) - 1)) if argument is None else argument
    entries = np.prod([shape[axis] for axis in axes])
    tx = optax_tricks.centralize(argument)

    def project(x: np.ndarray) -> np.ndarray:
        x = jnp.asarray(x)
        return np.asarray(tx.update(x, tx.init(x), x)[0])

    @settings(prove, max_examples=10)
    @given(arrays(*shape), arrays(*shape), decimals(-3, 3), decimals(-3, 3))
    def check(g, h, a, b):
        close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-8)
        pg, ph = project(g), project(h)
        close(project(a * g + b * h), a * pg + b * ph)
        close(project(pg), pg)  # P² = P
        close(np.vdot(pg, h), np.vdot(g, ph))  # P = Pᵀ
        assert norm(pg) <= norm(g) * (1 + 1e-12)  # Theorem 4.2
        if entries == 1:
            np.testing.assert_array_equal(pg, g)
        else:
            close(pg.sum(axes), 0 * g.sum(axes))  # eᵀPg = 0
            # Only the mean is subtracted (Pythagoras).
            mean = entries * np.sum(g.mean(axes) ** 2)
            close(norm(pg) ** 2, norm(g) ** 2 - mean)

    check()


@pytest.mark.parametrize("shape", [(), (4,), (3, 2), (3, 2, 2), (2, 2, 3, 2), (2,) * 5])
@pytest.mark.parametrize("conv_only", [False, True])
def test_centralize_conv_only_takes_leaves_of_more_than_three_axes(
    shape, conv_only, x64
):
    g = np.random.default_rng(0).normal(2, 1, shape)
    x, tx = jnp.asarray(g), optax_tricks.centralize(conv_only=conv_only)
    pg = tx.update(x, tx.init(x), x)[0]
    if g.ndim > (3 if conv_only else 1):
        g = g - g.mean(tuple(range(g.ndim - 1)), keepdims=True)
    np.testing.assert_allclose(pg, g, rtol=1e-12, atol=1e-12)


def fit(p: dict, x: jax.Array) -> jax.Array:
    """A non-convex loss of two layers with biases."""
    hidden = jnp.tanh(x @ p["first"] + p["a"][None])
    return jnp.sum((jnp.sin(hidden @ p["second"] + p["b"][None]) - 0.3) ** 2)


def train(
    tx: optax.GradientTransformation, start: dict, xs: jax.Array
) -> tuple[dict, optax.OptState]:
    """Returns the stacked parameters and states after steps with each row of `xs`."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, x):
        params, state = carry
        updates, state = tx.update(
            jax.grad(fit)(params, x),
            state,
            params,
            grad_fn=lambda p, _: jax.grad(fit)(p, x),
        )
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    return jax.lax.scan(step, (start, tx.init(start)), xs)[1]


def setup(seed: int, steps: int = 20) -> tuple[dict, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {"first": (4, 3), "a": (3,), "second": (3, 2), "b": (2,)}
    start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return device(start), jnp.asarray(rng.normal(size=(steps, 5, 4)))


# Chains around P, and the factor by which a step then shrinks eᵀw.
CENTRALIZED = {
    "sgd": (lambda lr, mu: [optax_tricks.centralize(), optax.sgd(lr)], 0.0),
    "momentum": (lambda lr, mu: [optax_tricks.centralize(), optax.sgd(lr, mu)], 0.0),
    "momentum inside": (
        lambda lr, mu: [optax.trace(mu), optax_tricks.centralize(), optax.sgd(lr)],
        0.0,
    ),
    "nesterov": (
        lambda lr, mu: [optax_tricks.centralize(), optax.sgd(lr, mu, nesterov=True)],
        0.0,
    ),
    # L2 before the projection does not change eᵀw; after it, it does.
    "L2 inside": (
        lambda lr, mu: [
            optax.add_decayed_weights(0.1),
            optax_tricks.centralize(),
            optax.sgd(lr, mu),
        ],
        0.0,
    ),
    "decoupled": (
        lambda lr, mu: [
            optax_tricks.centralize(),
            optax.trace(mu),
            optax.add_decayed_weights(0.1),
            optax.sgd(lr),
        ],
        0.1,
    ),
}


@pytest.mark.parametrize("optimizer", CENTRALIZED)
def test_training_never_changes_the_mean_of_a_unit(optimizer, x64):
    make, decay = CENTRALIZED[optimizer]
    descend = jax.jit(lambda lr, mu, *a: train(optax.chain(*make(lr, mu)), *a)[0])
    plain = jax.jit(lambda lr, *a: train(optax.sgd(lr), *a)[0])

    @settings(prove, max_examples=10)
    @given(st.integers(0, 999), st.floats(0.001, 0.3), st.floats(0, 0.99))
    def check(seed, lr, mu):
        start, xs = setup(seed)
        path = descend(lr, mu, start, xs)
        shrunk = (1 - lr * decay) ** np.arange(1, len(xs) + 1)
        for name in ("first", "second"):
            sums = np.asarray(start[name]).sum(0) * shrunk[:, None]
            np.testing.assert_allclose(path[name].sum(1), sums, atol=1e-10)
            # The weights themselves change.
            assert np.abs(path[name][-1] - start[name]).max() > 1e-6
        moved = plain(lr, start, xs)["first"].sum(1) - start["first"].sum(0)[None]
        assert np.abs(moved).max() > 1e-6

    check()


@pytest.mark.parametrize("mu", [None, 0.9])
def test_a_shift_of_the_input_moves_the_output_as_before_training(mu, x64):
    """Theorem 4.1: wᵀx - wᵀ(x + c1) = -c 1ᵀw⁰ for every trained w."""

    @jax.jit
    def final(start, xs):
        tx = optax.chain(optax_tricks.centralize(), optax.sgd(0.1, mu))
        return train(tx, start, xs)[0]["first"][-1]

    @settings(prove, max_examples=10)
    @given(st.integers(0, 999), arrays(4), st.floats(-100, 100))
    def check(seed, x, c):
        start, xs = setup(seed)
        w = np.asarray(final(start, xs))
        shift = x @ w - (x + c) @ w
        w0 = np.asarray(start["first"])
        np.testing.assert_allclose(shift, -c * w0.sum(0), atol=1e-8)

    check()


# --- PUGD -----------------------------------------------------------------------------


@prove
@given(trees(10), trees(10))
def test_pugd_probes_at_distance_one_and_returns_a_unit_vector(x64, w, g):
    weighted = np.abs(vector(w)) * vector(g)
    assume(np.linalg.norm(weighted) > 1e-3)
    epsilon = weighted / np.linalg.norm(weighted)
    total = epsilon + vector(g)
    assume(np.linalg.norm(total) > 1e-3)
    probes = []

    def grad_fn(params, step):
        probes.append(params)
        return jax.tree.map(jnp.subtract, params, w)  # g* is ε itself.

    w, g = device(w), device(g)
    tx = optax_tricks.perturbed_unit_step()
    updates, state = tx.update(g, tx.init(w), w, grad_fn=grad_fn)
    assert len(probes) == 1
    close = partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-8)
    close(norm(jax.tree.map(jnp.subtract, probes[0], w)), 1)
    close(vector(probes[0]) - vector(w), epsilon)
    close(optax.tree.get(state, "pugd_perturbed_gradient_norm"), 1)
    close(norm(updates), 1)
    close(vector(updates), total / np.linalg.norm(total))


def pulled(p: optax.Params, scale: float = 1.0) -> optax.Params:
    return jax.tree.map(lambda leaf: scale * (jnp.sin(leaf) + leaf), p)


@jax.jit
def scaled_pugd(w, g, scale):
    tx = optax_tricks.perturbed_unit_step()
    g = jax.tree.map(lambda leaf: scale * leaf, g)
    return tx.update(g, tx.init(w), w, grad_fn=lambda p, _: pulled(p, scale))[0]


@prove
@given(trees(10), trees(10), st.floats(-4, 4))
def test_pugd_ignores_a_positive_scale_of_the_loss(x64, w, g, exponent):
    assume(np.linalg.norm(np.abs(vector(w)) * vector(g)) > 1e-1)
    w, g = device(w), device(g)
    one, scaled = scaled_pugd(w, g, 1.0), scaled_pugd(w, g, 10.0**exponent)
    np.testing.assert_allclose(vector(scaled), vector(one), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(norm(scaled), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1e-30, 0), (1e-15, 1), (1e15, 1), (1e30, np.nan)],
)
def test_pugd_is_a_unit_vector_or_says_so_where_squares_leave_float32(scale, expected):
    w = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    g = {"a": jnp.array([3.0, 0.1]), "b": jnp.array(-1.0)}
    np.testing.assert_allclose(norm(scaled_pugd(w, g, scale)), expected, rtol=1e-5)


def test_pugd_at_zero_parameters_stays_there_for_its_probe():
    w = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)}
    g = {"a": jnp.full((2, 2), 2.0), "b": jnp.zeros(3)}
    tx = optax_tricks.perturbed_unit_step()
    # g* = g + (probe - w), so the direction is that of g only if the probe is at w.
    updates, state = tx.update(
        g, tx.init(w), w, grad_fn=lambda p, _: jax.tree.map(jnp.add, g, p)
    )
    np.testing.assert_allclose(updates["a"], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0)
    assert optax.tree.get(state, "pugd_perturbation_norm") == 0


@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_pugd_is_locally_bounded(mu, x64):
    """A step is at most η long, and with momentum at most η(1 - μᵏ)/(1 - μ)."""
    descend = jax.jit(lambda lr, *a: train(optax_tricks.pugd(lr, momentum=mu), *a)[0])

    @settings(prove, max_examples=15)
    @given(st.integers(0, 999), st.floats(0.01, 10))
    def check(seed, lr):
        start, xs = setup(seed)
        path = descend(lr, start, xs)
        rows = zip(*jax.tree.leaves(path), strict=True)
        rows = np.stack([vector(start), *(vector(list(row)) for row in rows)])
        steps = np.linalg.norm(np.diff(rows, axis=0), axis=1)
        bound = lr * np.cumsum(mu ** np.arange(len(steps)))
        assert (steps <= bound * (1 + 1e-9)).all()
        np.testing.assert_allclose(steps[0], lr, rtol=1e-9)
        if not mu:
            np.testing.assert_allclose(steps, lr, rtol=1e-9)

    check()


# --- Step-Tuned SGD -------------------------------------------------------------------


@jax.jit
def feed_step_tuned(gs, hs, lr, beta, nu, low, high):
    """Makes steps at w = 0 with gradients `gs`, and `hs` at the probe."""
    tx = optax_tricks.barzilai_borwein_step(
        lr, beta=beta, nu=nu, min_scale=low, max_scale=high
    )
    w = jnp.zeros_like(gs[0])

    def step(state, gradients):
        g, h = gradients
        updates, state = tx.update(g, state, w, grad_fn=lambda p, _: h)
        return state, (updates, state)

    state = tx.init(w)
    return state, *jax.lax.scan(step, state, (gs, hs))[1]


# Gradients of all sizes, and often equal or zero.
SERIES = arrays(8, 3) | st.sampled_from(
    [np.zeros((8, 3)), np.full((8, 3), 1e-12), np.full((8, 3), 1e12), np.eye(8, 3)]
)


@prove
@given(
    SERIES,
    SERIES,
    st.floats(1e-3, 10),
    st.floats(0, 0.99),
    st.floats(0.01, 20),
    st.floats(0.01, 1),
    st.floats(1, 50),
)
def test_step_tuned_scale_stays_in_its_bounds(x64, gs, hs, lr, beta, nu, low, high):
    first, updates, states = feed_step_tuned(gs, hs, lr, beta, nu, low, high)
    get = partial(optax.tree.get, states)
    assert optax.tree.get(first, "bb_step_size") == 1
    gammas = np.asarray(get("bb_step_size"), np.float64)
    assert (gammas >= low * (1 - 1e-6)).all()
    assert (gammas <= high * (1 + 1e-6)).all()
    used = np.array([1, *gammas[:-1]])[:, None]
    np.testing.assert_allclose(updates, used * (gs + hs), rtol=1e-6, atol=1e-12)
    negative = np.diff(get("bb_nonpositive_curvature_count"), prepend=0)
    np.testing.assert_array_equal(negative, get("bb_curvature") <= 0)
    # If the curvature is not positive, the next scale is `nu`, which is clipped too.
    expected = np.clip(nu, low, high)
    np.testing.assert_allclose(gammas[negative == 1], expected, rtol=1e-6)
    np.testing.assert_array_equal(get("bb_count"), np.arange(1, 9))


@prove
@given(trees(10), trees(10), st.floats(0.01, 1))
def test_step_tuned_probes_half_the_step(x64, w, g, lr):
    w, g = device(w), device(g)
    tx, probes, gamma = optax_tricks.barzilai_borwein_step(lr), [], 1.0

    def grad_fn(params, step):
        probes.append(params)
        return pulled(params)

    state = tx.init(w)
    for k in range(2):
        updates, state = tx.update(g, state, w, grad_fn=grad_fn)
        assert len(probes) == k + 1
        half = vector(w) - lr * gamma * vector(g)
        np.testing.assert_allclose(vector(probes[k]), half, rtol=1e-6, atol=1e-6)
        expected = gamma * (vector(g) + half + np.sin(half))
        np.testing.assert_allclose(vector(updates), expected, rtol=1e-6, atol=1e-5)
        gamma = float(optax.tree.get(state, "bb_step_size"))


# --- Random gradient ------------------------------------------------------------------


@partial(jax.jit, static_argnames="steps")
def draw_factors(seed, g, minval, maxval, probability, steps):
    tx = optax_tricks.scale_by_random(
        jax.random.key(seed), minval=minval, maxval=maxval, probability=probability
    )

    def step(state, _):
        updates, state = tx.update(g, state)
        return state, (updates, optax.tree.get(state, "random_factor"))

    return jax.lax.scan(step, tx.init(g), length=steps)[1]


@prove
@given(
    st.integers(0, 2**31 - 1),
    trees(),
    st.floats(0, 5, width=32),
    st.floats(0.125, 5, width=32),
    st.floats(0, 1),
)
def test_random_factor_is_bounded_and_the_same_for_all_leaves(
    seed, g, minval, span, probability
):
    # `random_factor` is exact in float32, and so is its product with each leaf.
    maxval = np.float32(minval + span)
    g = device(g, "float32")
    updates, factors = draw_factors(seed, g, minval, maxval, probability, 64)
    factors = np.asarray(factors)
    inside = (factors >= minval) & (factors < maxval)
    assert (inside | (factors == 1)).all()
    for leaf, update in zip(jax.tree.leaves(g), jax.tree.leaves(updates), strict=True):
        expected = np.multiply.outer(factors, np.asarray(leaf))
        np.testing.assert_allclose(update, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("minval", "maxval", "p"),
    [(0, 1, 1.0), (0.5, 2.5, 1.0), (0, 1, 0.5), (2, 3, 0.1), (0, 3, 0.9)],
)
def test_random_factor_is_uniform_and_independent(minval, maxval, p):
    n = 20_000
    _, factors = draw_factors(11, jnp.ones(()), minval, maxval, p, n)
    factors = np.asarray(factors, np.float64)
    # A step that is not scaled has the factor 1, which is drawn with probability 0.
    scaled = factors != 1
    if p == 1:
        assert scaled.all()
    else:
        assert abs(scaled.mean() - p) < Z * np.sqrt(p * (1 - p) / n)
        pairs = np.mean(scaled[1:] & scaled[:-1])
        assert abs(pairs - p * p) < Z * np.sqrt(2 * p * p / n)
    u = (factors[scaled] - minval) / (maxval - minval)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 1 / 2) < Z * np.sqrt(1 / 12 / len(u))
    # The variance of (u - 1/2)² is 1/80 - 1/144.
    assert abs(np.mean((u - 0.5) ** 2) - 1 / 12) < Z * np.sqrt(
        (1 / 80 - 1 / 144) / len(u)
    )
    # Neither successive factors nor their squares are correlated.
    for power in (1, 2):
        v = (u - 0.5) ** power
        v = (v - v.mean()) / v.std()
        assert abs(np.mean(v[1:] * v[:-1])) < Z / np.sqrt(len(u))
    # The Kolmogorov-Smirnov test of the whole distribution.
    gap = np.abs(np.sort(u) - np.arange(len(u)) / len(u)).max()
    assert gap < 2.5 / np.sqrt(len(u))


def test_random_factor_follows_its_key():
    one = jnp.ones(())
    factors = [np.asarray(draw_factors(s, one, 0.0, 1.0, 1.0, 50)[1]) for s in (1, 2)]
    again = np.asarray(draw_factors(1, one, 0.0, 1.0, 1.0, 50)[1])
    np.testing.assert_array_equal(factors[0], again)
    assert abs(np.corrcoef(factors)[0, 1]) < Z / np.sqrt(50)
    tx = optax_tricks.scale_by_random(1)
    assert tx.update(one, tx.init(one))[0] == factors[0][0]


AFTER = {
    "momentum": lambda: optax.trace(0.9),
    "decay": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.5)),
    "adam": optax.scale_by_adam,
}


@pytest.mark.parametrize("after", AFTER)
def test_random_gradient_is_the_gradient_of_the_random_loss(after, x64):
    """The gradient of u·L is u times that of L, whatever follows in the chain."""
    ours = optax.chain(
        optax_tricks.scale_by_random(5), AFTER[after](), optax.scale(-0.05)
    )
    theirs = optax.chain(AFTER[after](), optax.scale(-0.05))
    start, xs = setup(5)
    path, states = jax.jit(partial(train, ours))(start, xs)
    factors = optax.tree.get(states, "random_factor")

    @jax.jit
    def step(params, state, x, u):
        g = jax.grad(lambda p: u * fit(p, x))(params)
        updates, state = theirs.update(g, state, params)
        return optax.apply_updates(params, updates), state

    params, state = start, theirs.init(start)
    for k, (x, u) in enumerate(zip(xs, factors, strict=True)):
        params, state = step(params, state, x, u)
        row = jax.tree.map(lambda leaf, k=k: leaf[k], path)
        np.testing.assert_allclose(vector(row), vector(params), rtol=1e-9)


# --- Triangular schedule --------------------------------------------------------------


@partial(jax.jit, static_argnames="half")
def wave(low, high, half, counts):
    return jax.vmap(optax_tricks.triangular_schedule(low, high, half))(counts)


@settings(prove, max_examples=15)
@given(decimals(0, 10), decimals(0, 10), st.sampled_from([1, 2, 3, 7, 40]))
def test_triangular_schedule_is_a_triangle(low, span, half):
    high = low + span
    counts = np.arange(256)
    values = np.asarray(wave(low, high, half, counts), np.float64)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    period = 2 * half
    close(values[::period], low)
    close(values[half::period], high)
    close(values[period:], values[:-period])
    turned = values[: period + 1]
    close(turned, turned[::-1])
    # Straight lines: up on the first half and, by the symmetry above, down after it.
    close(values[: half + 1], np.linspace(low, high, half + 1))
    assert (values >= low - 1e-6 * high).all()
    assert (values <= high * (1 + 1e-6)).all()


@pytest.mark.parametrize("half", [1, 7, 1000])
def test_triangular_schedule_takes_a_plain_or_a_traced_count(half):
    schedule = optax_tricks.triangular_schedule(0.1, 0.9, half)
    for count in (0, half // 2, half, 2 * half, 3 * half):
        expected = 0.1 + 0.8 * (1 - abs(1 - (count % (2 * half)) / half))
        for value in (schedule(count), jax.jit(schedule)(count)):
            np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("half", [1, 7, 1000])
def test_triangular_schedule_keeps_its_period_in_long_runs(half):
    """Counts above 2²⁴ are not exact in single precision."""
    schedule = optax_tricks.triangular_schedule(0.0, 1.0, half)
    start = (2**31 - 1) // (2 * half) * (2 * half) - 2 * half
    for offset in {0, half // 2, half, half + half // 3}:
        value = schedule(jnp.asarray(start + offset, jnp.int32))
        np.testing.assert_allclose(value, 1 - abs(1 - offset / half), atol=1e-5)


# --- Zero and non-finite gradients ----------------------------------------------------

TRANSFORMS = {
    "scale_by_random": partial(optax_tricks.scale_by_random, 0),
    "centralize": optax_tricks.centralize,
    "barzilai_borwein_step": partial(optax_tricks.barzilai_borwein_step, 0.1),
    "perturbed_unit_step": optax_tricks.perturbed_unit_step,
    "step_tuned_sgd": partial(optax_tricks.step_tuned_sgd, 0.1),
    "pugd": partial(optax_tricks.pugd, 0.1),
}
TWO_GRADIENTS = (
    "barzilai_borwein_step",
    "perturbed_unit_step",
    "step_tuned_sgd",
    "pugd",
)


def numbers(tree: optax.OptState) -> list[np.ndarray]:
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return [
        np.asarray(leaf, np.float64)
        for leaf in leaves
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_zero_gradients_give_zero_updates(name, dtype):
    w = {"a": jnp.ones((3, 2), dtype), "b": jnp.zeros(2, dtype)}
    zero = jax.tree.map(jnp.zeros_like, w)
    tx = TRANSFORMS[name]()
    state = tx.init(w)
    for _ in range(3):
        updates, state = tx.update(zero, state, w, grad_fn=lambda p, _: zero)
        assert not vector(device(updates, "float32")).any()
    assert all(np.isfinite(leaf).all() for leaf in numbers(state))
    if "pugd" in name or "unit" in name:
        assert optax.tree.get(state, "pugd_zero_count") == 3
    if "step_tuned" in name or "barzilai" in name:
        assert optax.tree.get(state, "bb_nonpositive_curvature_count") == 3
    # Later gradients are used again.
    ones = jax.tree.map(jnp.ones_like, w)
    ones["a"] = ones["a"].at[0].set(2)
    updates, state = tx.update(ones, state, w, grad_fn=lambda p, _: ones)
    assert np.isfinite(vector(device(updates, "float32"))).all()
    assert vector(device(updates, "float32")).any()


def test_opposite_gradients_give_a_zero_unit_step():
    w, g = jnp.array([1.0, 2.0]), jnp.array([0.5, -3.0])
    tx = optax_tricks.perturbed_unit_step()
    updates, state = tx.update(g, tx.init(w), w, grad_fn=lambda p, _: -g)
    np.testing.assert_array_equal(updates, 0)
    assert optax.tree.get(state, "pugd_zero_count") == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_non_finite_gradients_stay_visible(name, value):
    tx = TRANSFORMS[name]()
    w = jnp.array([[1.0, -1.0], [0.0, 2.0], [3.0, 0.5]])
    fine = jnp.array([[0.3, 0.0], [-1.0, 0.2], [0.0, 4.0]])

    def update(g: jax.Array, h: jax.Array) -> tuple:
        return tx.update(g, tx.init(w), w, grad_fn=lambda p, _: h)

    assert np.isfinite(update(fine, fine)[0]).all()
    # Also in entries where the parameter, or the other gradient, is zero.
    for place in np.ndindex(w.shape):
        bad = fine.at[place].set(value)
        pairs = [(bad, fine), (bad, bad)]
        if name in TWO_GRADIENTS:
            pairs.append((fine, bad))
        for g, h in pairs:
            assert not np.isfinite(update(g, h)[0]).all()


def test_random_factor_stays_below_its_upper_limit_when_rounded(monkeypatch):
    # 1 + (2 - 1) * (1 - 2**-24) is 2 in float32, once in sixteen million draws.
    largest = jnp.float32(1 - 2**-24)
    monkeypatch.setattr(jax.random, "uniform", lambda *args, **kwargs: largest)
    tx = optax_tricks.scale_by_random(0, minval=1.0, maxval=2.0)
    _, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    assert state.random_factor < 2
