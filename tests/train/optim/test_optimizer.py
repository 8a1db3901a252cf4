import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro

import optax_tricks
from train.errors import UsageError
from train.optim.optimizer import (
    OPTIMIZERS,
    SCHEDULES,
    TECHNIQUES,
    OptimizerConfig,
    make_optimizer,
    make_schedule,
    trick_scalars,
)

KEY = jax.random.key(0)
PARAMS = {
    "conv": {"kernel": jnp.linspace(-1.0, 2.0, 36).reshape(3, 3, 2, 2)},
    "attention": {
        "query": {
            "kernel": jnp.linspace(1.0, 3.0, 24).reshape(4, 2, 3),
            "bias": jnp.full((2, 3), 0.5, jnp.float32),
        }
    },
    "classifier": {
        6: {
            "kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]),
            "bias": jnp.array([1.0, 2.0]),
        }
    },
}
HEAD = PARAMS["classifier"][6]
SMALL = {"conv": PARAMS["conv"], "bias": HEAD["bias"]}
TWO_GRADIENTS = ("barzilai_borwein_step", "perturbed_unit_step", "sam")


def loss(params):
    return sum(jnp.sum(jnp.sin(w) + w**3 / 9) for w in jax.tree.leaves(params))


def grad_fn(params, step):
    return jax.grad(loss)(params)


def build(config, **changes):
    settings = {"total_steps": 100, "steps_per_epoch": 10, "key": KEY}
    return make_optimizer(config, **settings | changes)


def run(tx, steps, grad_fn=grad_fn, params=PARAMS):
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            grad_fn(params, 0), state, params, grad_fn=grad_fn, value=0.0
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def config(*tricks, **changes):
    settings = {"learning_rate": 0.01, "weight_decay": 0.1, "schedule": "constant"}
    return OptimizerConfig(techniques=tricks, **settings | changes)


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
def test_without_tricks_it_is_the_alias_of_optax(name):
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
@pytest.mark.parametrize("trick", TECHNIQUES)
def test_every_trick_goes_with_every_optimizer(trick, optimizer):
    chosen = config(trick, optimizer=optimizer, clip_norm=10.0, decay_all=False)
    points = []

    def counted(params, step):
        points.append(step)
        return grad_fn(params, step)

    params, state = run(build(chosen), 2, counted, SMALL)
    chex.assert_tree_all_finite((params, trick_scalars(state)))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, SMALL)
    # Traced once: the state of the first step has the form of the next.
    assert len(points) == chosen.gradients_per_step == 1 + (trick in TWO_GRADIENTS)
    for before, after in zip(*map(jax.tree.leaves, (SMALL, params)), strict=True):
        assert not np.array_equal(before, after)


@pytest.mark.parametrize(
    ("trick", "optimizer"),
    [
        *((trick, "sgd") for trick in TECHNIQUES),
        *(("sam", name) for name in OPTIMIZERS),
    ],
)
def test_zero_gradients_leave_the_parameters(trick, optimizer):
    chosen = config(trick, optimizer=optimizer, clip_norm=10.0, weight_decay=0.0)
    params, _ = run(build(chosen), 1, lambda w, step: optax.tree.sub(w, HEAD), HEAD)
    chex.assert_trees_all_equal(params, HEAD)


# --- Places in the chain --------------------------------------------------------------


@pytest.mark.parametrize(
    ("tricks", "optimizer", "expected"),
    [
        # What the papers have, without a word on places.
        ("", "sgd", "decay optimizer"),
        ("scale_by_random", "sgd", "random decay optimizer"),
        ("random centralize", "sgd", "random decay centralize optimizer"),
        ("perturbed_unit_step", "sgd", "perturbed_unit decay optimizer"),
        ("barzilai_borwein_step", "sgd", "barzilai_borwein optimizer"),
        ("centralize", "adamw", "centralize optimizer decay"),
        ("barzilai_borwein_step", "sgdw", "barzilai_borwein optimizer decay"),
        # The order given.
        ("centralize random", "sgd", "decay centralize random optimizer"),
        ("random decay centralize", "sgd", "random decay centralize optimizer"),
        ("centralize decay", "sgd", "centralize decay optimizer"),
        ("barzilai_borwein decay", "sgd", "barzilai_borwein decay optimizer"),
        ("optimizer centralize", "adam", "decay optimizer centralize"),
        ("random optimizer centralize", "adam", "random decay optimizer centralize"),
        ("optimizer centralize", "adamw", "optimizer centralize decay"),
        ("optimizer decay centralize", "adamw", "optimizer decay centralize"),
    ],
)
def test_order_of_the_chain(tricks, optimizer, expected):
    chosen = config(*tricks.split(), optimizer=optimizer)
    assert chosen.chain == tuple(expected.split())


def test_centralize_projects_the_decay_too():
    params, _ = run(build(config("centralize", momentum=0.0)), 3, params=HEAD)
    before, after = HEAD["kernel"].mean(0), params["kernel"].mean(0)
    chex.assert_trees_all_close(after, before, atol=1e-6)


def test_behind_the_optimizer_it_is_the_direction_that_is_centralized():
    settings = {"optimizer": "adam", "weight_decay": 0.0}
    behind, _ = run(build(config("optimizer", "centralize", **settings)), 3)
    before, _ = run(build(config("centralize", **settings)), 3)
    expected, _ = run(
        optax.chain(
            optax.scale_by_adam(), optax_tricks.centralize(), optax.scale(-0.01)
        ),
        3,
    )
    chex.assert_trees_all_close(behind, expected, rtol=1e-6)
    assert not np.allclose(behind["conv"]["kernel"], before["conv"]["kernel"])


def test_named_decoupled_decay_meets_the_members_behind_it():
    tricks = ("optimizer", "decay", "centralize")
    params, _ = run(build(config(*tricks, optimizer="adamw")), 3, params=HEAD)
    before, after = HEAD["kernel"].mean(0), params["kernel"].mean(0)
    chex.assert_trees_all_close(after, before, atol=1e-6)


def test_random_leaves_the_decay_alone():
    tx = build(config("scale_by_random", momentum=0.0))
    updates, state = tx.update(grad_fn(HEAD, 0), tx.init(HEAD), HEAD)
    factor = optax.tree.get(state, "random_factor")
    expected = jax.tree.map(
        lambda g, w: -0.01 * (factor * g + 0.1 * w), grad_fn(HEAD, 0), HEAD
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_random_takes_its_limits_and_probability():
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


def test_perturbed_unit_is_pugd():
    params, _ = run(build(config("perturbed_unit_step")), 4)
    expected, _ = run(optax_tricks.pugd(0.01, weight_decay=0.1), 4)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


def test_barzilai_borwein_is_step_tuned_sgd_on_the_regularised_loss():
    settings = {"momentum": 0.0, "schedule": "robbins_monro"}
    params, _ = run(build(config("barzilai_borwein_step", **settings)), 4)

    def regularised(params, step):
        return jax.grad(lambda p: loss(p) + 0.05 * optax.tree.norm(p, squared=True))(
            params
        )

    expected, _ = run(optax_tricks.step_tuned_sgd(0.01), 4, regularised)
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


def test_clip_acts_behind_the_trick_that_replaces_the_gradient():
    norms = {}
    for tricks in [(), ("sam",)]:
        chosen = config(*tricks, clip_norm=0.5, rho=1.0, momentum=0.0, weight_decay=0.0)
        tx = build(chosen)
        updates, _ = tx.update(grad_fn(HEAD, 0), tx.init(HEAD), HEAD, grad_fn=grad_fn)
        norms[tricks] = optax.tree.norm(updates) / 0.01
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


@pytest.mark.parametrize("tricks", [(), ("barzilai_borwein_step",)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_biases_can_be_left_out_of_the_decay(optimizer, tricks):
    # One step, in which the loss, a sum over entries, ties no leaf to another.
    some, every, none = (
        run(build(config(*tricks, optimizer=optimizer, **changes)), 1)[0]
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


# --- The head -------------------------------------------------------------------------


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


# --- Schedules ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2, 0.2, 0.2, 0.2]),
        ("step", [0.2, 0.2, 0.02, 0.002]),
        ("poly", [0.2, 0.2 * 0.51**0.9, 0.2 * 0.5**0.9, 0.2 * 0.01**0.9]),
        ("cosine", [0.2, 0.1 * (1 + np.cos(0.49 * np.pi)), 0.1, None]),
        ("linear", [0.2, 0.2, 0.2, 0.2 * 0.02]),
        ("one_cycle", [0.008, None, None, None]),
        ("triangular", [0.05, 0.05 + 0.15 * 0.9, 0.2, 0.2 - 0.15 * 0.9]),
        ("robbins_monro", [0.2, 0.2 * 50**-0.501, 0.2 * 51**-0.501, None]),
    ],
)
def test_schedules(schedule, expected):
    chosen = OptimizerConfig(
        learning_rate=0.2, schedule=schedule, milestones=(5, 9), half_period=1
    )
    # A triangle rises in the ten steps of an epoch.
    steps = [0, 9, 10, 19] if schedule == "triangular" else [0, 49, 50, 99]
    rate = make_schedule(chosen, 100, 10)
    for step, value in zip(steps, expected, strict=True):
        if value is not None:
            np.testing.assert_allclose(rate(step), value, rtol=1e-5)


def test_one_cycle_rises_to_the_learning_rate_and_falls_to_nothing():
    chosen = OptimizerConfig(learning_rate=0.2, schedule="one_cycle")
    rates = np.array([make_schedule(chosen, 100, 10)(step) for step in range(101)])
    assert rates.argmax() == 30
    np.testing.assert_allclose(rates[[30, 100]], [0.2, 0.2 / 25 / 1e4], rtol=1e-2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_goes_in_front_of_any_schedule(schedule):
    chosen = OptimizerConfig(
        learning_rate=0.2, schedule=schedule, milestones=(5,), warmup=1.5
    )
    rate = jax.jit(make_schedule(chosen, 100, 10))
    start = rate(15)
    np.testing.assert_allclose(
        [rate(step) for step in range(15)],
        start * np.arange(1, 16) / 16,
        rtol=1e-5,
    )
    if schedule in ("constant", "linear", "cosine", "poly", "step", "robbins_monro"):
        np.testing.assert_allclose(start, 0.2, rtol=1e-6)
    if schedule == "step":  # milestones are epochs of the run, warm-up included
        np.testing.assert_allclose([rate(49), rate(50)], [0.2, 0.02], rtol=1e-6)
    if schedule in ("linear", "cosine", "poly", "one_cycle"):  # ends with the run
        assert rate(100) < 1e-5


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UsageError, match="warm-up of 2 epochs takes 20 of 20 steps"):
        make_schedule(config(warmup=2.0), 20, 10)


# --- Settings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tricks": ("rndom",)}, "unknown trick 'rndom'; known: random"),
        (
            {"tricks": ("scale_by_random", "scale_by_random")},
            "named twice: random,random",
        ),
        ({"tricks": ("barzilai_borwein_step", "perturbed_unit_step")}, "take one"),
        ({"tricks": ("sam", "perturbed_unit_step")}, "take one"),
        (
            {"tricks": ("scale_by_random", "perturbed_unit_step", "centralize")},
            "put it first, perturbed_unit,random,centralize",
        ),
        ({"tricks": ("optimizer", "sam")}, "put it first, sam,optimizer"),
        (
            {"tricks": ("optimizer", "decay")},
            "in optimizer,decay: name it in front of `optimizer`, .* decoupled decay",
        ),
        (
            {"tricks": ("decay", "centralize"), "optimizer": "adamw"},
            "in decay,centralize,optimizer: name it behind `optimizer`, .* L2 decay",
        ),
        ({"optimizer": "adamn"}, "unknown optimizer 'adamn'; known: sgd, adam"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; known: constant"),
        ({"learning_rate": 0.0}, "above 0 and finite, got 0.0"),
        ({"learning_rate": float("nan")}, "above 0 and finite, got nan"),
        ({"learning_rate": float("inf")}, "above 0 and finite, got inf"),
        ({"momentum": 1.0}, r"\[0, 1\), got 1.0"),
        ({"b2": 1.0}, r"b2 must be in \[0, 1\), got 1.0"),
        ({"nesterov": True, "optimizer": "adam"}, "for sgd and sgdw, not adam"),
        ({"nesterov": True, "momentum": 0.0}, "momentum above 0, got 0"),
        ({"weight_decay": -1.0}, ">= 0 and finite, got -1.0"),
        ({"clip_norm": 0.0}, "clip norm must be above 0"),
        ({"warmup_epochs": -1.0}, ">= 0 and finite, got -1.0"),
        ({"schedule": "step"}, "needs milestones, such as"),
        ({"milestones": (60, 60)}, r"rise from 1 or more, got \(60, 60\)"),
        ({"milestones": (0,)}, r"rise from 1 or more, got \(0,\)"),
        ({"decay_factor": 0.0}, "decay factor must be above 0"),
        ({"half_period": 0.0}, "half period must be above 0"),
        ({"head_learning_rate": -0.1}, "head learning rate must be above 0"),
        (
            {"head_learning_rate": 0.1, "tricks": ("barzilai_borwein_step",)},
            "learning rate of 0.1: leave one of them out",
        ),
        ({"minval": 2.0}, "random low 2.0 is above random high 1.0: swap"),
        ({"maxval": float("nan")}, "random high must be finite, got nan"),
        ({"probability": 1.5}, r"in \[0, 1\], got 1.5"),
        ({"rho": 0.0}, "sam rho must be above 0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        OptimizerConfig(**changes)


def test_command_line():
    given = (
        "--optimizer adamw --techniques random,optimizer,centralize --milestones 60 120"
    )
    got = tyro.cli(OptimizerConfig, args=given.split())
    assert got == OptimizerConfig(
        optimizer="adamw",
        techniques=("scale_by_random", "optimizer", "centralize"),
        milestones=(60, 120),
    )


def test_every_setting_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(OptimizerConfig, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(OptimizerConfig):
        flag = f"--{field.name.replace('_', '-')}"
        assert flag in text
    assert "Chance of a step to be scaled by Random Gradient." in text


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize("trick", TECHNIQUES)
def test_scalars_to_log(trick, optimizer):
    _, state = run(build(config(trick, optimizer=optimizer)), 1, params=SMALL)
    scalars = trick_scalars(state)
    names = {
        "scale_by_random": {"random_factor"},
        "centralize": set(),
        "barzilai_borwein_step": {"bb_step_size", "bb_curvature", "bb_gradient_norm"},
        "perturbed_unit_step": {"pugd_gradient_norm", "pugd_perturbation_norm"},
        "sam": set(),
    }
    assert names[trick] <= scalars.keys()
    assert bool(names[trick]) == bool(scalars)
    assert all(value.shape == () for value in scalars.values())
