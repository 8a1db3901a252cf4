"""The chain that a config describes does what optax and the papers say."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_tricks
from tests.train.optim.chains import (
    HEAD,
    KEY,
    PARAMS,
    SMALL,
    build,
    config,
    grad_fn,
    loss,
    run,
)
from train.errors import UsageError
from train.optim.config import OPTIMIZERS
from train.optim.optimizer import learning_rate
from train.optim.techniques import TECHNIQUES, TechniqueOptions

TWO_GRADIENTS = ("barzilai_borwein_step", "perturbed_unit_step", "sam")


def l2(optimizer):
    return optax.chain(optax.add_decayed_weights(0.1), optimizer)


ALIASES = {
    "sgd": ({}, l2(optax.sgd(0.01, momentum=0.9))),
    "sgd, plain": ({"momentum": 0.0}, l2(optax.sgd(0.01))),
    "sgd, nesterov": ({"nesterov": True}, l2(optax.sgd(0.01, 0.9, nesterov=True))),
    "sgdw": (
        {},
        optax.chain(
            optax.trace(0.9),
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(0.01),
        ),
    ),
    "adam": ({"momentum": 0.5, "b2": 0.9}, l2(optax.adam(0.01, b1=0.5, b2=0.9))),
    "adamw": (
        {"momentum": 0.5, "b2": 0.9},
        optax.adamw(0.01, b1=0.5, b2=0.9, weight_decay=0.1),
    ),
    "adagrad": ({}, l2(optax.adagrad(0.01))),
    "rmsprop": ({}, l2(optax.rmsprop(0.01))),
    "lamb": (
        {"momentum": 0.5, "b2": 0.9},
        optax.lamb(0.01, b1=0.5, b2=0.9, weight_decay=0.1),
    ),
    "muon": (
        {"momentum": 0.95, "b2": 0.9},
        optax.contrib.muon(0.01, weight_decay=0.1, adam_weight_decay=0.1, adam_b2=0.9),
    ),
}


def test_every_optimizer_has_an_alias_to_equal():
    assert {name.partition(",")[0] for name in ALIASES} == set(OPTIMIZERS)


@pytest.mark.parametrize("name", ALIASES)
def test_without_techniques_it_is_the_optimizer_of_optax(name):
    changes, alias = ALIASES[name]
    made = build(config(optimizer=name.partition(",")[0], **changes))

    def gradient(params, step):
        # Small, for eps to show, and another after every step, for b2 to.
        return jax.tree.map(lambda w: 1e-3 * jnp.sin(100 * w), params)

    # Of optax's Muon only what it says of matrices and vectors is taken over.
    params, _ = run(made, 4, gradient, HEAD)
    expected, _ = run(alias, 4, gradient, HEAD)
    moved, expected = (optax.tree.sub(p, HEAD) for p in (params, expected))
    chex.assert_trees_all_close(moved, expected, rtol=1e-3)


def test_muon_takes_kernels_as_matrices_from_inputs_to_outputs():
    settings = {"optimizer": "muon", "weight_decay": 0.0}
    params = PARAMS | {"embedding": jnp.linspace(0.0, 1.0, 6).reshape(2, 3)}
    moved, _ = run(build(config(**settings)), 2, params=params)

    conv = {"kernel": params["conv"]["kernel"].reshape(18, 2)}
    query = {"kernel": params["attention"]["query"]["kernel"].reshape(4, 6)}
    for flat, got in [
        (conv, moved["conv"]["kernel"]),
        (query, moved["attention"]["query"]["kernel"]),
    ]:
        expected, _ = run(optax.contrib.muon(0.01, beta=0.9), 2, params=flat)
        chex.assert_trees_all_close(
            got.reshape(flat["kernel"].shape), expected["kernel"], rtol=1e-5
        )

    others = {"bias": params["attention"]["query"]["bias"], "e": params["embedding"]}
    expected, _ = run(optax.nadamw(0.01, weight_decay=0.0), 2, params=others)
    got = {"bias": moved["attention"]["query"]["bias"], "e": moved["embedding"]}
    chex.assert_trees_all_close(got, expected, rtol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.slow
def test_every_technique_goes_with_every_optimizer(technique, optimizer):
    chosen = config(technique, optimizer=optimizer, clip_norm=10.0, decay_all=False)
    points = []

    def counted(params, step):
        points.append(step)
        return grad_fn(params, step)

    params, state = run(build(chosen), 2, counted, SMALL)
    scalars = [optax.tree.get(state, name) for name in chosen.logged]
    chex.assert_tree_all_finite((params, scalars))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, SMALL)
    # Traced once: the state of the first step has the form of the next.
    assert len(points) == chosen.gradients_per_step == 1 + (technique in TWO_GRADIENTS)
    for before, after in zip(*map(jax.tree.leaves, (SMALL, params)), strict=True):
        assert not np.array_equal(before, after)


@pytest.mark.parametrize(
    ("technique", "optimizer"),
    [
        *((technique, "sgd") for technique in TECHNIQUES),
        *(("sam", name) for name in OPTIMIZERS),
    ],
)
def test_zero_gradients_leave_the_parameters(technique, optimizer):
    chosen = config(technique, optimizer=optimizer, clip_norm=10.0, weight_decay=0.0)
    params, _ = run(build(chosen), 1, lambda w, step: optax.tree.sub(w, HEAD), HEAD)
    chex.assert_trees_all_equal(params, HEAD)


######## Places in the chain ##########################################################


def test_centralize_projects_the_decay_too():
    params, _ = run(build(config("centralize", momentum=0.0)), 3, params=HEAD)
    before, after = HEAD["kernel"].mean(0), params["kernel"].mean(0)
    chex.assert_trees_all_close(after, before, atol=1e-6)


def test_after_the_optimizer_the_direction_is_centralized():
    settings = {"optimizer": "adam", "weight_decay": 0.0}
    after, _ = run(build(config("optimizer", "centralize", **settings)), 3)
    before, _ = run(build(config("centralize", **settings)), 3)
    expected, _ = run(
        optax.chain(
            optax.scale_by_adam(), optax_tricks.centralize(), optax.scale(-0.01)
        ),
        3,
    )
    chex.assert_trees_all_close(after, expected, rtol=1e-6)
    assert not np.allclose(after["conv"]["kernel"], before["conv"]["kernel"])


def test_techniques_after_named_decoupled_decay_act_on_it():
    techniques = ("optimizer", "decay", "centralize")
    params, _ = run(build(config(*techniques, optimizer="adamw")), 3, params=HEAD)
    before, after = HEAD["kernel"].mean(0), params["kernel"].mean(0)
    chex.assert_trees_all_close(after, before, atol=1e-6)


def test_the_random_factor_leaves_the_decay_alone():
    tx = build(config("scale_by_random", momentum=0.0))
    updates, state = tx.update(grad_fn(HEAD, 0), tx.init(HEAD), HEAD)
    factor = optax.tree.get(state, "random_factor")
    expected = jax.tree.map(
        lambda g, w: -0.01 * (factor * g + 0.1 * w), grad_fn(HEAD, 0), HEAD
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_the_random_factor_takes_its_limits_and_probability():
    settings = {"minval": 2.0, "maxval": 2.0, "probability": 0.5}
    tx = build(config("scale_by_random", **settings))
    state, factors = tx.init(HEAD), set()
    for _ in range(20):
        _, state = tx.update(HEAD, state, HEAD)
        factors.add(float(optax.tree.get(state, "random_factor")))
    assert factors == {1.0, 2.0}


def test_conv_only_centralizes_convolutions_only():
    tx = build(config("centralize", conv_only=True, momentum=0.0))
    expected = optax.chain(
        optax.add_decayed_weights(0.1),
        optax_tricks.centralize(conv_only=True),
        optax.sgd(0.01),
    )
    chex.assert_trees_all_close(run(tx, 2)[0], run(expected, 2)[0], rtol=1e-6)


def test_perturbed_unit_step_is_pugd():
    params, _ = run(build(config("perturbed_unit_step")), 4)
    expected, _ = run(optax_tricks.pugd(0.01, weight_decay=0.1), 4)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


def test_barzilai_borwein_step_is_step_tuned_sgd_on_the_regularized_loss():
    settings = {"momentum": 0.0, "schedule": "robbins_monro"}
    params, _ = run(build(config("barzilai_borwein_step", **settings)), 4)

    def regularized(params, step):
        return jax.grad(lambda p: loss(p) + 0.05 * optax.tree.norm(p, squared=True))(
            params
        )

    expected, _ = run(optax_tricks.step_tuned_sgd(0.01), 4, regularized)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)


def test_sam_is_that_of_its_paper(x64):
    rho, rate, momentum, decay = 0.05, 0.01, 0.9, 0.1

    def gradient(w):
        return np.cos(w) + w**2 / 3

    w = np.array([1.0, -2.0, 3.0, 0.5])
    trace, start = np.zeros(4), w
    for _ in range(4):
        g = gradient(w)
        trace = momentum * trace + gradient(w + rho * g / np.linalg.norm(g)) + decay * w
        w = w - rate * trace
    params, _ = run(build(config("sam", rho=rho)), 4, params=jnp.asarray(start))
    np.testing.assert_allclose(params, w, rtol=1e-12)


def test_sam_can_move_arrays_of_fewer_than_two_dimensions_alone(x64):
    rho, rate = 0.5, 0.1
    start = {
        "kernel": np.array([[1.0, -2.0], [3.0, 0.5]]),
        "scale": np.array([0.5, -1.0, 2.0]),
        "bias": np.array([1.0]),
        "gain": np.array(0.25),
    }

    def product(w):  # so that every gradient depends on all arrays
        return w["kernel"].sum() * w["scale"].sum() * w["bias"].sum() * w["gain"]

    def gradient(w):
        return {name: np.full(w[name].shape, product(w) / w[name].sum()) for name in w}

    g = gradient(start)
    length = np.sqrt(sum((g[name] ** 2).sum() for name in ("scale", "bias", "gain")))
    moved = {
        name: w if name == "kernel" else w + rho * g[name] / length
        for name, w in start.items()
    }
    chosen = config(
        *("sam",),
        **{"rho": rho, "norms_only": True, "learning_rate": rate},
        **{"momentum": 0.0, "weight_decay": 0.0},
    )
    params, _ = run(
        build(chosen),
        1,
        lambda params, step: jax.grad(product)(params),
        params=jax.tree.map(jnp.asarray, start),
    )
    for name, second in gradient(moved).items():
        expected = start[name] - rate * second
        np.testing.assert_allclose(params[name], expected, rtol=1e-12)


def test_sam_that_moves_no_kernel_takes_the_gradient_if_there_are_only_kernels():
    kernel = PARAMS["conv"]
    params, _ = run(build(config("sam", norms_only=True)), 2, params=kernel)
    expected, _ = run(build(config()), 2, params=kernel)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


def factors(name, steps, gradients):
    """The factors of a technique on each element of the gradients, by step."""
    tx = TECHNIQUES[name].build(TechniqueOptions(), optax.constant_schedule(1.0), KEY)

    def step(state, _):
        updates, state = tx.update(gradients, state, gradients)
        return state, jax.tree.map(lambda u, g: u / g, updates, gradients)

    return jax.lax.scan(step, tx.init(gradients), length=steps)[1]


def test_each_array_has_a_random_factor_of_its_own():
    gradients = {"a": jnp.full((2, 3), 2.0), "b": {"c": jnp.array([1.0, -4.0])}}
    a, c = map(
        np.asarray, jax.tree.leaves(factors("scale_each_by_random", 2000, gradients))
    )
    for found in (a.reshape(2000, -1), c):
        np.testing.assert_allclose(found, found[:, :1] * np.ones_like(found), rtol=1e-6)
        assert 0 <= found.min() < 0.01
        assert 0.99 < found.max() < 1
        # The standard error of the mean is 0.0065.
        np.testing.assert_allclose(found[:, 0].mean(), 0.5, atol=0.03)
        assert len(np.unique(found[:, 0])) > 1990
    # The arrays are independent, and so are the steps of each.
    a, c = a[:, 0, 0], c[:, 0]
    for one, other in ((a, c), (a[1:], a[:-1]), (c[1:], c[:-1]), (a[1:], c[:-1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def test_a_random_factor_keeps_the_dtype_and_what_is_no_array():
    gradients = {"a": jnp.ones(3, jnp.bfloat16), "b": None, "c": jnp.ones(2)}
    tx = build(config("scale_each_by_random", weight_decay=0.0))
    updates, _ = tx.update(gradients, tx.init(gradients), gradients)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, gradients)


def test_random_factors_do_not_delete_the_key_of_the_caller():
    """Both keep a key in their states, which a training step donates."""
    key = jax.random.key(1)
    tx = build(config("scale_by_random", "scale_each_by_random"), key=key)
    step = jax.jit(lambda state: tx.update(SMALL, state, SMALL)[1], donate_argnums=0)
    step(tx.init(SMALL))
    jax.random.uniform(key)


def test_a_triangle_rises_and_falls_in_ten_steps_each():
    found = factors("scale_by_triangle", 41, jnp.array([1.0, -3.0]))
    rise = np.arange(10) / 10
    wave = np.concatenate([rise, 1 - rise])
    expected = np.concatenate([wave, wave, [0.0]])
    np.testing.assert_allclose(found, np.stack([expected] * 2, axis=1), atol=1e-6)
    assert wave.mean() == pytest.approx(0.5)  # as that of Random Gradient


def test_equal_limits_fix_the_step_size_of_step_tuned_sgd():
    free, fixed = (
        config("barzilai_borwein_step", momentum=0.0, **limits)
        for limits in ({}, {"min_scale": 1.0, "max_scale": 1.0})
    )
    assert bb_step_sizes(fixed) == [1.0] * 6
    assert len(set(bb_step_sizes(free))) >= 3


def bb_step_sizes(config):
    return [
        float(optax.tree.get(run(build(config), steps)[1], "bb_step_size"))
        for steps in range(1, 7)
    ]


def test_clipping_comes_after_the_technique_that_replaces_the_gradient():
    norms = {}
    for techniques in [(), ("sam",)]:
        chosen = config(
            *techniques, clip_norm=0.5, rho=1.0, momentum=0.0, weight_decay=0.0
        )
        tx = build(chosen)
        updates, _ = tx.update(grad_fn(HEAD, 0), tx.init(HEAD), HEAD, grad_fn=grad_fn)
        norms[techniques] = optax.tree.norm(updates) / 0.01
    np.testing.assert_allclose(list(norms.values()), 0.5, rtol=1e-5)
    assert config("sam", "scale_by_random", clip_norm=1.0).chain[:3] == (
        "sam",
        "clip",
        "scale_by_random",
    )
    assert config("scale_by_random", clip_norm=1.0).chain[:2] == (
        "clip",
        "scale_by_random",
    )


@pytest.mark.parametrize("techniques", [(), ("barzilai_borwein_step",)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_biases_can_be_left_out_of_the_decay(optimizer, techniques):
    # One step, in which the loss, a sum over entries, ties no leaf to another.
    some, every, none = (
        run(build(config(*techniques, optimizer=optimizer, **changes)), 1)[0]
        for changes in ({"decay_all": False}, {}, {"weight_decay": 0.0})
    )
    for path, leaf in jax.tree.leaves_with_path(some):
        is_bias = path[-1].key == "bias"
        decayed, plain = (_at(path, tree) for tree in (every, none))
        np.testing.assert_allclose(leaf, plain if is_bias else decayed, rtol=1e-6)
        assert not np.allclose(leaf, decayed if is_bias else plain, rtol=1e-6)


def _at(path, tree):
    for key in path:
        tree = tree[key.key]
    return tree


######## The head #####################################################################


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_head_learns_at_its_own_rate(optimizer):
    chosen = config("sam", optimizer=optimizer, head_learning_rate=0.1)
    params, _ = run(build(chosen, head=("classifier.6",)), 1)
    slow, fast = (
        run(build(config("sam", optimizer=optimizer, learning_rate=rate)), 1)[0]
        for rate in (0.01, 0.1)
    )
    expected = slow | {"classifier": fast["classifier"]}
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


def test_a_head_of_similar_name_is_another():
    tx = build(config(head_learning_rate=0.1), head=("fc",))
    params = {"fc": jnp.ones(1), "fc2": {"bias": jnp.ones(1)}}
    with pytest.raises(ValueError, match=r"no parameters below 'fc' in \['fc', 'fc2"):
        tx.init(params)


def test_a_head_rate_needs_a_head():
    with pytest.raises(UsageError, match="needs a network whose last layer"):
        build(config(head_learning_rate=0.1))


######## The learning rate #############################################################

LENGTHS = {"total_steps": 100, "steps_per_epoch": 10}


@pytest.mark.parametrize(
    ("changes", "step", "expected"),
    [
        ({"schedule": "constant"}, 99, 0.01),
        ({"schedule": "step", "milestones": (5,)}, 50, 0.001),
        ({"schedule": "step", "milestones": (5,), "decay_factor": 0.5}, 50, 0.005),
        ({"schedule": "triangular", "half_period": 2.0}, 20, 0.01),
        ({"schedule": "triangular", "half_period": 4.0}, 20, 0.00625),
        ({"schedule": "constant", "warmup_epochs": 1.0}, 0, 0.01 / 11),
    ],
)
def test_the_learning_rate_takes_every_setting_and_scales_the_step(
    changes, step, expected
):
    chosen = config(momentum=0.0, weight_decay=0.0, **changes)
    assert learning_rate(chosen, **LENGTHS)(step) == pytest.approx(expected, rel=1e-5)
    tx = build(chosen)
    state = optax.tree.set(tx.init(HEAD), count=jnp.int32(step))
    updates, _ = tx.update(HEAD, state, HEAD)
    chex.assert_trees_all_close(
        updates, jax.tree.map(lambda w: -expected * w, HEAD), rtol=1e-5
    )


def test_a_warm_up_longer_than_the_run_is_refused():
    chosen = config(warmup_epochs=10.0)
    with pytest.raises(UsageError, match="warm-up of 10 epochs takes 100 of 100 steps"):
        build(chosen)
