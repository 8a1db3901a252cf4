"""The library against NumPy float64 references written from the papers alone.

Everything here works on one flat vector of all parameters: the projection of gradient
centralization is an explicit matrix and a norm is the norm of the whole vector, as
printed, so that no code or idea is shared with the library.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace as Record

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_tricks

LR, DECAY, STEPS, TOLERANCE = 0.1, 0.05, 30, 1e-11

# A patchwise "convolution", tanh, mean over places, tanh, linear, gain. The names have
# no meaning in Flax. `b` has a single row, which centralization must not change.
SHAPES = {
    "u": (3, 3, 2, 4),
    "a": (4,),
    "v": (4, 5),
    "b": (1, 5),
    "w": (5, 3),
    "s": (),
}
SIZES = [int(np.prod(shape)) for shape in SHAPES.values()]
ENDS = np.cumsum(SIZES)


def unpack(vector: np.ndarray) -> dict:
    parts = np.split(vector, ENDS[:-1])
    return {k: p.reshape(s) for (k, s), p in zip(SHAPES.items(), parts, strict=True)}


def pack(tree: dict) -> np.ndarray:
    return np.concatenate([np.asarray(tree[k], np.float64).ravel() for k in SHAPES])


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    start = rng.normal(size=ENDS[-1]) * np.repeat([0.4, 0.1, 0.9, 0.1, 0.8, 1], SIZES)
    return start, rng.normal(size=(4, 6, 5, 3, 3, 2)), rng.normal(size=(4, 6, 3))


START, INPUTS, TARGETS = problem(0)
BATCHES = len(INPUTS)


def loss(p: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    hidden = jnp.tanh(jnp.einsum("blijc,ijco->blo", x, p["u"]) + p["a"][None, None])
    hidden = jnp.tanh(hidden.mean(1) @ p["v"] + p["b"])
    return 0.5 * jnp.sum((p["s"] * (hidden @ p["w"]) - y) ** 2) / len(x)


def gradient(vector: np.ndarray, k: int) -> np.ndarray:
    """The gradient on batch `k`, differentiated by hand."""
    x, y, p = INPUTS[k % BATCHES], TARGETS[k % BATCHES], unpack(vector)
    h1 = np.tanh(np.einsum("blijc,ijco->blo", x, p["u"]) + p["a"])
    mean = h1.mean(1)
    h2 = np.tanh(mean @ p["v"] + p["b"])
    linear = h2 @ p["w"]
    error = (p["s"] * linear - y) / len(x)
    d2 = p["s"] * (error @ p["w"].T) * (1 - h2**2)
    d1 = (d2 @ p["v"].T)[:, None] / h1.shape[1] * (1 - h1**2)
    return pack(
        {
            "u": np.einsum("blijc,blo->ijco", x, d1),
            "a": d1.sum((0, 1)),
            "v": mean.T @ d2,
            "b": d2.sum(0),
            "w": p["s"] * (h2.T @ error),
            "s": np.sum(error * linear),
        }
    )


# --- The papers' formulas and the base optimizers: vector in, vector out --------------
# A stage maps (g, context) to a new g; the context has k, w, grad and random factor.

Stage = Callable[[np.ndarray, Record], np.ndarray]


def projection(conv_only: bool = False) -> np.ndarray:
    """P = I - e eᵀ, e = 1/√M, for each output unit of each weight; else I."""
    matrix, end = np.eye(ENDS[-1]), 0
    for shape, size in zip(SHAPES.values(), SIZES, strict=True):
        start, end = end, end + size
        if len(shape) < (4 if conv_only else 2):
            continue
        for column in np.arange(start, end).reshape(-1, shape[-1]).T:
            if len(column) > 1:
                e = np.full(len(column), 1 / np.sqrt(len(column)))
                matrix[np.ix_(column, column)] -= np.outer(e, e)
    return matrix


def centralized(conv_only: bool = False) -> Stage:
    matrix = projection(conv_only)
    return lambda g, c: matrix @ g


def randomly_scaled() -> Stage:
    return lambda g, c: c.factor * g


def decayed() -> Stage:
    return lambda g, c: g + DECAY * c.w


def momentum(mu: float = 0.9) -> Stage:
    trace = np.zeros(ENDS[-1])

    def stage(g: np.ndarray, c: Record) -> np.ndarray:
        nonlocal trace
        trace = g + mu * trace
        return trace

    return stage


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Stage:
    m, v = np.zeros(ENDS[-1]), np.zeros(ENDS[-1])

    def stage(g: np.ndarray, c: Record) -> np.ndarray:
        nonlocal m, v
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1 ** (c.k + 1)), v / (1 - b2 ** (c.k + 1))
        return m_hat / (np.sqrt(v_hat) + eps)

    return stage


def adagrad(initial: float = 0.1, eps: float = 1e-7) -> Stage:
    total = np.full(ENDS[-1], initial)

    def stage(g: np.ndarray, c: Record) -> np.ndarray:
        nonlocal total
        total = total + g**2
        return g / np.sqrt(total + eps)

    return stage


def perturbed_unit(eps: float = 1e-12) -> Stage:
    def stage(g: np.ndarray, c: Record) -> np.ndarray:
        weighted = np.abs(c.w) * g
        c.perturbation_norm = np.linalg.norm(weighted)
        second = c.grad(c.w + weighted / (c.perturbation_norm + eps))
        c.norm, c.perturbed_norm = np.linalg.norm(g), np.linalg.norm(second)
        return (second + g) / np.linalg.norm(second + g)

    return stage


def triangle(low: float, high: float, half: int) -> Stage:
    """Smith (2015): stepsize and cycle as in his listing."""

    def stage(g: np.ndarray, c: Record) -> np.ndarray:
        cycle = np.floor(1 + c.k / (2 * half))
        x = np.abs(c.k / half - 2 * cycle + 1)
        return (low + (high - low) * max(0.0, 1 - x)) * g

    return stage


def descend(stages: list[Stage], lr: float, factors: list[float]) -> Iterator[Record]:
    w = START
    for k, factor in enumerate(factors):
        c = Record(k=k, w=w, grad=partial(gradient, k=k), factor=factor)
        g = c.grad(w)
        for stage in stages:
            g = stage(g, c)
        w = w - lr * g
        c.w = w
        yield c


def step_tuned(
    a: Callable[[int], float],
    beta: float = 0.9,
    nu: float = 2.0,
    min_scale: float = 0.5,
    max_scale: float = 2.0,
    steps: int = STEPS,
) -> Iterator[Record]:
    """Step-Tuned SGD line by line, with a record of all quantities."""
    w, gamma, average = START, 1.0, np.zeros(ENDS[-1])
    negative = raised = lowered = 0
    for k in range(steps):
        g = gradient(w, k)
        w_half = w - a(k) * gamma * g
        g_half = gradient(w_half, k)
        dw, dg = w_half - w, g_half - g
        w = w_half - a(k) * gamma * g_half
        average = beta * average + (1 - beta) * dg
        corrected = average / (1 - beta ** (k + 1))
        curvature = corrected @ dw
        gamma = dw @ dw / curvature if curvature > 0 else nu
        negative += curvature <= 0
        raised += gamma < min_scale
        lowered += gamma > max_scale
        gamma = min(max(gamma, min_scale), max_scale)
        yield Record(
            w=w,
            size=np.linalg.norm(corrected) * np.linalg.norm(dw),
            difference=average,
            bb_count=k + 1,
            bb_step_size=gamma,
            bb_curvature=curvature,
            bb_gradient_norm=np.linalg.norm(g),
            bb_half_gradient_norm=np.linalg.norm(g_half),
            bb_nonpositive_curvature_count=negative,
            bb_min_scale_count=raised,
            bb_max_scale_count=lowered,
        )


# --- The library on the same problem -------------------------------------------------


derivative = jax.jit(jax.grad(loss))


def run(
    tx: optax.GradientTransformation, steps: int = STEPS, dtype: str = "float64"
) -> tuple[list[np.ndarray], list[optax.OptState]]:
    """Makes steps without jit: compiling about sixty chains would take longer."""
    tx = optax.with_extra_args_support(tx)
    params = {k: jnp.asarray(v, dtype) for k, v in unpack(START).items()}
    xs, ys = jnp.asarray(INPUTS, dtype), jnp.asarray(TARGETS, dtype)
    state, path, states = tx.init(params), [], []
    for k in range(steps):
        x, y = xs[k % BATCHES], ys[k % BATCHES]
        updates, state = tx.update(
            derivative(params, x, y),
            state,
            params,
            grad_fn=lambda p, _, x=x, y=y: derivative(p, x, y),
        )
        params = optax.apply_updates(params, updates)
        assert all(v.dtype == dtype for v in params.values())
        path.append(pack(params))
        states.append(state)
    return path, states


def assert_same_path(
    path: list[np.ndarray], expected: list[np.ndarray], tolerance: float = TOLERANCE
) -> None:
    """Compares positions, and the distances from the start, which both share."""
    for k, (ours, theirs) in enumerate(zip(path, expected, strict=True)):
        scale = min(np.linalg.norm(theirs), np.linalg.norm(theirs - START))
        error = np.linalg.norm(ours - theirs) / scale
        assert error < tolerance, f"relative error {error:.2e} after step {k}"


def fields(states: list[optax.OptState], name: str) -> np.ndarray:
    return np.asarray([optax.tree.get(state, name) for state in states])


# name: the transform of the library and the stage of the reference.
RANDOM, TRIANGLE = partial(optax_tricks.scale_by_random, 3), (0.25, 1.5, 4)
STAGES = {
    "gc": (optax_tricks.centralize, centralized),
    "conv-gc": (
        partial(optax_tricks.centralize, conv_only=True),
        partial(centralized, conv_only=True),
    ),
    "random": (RANDOM, randomly_scaled),
    "random-range": (
        partial(RANDOM, minval=0.5, maxval=2.5, probability=0.5),
        randomly_scaled,
    ),
    "cyclical": (
        lambda: optax.scale_by_schedule(optax_tricks.triangular_schedule(*TRIANGLE)),
        partial(triangle, *TRIANGLE),
    ),
    "pugd": (optax_tricks.perturbed_unit_step, perturbed_unit),
    "decay": (partial(optax.add_decayed_weights, DECAY), decayed),
    "momentum": (partial(optax.trace, 0.9), momentum),
    "adam": (optax.scale_by_adam, adam),
    "adagrad": (optax.scale_by_rss, adagrad),
}

# Chains in the order of application. Adam and Adagrad have smaller rates.
CHAINS = (
    # The base optimizers alone, which help to explain a failure below.
    "momentum",
    "adam",
    "adagrad",
    # Gradient centralization before the preconditioner and after it (`*_GCC2`).
    "gc",
    "conv-gc",
    "gc momentum",
    "momentum gc",
    "gc adam",
    "adam gc",
    "gc adagrad",
    "adagrad gc",
    "gc adam decay",
    "adam gc decay",
    # L2 before the projection, and decoupled decay after it.
    "decay gc",
    "decay gc momentum",
    "decay gc adam",
    "gc momentum decay",
    # Random gradient: decay and momentum come after it and are not scaled.
    "random",
    "random-range",
    "random momentum",
    "random decay momentum",
    "random momentum decay",
    "random adam",
    "random-range gc momentum",
    "cyclical momentum",
    # PUGD, with decay after the normalization and before momentum.
    "pugd",
    "pugd momentum",
    "pugd decay momentum",
    "pugd gc random momentum",
    # The probe uses the incoming gradient; the second gradient comes from grad_fn.
    "gc pugd",
)


def rate_of(chain: str) -> float:
    return 0.01 if "ada" in chain else LR


def chained(chain: str) -> optax.GradientTransformation:
    transforms = [STAGES[name][0]() for name in chain.split()]
    return optax.chain(*transforms, optax.scale_by_learning_rate(rate_of(chain)))


# Whole optimizers, and the chain that each must equal.
OPTIMIZERS = {
    "gc, sgd": ("gc", lambda: optax.chain(optax_tricks.centralize(), optax.sgd(LR))),
    "gc, sgd momentum": (
        "gc momentum",
        lambda: optax.chain(optax_tricks.centralize(), optax.sgd(LR, 0.9)),
    ),
    "gc, adam": (
        "gc adam",
        lambda: optax.chain(optax_tricks.centralize(), optax.adam(0.01)),
    ),
    "gc, adagrad": (
        "gc adagrad",
        lambda: optax.chain(optax_tricks.centralize(), optax.adagrad(0.01)),
    ),
    "gc, adamw": (
        "gc adam decay",
        lambda: optax.chain(
            optax_tricks.centralize(), optax.adamw(0.01, weight_decay=DECAY)
        ),
    ),
    "random, sgd momentum": (
        "random momentum",
        lambda: optax.chain(RANDOM(), optax.sgd(LR, 0.9)),
    ),
    "pugd": ("pugd momentum", lambda: optax_tricks.pugd(LR)),
    "pugd without momentum": ("pugd", lambda: optax_tricks.pugd(LR, momentum=0.0)),
    "pugd with decay": (
        "pugd decay momentum",
        lambda: optax_tricks.pugd(LR, momentum=0.9, weight_decay=DECAY),
    ),
}


def compare(
    tx: optax.GradientTransformation,
    chain: str,
    steps: int = STEPS,
    dtype: str = "float64",
    tolerance: float = TOLERANCE,
) -> None:
    path, states = run(tx, steps, dtype)
    factors = np.ones(steps)
    if "random" in chain:
        factors = fields(states, "random_factor")
        assert factors.dtype == ("float64" if dtype == "float64" else "float32")
        assert len(set(factors.tolist())) > steps // 3
    stages = [STAGES[name][1]() for name in chain.split()]
    expected = list(descend(stages, rate_of(chain), factors.astype(float)))
    assert_same_path(path, [c.w for c in expected], tolerance)
    if "pugd" in chain:
        for ours, theirs in (
            ("pugd_perturbation_norm", "perturbation_norm"),
            ("pugd_gradient_norm", "norm"),
            ("pugd_perturbed_gradient_norm", "perturbed_norm"),
        ):
            values = [getattr(c, theirs) for c in expected]
            np.testing.assert_allclose(fields(states, ours), values, tolerance)
        assert not fields(states, "pugd_zero_count").any()


def test_the_hand_written_gradient_is_right(x64):
    rng = np.random.default_rng(1)
    for k in range(BATCHES):
        w = START + rng.normal(size=START.shape)
        params = jax.tree.map(jnp.asarray, unpack(w))
        g = derivative(params, jnp.asarray(INPUTS[k]), jnp.asarray(TARGETS[k]))
        np.testing.assert_allclose(pack(g), gradient(w, k), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chain", CHAINS)
def test_agrees_with_the_reference(chain, x64):
    compare(chained(chain), chain)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_agree_with_the_reference(name, x64):
    chain, make = OPTIMIZERS[name]
    compare(make(), chain)


# Rounding is 6e-8 a step, and Adam divides small gradients by small numbers.
@pytest.mark.parametrize(
    "chain", ["gc momentum", "adam gc", "random decay momentum", "pugd decay momentum"]
)
def test_agrees_with_the_reference_in_single_precision(chain):
    tolerance = 2e-4 if "adam" in chain else 1e-5
    compare(chained(chain), chain, 6, "float32", tolerance)


def test_the_reference_tells_near_relatives_apart(x64):
    """A comparison at 1e-6 is useful only if similar chains differ by far more."""
    for one, other in (
        ("decay gc", "gc decay"),
        ("decay gc momentum", "gc momentum decay"),
        ("gc adam", "adam gc"),
        ("gc", "conv-gc"),
        ("random decay momentum", "decay random momentum"),
        ("pugd decay momentum", "decay pugd momentum"),
    ):
        factors = [0.3, 0.9, 0.6]
        ends = [
            list(descend([STAGES[n][1]() for n in c.split()], rate_of(c), factors))[
                -1
            ].w
            for c in (one, other)
        ]
        error = np.linalg.norm(ends[0] - ends[1]) / np.linalg.norm(ends[1] - START)
        assert error > 1e-3, (one, other)


BB_COUNTS = (
    "bb_count",
    "bb_nonpositive_curvature_count",
    "bb_min_scale_count",
    "bb_max_scale_count",
)


def compare_step_tuned(
    tx: optax.GradientTransformation,
    expected: list[Record],
    dtype: str = "float64",
    tolerance: float = TOLERANCE,
) -> None:
    path, states = run(tx, len(expected), dtype)
    assert_same_path(path, [r.w for r in expected], tolerance)
    for name in BB_COUNTS:
        values = fields(states, name)
        assert values.dtype == np.int32
        assert values.tolist() == [getattr(r, name) for r in expected], name
    for name in ("bb_gradient_norm", "bb_half_gradient_norm"):
        values = [getattr(r, name) for r in expected]
        np.testing.assert_allclose(fields(states, name), values, tolerance)
    tolerance *= 2
    for state, r in zip(states, expected, strict=True):
        get = partial(optax.tree.get, state)
        # The inner product may cancel. So its error, and that of the scale, is relative
        # to the size of its factors.
        assert abs(get("bb_curvature") - r.bb_curvature) < tolerance * r.size
        error = abs(get("bb_step_size") / r.bb_step_size - 1)
        assert error < tolerance * r.size / abs(r.bb_curvature)
        error = np.linalg.norm(pack(get("bb_difference")) - r.difference)
        assert error < tolerance * np.linalg.norm(r.difference)


ALPHA = 0.5
STEP_TUNED = {
    "defaults": {},
    "narrow": {"min_scale": 0.9, "max_scale": 1.1},
    "no memory": {"beta": 0.0, "nu": 1.3},
    "nu clipped from above": {"beta": 0.5, "nu": 9.0},
    "nu clipped from below": {"beta": 0.5, "nu": 0.1},
}


def published(k: int, delta: float = 0.001) -> float:
    return ALPHA / (k + 1) ** (0.5 + delta)


@pytest.mark.parametrize("setting", STEP_TUNED)
def test_step_tuned_sgd_agrees_with_the_reference_in_every_branch(setting, x64):
    kwargs = STEP_TUNED[setting]
    expected = list(step_tuned(published, **kwargs))
    # Equal counters are evidence only if each guard has acted in some steps.
    for name in BB_COUNTS:
        assert getattr(expected[-1], name) > 0, name
    bounds = {"min_scale": 0.5, "max_scale": 2.0, "nu": 2.0} | kwargs
    assert any(r.bb_step_size not in bounds.values() for r in expected)
    assert expected[-1].bb_nonpositive_curvature_count < STEPS - 5
    compare_step_tuned(optax_tricks.step_tuned_sgd(ALPHA, **kwargs), expected)


def bb_chain(
    a: optax.ScalarOrSchedule, **kwargs: float
) -> optax.GradientTransformation:
    return optax.chain(
        optax_tricks.barzilai_borwein_step(a, **kwargs), optax.scale_by_learning_rate(a)
    )


def alternating(k: int) -> float:
    """A rate that changes fast, so that the k-th value differs from its neighbors."""
    return 0.1 + 0.2 * (k % 2)


# id: a factory of the library's optimizer and the reference's `a_k`.
RATES = {
    "delta": (
        lambda: optax_tricks.step_tuned_sgd(ALPHA, delta=0.25),
        partial(published, delta=0.25),
    ),
    "published": (lambda: bb_chain(published), published),
    "constant": (lambda: bb_chain(0.1), lambda k: 0.1),
    "cosine": (
        lambda: bb_chain(optax.cosine_decay_schedule(0.3, STEPS)),
        lambda k: 0.15 * (1 + np.cos(np.pi * k / STEPS)),
    ),
    "alternating": (lambda: bb_chain(alternating), alternating),
}


@pytest.mark.parametrize("rate", RATES)
def test_barzilai_borwein_step_agrees_with_the_reference(rate, x64):
    make, a = RATES[rate]
    compare_step_tuned(make(), list(step_tuned(a)))


@pytest.mark.parametrize("setting", ["defaults", "nu clipped from above"])
def test_step_tuned_sgd_agrees_in_single_precision(setting):
    # A difference of two gradients loses digits in float32.
    kwargs = STEP_TUNED[setting]
    expected = list(step_tuned(published, steps=6, **kwargs))
    tx = optax_tricks.step_tuned_sgd(ALPHA, **kwargs)
    compare_step_tuned(tx, expected, "float32", 1e-4)


# Names and layouts of Flax, unfolded to one column for each output unit.
FLAX = {
    "conv": {"kernel": (3, 3, 4, 6), "bias": (6,)},
    "conv_1d": {"kernel": (3, 4, 6), "bias": (6,)},
    "depthwise": {"kernel": (3, 3, 1, 8), "bias": (8,)},
    "norm": {"scale": (6,), "bias": (6,)},
    "embed": {"embedding": (7, 4)},
    "dense": {"kernel": (6, 5), "bias": (5,)},
    "single": {"kernel": (1, 5), "bias": (1, 5)},
}


@pytest.mark.parametrize("conv_only", [False, True])
def test_centralize_unfolds_flax_kernels(conv_only, x64):
    rng = np.random.default_rng(2)
    gs = {
        layer: {name: rng.normal(2.0, 1.0, shape) for name, shape in leaves.items()}
        for layer, leaves in FLAX.items()
    }
    tx = optax_tricks.centralize(conv_only=conv_only)
    params = jax.tree.map(jnp.asarray, gs)
    updates, _ = tx.update(params, tx.init(params), params)
    for layer, leaves in gs.items():
        for name, g in leaves.items():
            expected = g
            if name == "kernel" and layer != "single" and g.ndim >= 2 + 2 * conv_only:
                columns = g.reshape(-1, g.shape[-1])
                expected = (columns - columns.mean(0)).reshape(g.shape)
            np.testing.assert_allclose(updates[layer][name], expected, atol=1e-12)
