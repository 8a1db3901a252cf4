"""Bad input raises an error that says what was given and what is allowed."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_tricks

NAN, INF = float("nan"), float("inf")
PARAMS = {"w": jnp.array([0.5, -1.5]), "b": jnp.array(1.0)}
RANDOM = (optax_tricks.scale_by_random, {"key": 0})
BB = (optax_tricks.barzilai_borwein_step, {"learning_rate": 0.1})
UNIT = (optax_tricks.perturbed_unit_step, {})
TUNED = (optax_tricks.step_tuned_sgd, {"learning_rate": 0.1})
PUGD = (optax_tricks.pugd, {"learning_rate": 0.1})
WAVE = (optax_tricks.triangular_schedule, {"low": 0.0, "high": 1.0, "half_period": 2})

# Factory, its arguments, one more argument, its range, bad values and good values.
RANGES = [
    (*RANDOM, "probability", "[0, 1]", [-0.1, 1.1, NAN], [0, 0.5, 1]),
    (*BB, "learning_rate", "[0, inf)", [-0.1, INF, NAN], [0, 10]),
    (*BB, "beta", "[0, 1)", [-0.1, 1, 1.5, NAN], [0, 0.9]),
    (*BB, "nu", "(0, inf)", [0, -1, INF, NAN], [0.1, 2]),
    (*BB, "min_scale", "(0, inf)", [0, -0.5, INF, NAN], [0.1, 2]),
    (*UNIT, "eps", "[0, inf)", [-1e-12, INF, NAN], [0, 1]),
    (*TUNED, "learning_rate", "[0, inf)", [-0.1, INF, NAN], [0, 10]),
    (*TUNED, "delta", "[0, 0.5]", [-0.1, 0.6, NAN], [0, 0.5]),
    (*TUNED, "beta", "[0, 1)", [-0.1, 1, NAN], [0, 0.9]),
    (*TUNED, "nu", "(0, inf)", [0, -1, INF, NAN], [0.1, 2]),
    (*TUNED, "min_scale", "(0, inf)", [0, -0.5, INF, NAN], [0.1, 2]),
    (*PUGD, "learning_rate", "[0, inf)", [-0.1, INF, NAN], [0, 10]),
    (*PUGD, "momentum", "[0, 1)", [-0.1, 1, NAN], [0, 0.9]),
    (*PUGD, "weight_decay", "[0, inf)", [-0.1, INF, NAN], [0, 5e-4]),
    (*BB, "max_scale", "(0, inf)", [INF], [3]),
    (*WAVE, "low", "(-inf, inf)", [-INF], [0, -3]),
    (*WAVE, "high", "(-inf, inf)", [INF], [1, 2]),
    (*WAVE, "half_period", "(0, 1e9]", [0, -2, 10**10, INF, NAN], [1, 2.5, 10**9]),
]
# Factory, its arguments, a lower and an upper limit in the wrong order.
ORDERS = [
    (*RANDOM, {"minval": 0.75}, {"maxval": 0.5}),
    (*RANDOM, {"minval": 0.75}, {"maxval": NAN}),
    (*RANDOM, {"minval": NAN}, {"maxval": 0.5}),
    (*BB, {"min_scale": 3.0}, {"max_scale": 2.5}),
    (*BB, {"min_scale": 3.0}, {"max_scale": NAN}),
    (*TUNED, {"min_scale": 3.0}, {"max_scale": 2.5}),
    (*WAVE, {"low": 0.75}, {"high": 0.5}),
    (*WAVE, {"low": NAN}, {"high": 0.5}),
]
NUMBERS = {"python": float, "float64": np.float64, "float32": np.float32, "int": int}

Factory = Callable[..., Any]
Kwargs = dict[str, Any]


def grad_fn(params: Any, step: int) -> Any:
    del step
    return jax.tree.map(jnp.sin, params)


def use(factory: Factory, kwargs: Kwargs) -> Any:
    """Builds a transform or schedule and calls it."""
    made = factory(**kwargs)
    if factory is optax_tricks.triangular_schedule:
        return made(3)
    return made.update(PARAMS, made.init(PARAMS), PARAMS, grad_fn=grad_fn)


# Factory, its arguments, and numbers that float32 rounds to something else.
BEYOND_SINGLE = [
    (*RANDOM, {"maxval": 1e39}, "inf"),
    (*RANDOM, {"minval": -1e39}, "-inf"),
    (*RANDOM, {"minval": -3e38, "maxval": 3e38}, "inf"),
    (*RANDOM, {"minval": 1e-46}, "0"),
    (*RANDOM, {"probability": 1e-40}, "0"),
    *(
        (*row, change, shown)
        for row in (BB, TUNED)
        for change, shown in [
            ({"learning_rate": 1e39}, "inf"),
            ({"learning_rate": 1e-39}, "0"),
            ({"beta": 0.99999999}, "1"),
            ({"beta": 1 - 2**-26}, "1"),
            ({"beta": 1e-50}, "0"),
            ({"nu": 1e40}, "inf"),
            ({"nu": 1e-40}, "0"),
            ({"min_scale": 1e-39}, "0"),
            ({"max_scale": 1e39}, "inf"),
        ]
    ),
    (*UNIT, {"eps": 1e-50}, "0"),
    (*UNIT, {"eps": 1e-39}, "0"),
    (*UNIT, {"eps": 1e300}, "inf"),
    (*TUNED, {"delta": 1e-45}, "0"),
    (*PUGD, {"learning_rate": 1e39}, "inf"),
    (*PUGD, {"momentum": 0.99999999}, "1"),
    (*PUGD, {"momentum": 1e-39}, "0"),
    (*PUGD, {"weight_decay": 1e-39}, "0"),
    (*PUGD, {"weight_decay": 1e39}, "inf"),
    (*WAVE, {"low": -1e39}, "-inf"),
    (*WAVE, {"high": 1e39}, "inf"),
    (*WAVE, {"half_period": 1e-39}, "0"),
]


# What is no number, and no array that may be a traced one.
NO_NUMBERS = ["0.1", None, [0.1], 0.1j, np.ones(2), jax.random.key(0), jnp.sin]


def cases(which: int) -> pytest.MarkDecorator:
    """Parametrizes by the bad (4) or good (5) values, as every type of number."""
    return pytest.mark.parametrize(
        ("factory", "kwargs", "name", "interval", "value"),
        [
            pytest.param(
                *case[:4],
                make(value),
                id=f"{case[0].__name__}-{case[2]}-{value}-{kind}",
            )
            for case in RANGES
            for value in case[which]
            for kind, make in NUMBERS.items()
            if kind != "int" or isinstance(value, int)
        ],
    )


@cases(4)
def test_numbers_outside_their_range_are_refused(
    factory: Factory, kwargs: Kwargs, name: str, interval: str, value: Any
) -> None:
    message = f"{name} must be in {interval}, got {value}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        factory(**{**kwargs, name: value})


@pytest.mark.parametrize(
    ("factory", "kwargs", "changes", "shown"),
    BEYOND_SINGLE,
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_numbers_that_float32_cannot_hold_are_refused(
    factory: Factory, kwargs: Kwargs, changes: Kwargs, shown: str
) -> None:
    value = re.escape(str(list(changes.values())[-1]))
    message = rf"must be in .*, got ({value}|6e\+38), which is {shown} in float32\.$"
    with pytest.raises(ValueError, match=message):
        factory(**{**kwargs, **changes})


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(
    ("factory", "kwargs", "name"),
    [*(case[:3] for case in RANGES), (*RANDOM, "minval"), (*RANDOM, "maxval")],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_what_is_no_number_is_refused(
    factory: Factory, kwargs: Kwargs, name: str, value: Any
) -> None:
    if callable(value) and name == "learning_rate":
        return  # a schedule
    with pytest.raises(ValueError, match=f"^{name} must be a number in .*, got "):
        factory(**{**kwargs, name: value})


@pytest.mark.parametrize("value", ["no", "", 2, 0.5, None, []], ids=repr)
def test_a_switch_is_true_or_false(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^centralize: conv_only must be True or F"):
        optax_tricks.centralize(conv_only=value)


def test_a_switch_may_come_from_numpy() -> None:
    optax_tricks.centralize(conv_only=np.bool_(True))  # type: ignore[arg-type]


@cases(5)
def test_numbers_up_to_the_ends_of_their_range_are_taken(
    factory: Factory, kwargs: Kwargs, name: str, interval: str, value: Any
) -> None:
    wide = {"max_scale": 10.0} if name == "min_scale" else {}
    factory(**{**kwargs, **wide, name: value})


@pytest.mark.parametrize("kind", ["python", "float64", "float32"])
@pytest.mark.parametrize(("factory", "kwargs", "low", "high"), ORDERS)
def test_limits_in_the_wrong_order_are_refused(
    factory: Factory, kwargs: Kwargs, low: Kwargs, high: Kwargs, kind: str
) -> None:
    ((low_name, low_value), (high_name, high_value)) = *low.items(), *high.items()
    make = NUMBERS[kind]
    message = (
        f"{low_name} must be at most {high_name}, got "
        f"{low_name}={low_value} and {high_name}={high_value}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        factory(**{**kwargs, low_name: make(low_value), high_name: make(high_value)})


@pytest.mark.parametrize(
    ("factory", "kwargs", "name"),
    [(*RANDOM, ("minval", "maxval")), (*BB, ("min_scale", "max_scale"))],
)
def test_equal_limits_are_taken(
    factory: Factory, kwargs: Kwargs, name: tuple[str, str]
) -> None:
    factory(**{**kwargs, **dict.fromkeys(name, 0.75)})


@pytest.mark.parametrize(
    ("factory", "kwargs", "changes"),
    [
        *((*case[:2], {case[2]: case[4][0]}) for case in RANGES),
        *((*case[:2], {**case[2], **case[3]}) for case in ORDERS),
    ],
)
def test_traced_numbers_are_not_looked_at(
    factory: Factory, kwargs: Kwargs, changes: Kwargs
) -> None:
    with pytest.raises(ValueError, match="must be"):
        use(factory, {**kwargs, **changes})
    traced = {name: np.float32(value) for name, value in changes.items()}
    jax.eval_shape(lambda values: use(factory, {**kwargs, **values}), traced)


# --- Leaves that are not floating-point -----------------------------------------------

OTHER_LEAVES = {
    "int32": jnp.ones(2, jnp.int32),
    "uint8": jnp.ones((3, 2), jnp.uint8),
    "bool": jnp.ones(2, bool),
    "key": jax.random.key(0),
    "legacy key": jax.random.PRNGKey(0),
    "float0": np.zeros(2, jax.dtypes.float0),
    "NumPy": np.arange(3),
    "number": 1,
    "float8": jnp.ones(2, jnp.float8_e4m3fn),
}


@pytest.mark.parametrize("leaf", OTHER_LEAVES.values(), ids=OTHER_LEAVES)
@pytest.mark.parametrize(
    ("factory", "kwargs"),
    [RANDOM, (optax_tricks.centralize, {}), BB, UNIT, TUNED, PUGD],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_leaves_that_are_not_floating_point_are_named(
    factory: Factory, kwargs: Kwargs, leaf: Any
) -> None:
    tx, tree = factory(**kwargs), {**PARAMS, "rngs": [{"count": leaf}]}
    with pytest.raises(ValueError, match="leaf 'rngs/0/count'") as error:
        tx.update(tree, tx.init(PARAMS), tree, grad_fn=lambda params, step: tree)
    assert f"has dtype {jnp.result_type(leaf)}. " in str(error.value)
    if factory in (f for f, _ in (BB, UNIT, TUNED, PUGD)):
        with pytest.raises(ValueError, match="leaf 'rngs/0/count'"):
            tx.init(tree)


@pytest.mark.parametrize(
    "leaf",
    ["batch", "float32", b"batch", object(), jnp.float32, jax.nn.relu],
    ids=["string", "name of a dtype", "bytes", "object", "dtype", "function"],
)
@pytest.mark.parametrize(
    ("factory", "kwargs"),
    [BB, UNIT, TUNED, PUGD],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_leaves_that_are_no_arrays_are_named(
    factory: Factory, kwargs: Kwargs, leaf: Any
) -> None:
    message = f"leaf 'layers/0' is of type {type(leaf).__name__}. Split such leaves off"
    with pytest.raises(ValueError, match=message):
        factory(**kwargs).init({**PARAMS, "layers": [leaf]})


# --- The second gradient --------------------------------------------------------------

two_gradients = pytest.mark.parametrize(
    ("factory", "kwargs"),
    [BB, UNIT, TUNED, PUGD],
    ids=lambda x: getattr(x, "__name__", ""),
)


@pytest.mark.parametrize(
    ("params", "extra", "missing"),
    [
        (None, {"grad_fn": grad_fn}, "params"),
        (PARAMS, {}, "grad_fn"),
        (PARAMS, {"grad_fn": None}, "grad_fn"),
        (None, {}, "params"),
    ],
    ids=["no-params", "no-grad_fn", "grad_fn-is-none", "neither"],
)
@two_gradients
def test_a_missing_argument_shows_the_call_to_write(
    factory: Factory, kwargs: Kwargs, params: Any, extra: Kwargs, missing: str
) -> None:
    tx = factory(**kwargs)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=f"got no {missing}") as error:
        tx.update(PARAMS, state, params, **extra)
    # The call in the message works.
    shown = re.search(
        r"Call (update\(.*?\)) with, for example, grad_fn = (lambda .*?)\. For",
        str(error.value),
    )
    assert shown
    assert "TrainState.apply_gradients does not pass it on" in str(error.value)
    assert str(error.value).endswith("/docs/faq.md#why-does-my-code-say-got-no-grad_fn")
    names = {
        "jax": jax,
        "loss": lambda params, batch: jnp.sum(params["w"] * batch) + params["b"],
        "batch": jnp.ones(2),
        "update": tx.update,
        "grads": PARAMS,
        "state": state,
        "params": PARAMS,
    }
    names["grad_fn"] = eval(shown[2], names)
    updates, _ = eval(shown[1], names)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


def boxed(params: Any) -> Any:
    return jax.tree.map(lambda x: [x], params)


@two_gradients
def test_a_second_gradient_in_another_tree_is_told_from_other_shapes(
    factory: Factory, kwargs: Kwargs
) -> None:
    tx = factory(**kwargs)
    message = r"shapes agree, .*: 'b/0' in place of 'b'\. .*batch_gradients.*guides/nnx"
    with pytest.raises(ValueError, match=message) as error:
        tx.update(
            PARAMS, tx.init(PARAMS), PARAMS, grad_fn=lambda params, step: boxed(params)
        )
    assert "PyTreeDef" not in str(error.value)
    with pytest.raises(ValueError, match=r"the containers differ\. For Flax NNX"):
        tx.update(
            [PARAMS], tx.init([PARAMS]), [PARAMS], grad_fn=lambda p, step: (p[0],)
        )


BAD_GRADIENTS = {
    "value-and-grad": lambda params: (jnp.float32(0.0), params),
    "gradient-and-auxiliary": lambda params: (params, {"logits": jnp.ones(3)}),
    "nothing": lambda params: None,
    "a-leaf-less": lambda params: {"w": params["w"]},
    "another-shape": lambda params: {**params, "w": jnp.ones(3)},
    "broadcastable": lambda params: {**params, "w": jnp.ones(1)},
    "stacked": lambda params: jax.tree.map(lambda x: jnp.stack([x, x]), params),
}


@pytest.mark.parametrize("output", BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
@two_gradients
def test_a_second_gradient_of_another_form_is_refused(
    factory: Factory, kwargs: Kwargs, output: Callable[[Any], Any]
) -> None:
    tx = factory(**kwargs)
    message = r"grad_fn must return a tree .* first gradient.*jax\.value_and_grad"
    with pytest.raises(ValueError, match=message):
        tx.update(
            PARAMS, tx.init(PARAMS), PARAMS, grad_fn=lambda params, step: output(params)
        )


# Functions that take other arguments than (params, step), for a batch in place of step.
OTHER_SIGNATURES = {
    "the batch is missing": lambda params: params,
    "the step is the batch": lambda params, batch: batch["inputs"],
    "two batches": lambda params, inputs, labels: params,
}


@pytest.mark.parametrize("bad", OTHER_SIGNATURES.values(), ids=OTHER_SIGNATURES)
@two_gradients
def test_an_error_in_grad_fn_comes_with_its_signature(
    factory: Factory, kwargs: Kwargs, bad: Callable[..., Any]
) -> None:
    tx = factory(**kwargs)
    with pytest.raises(TypeError) as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=bad)
    (note,) = error.value.__notes__
    assert "called grad_fn(params, 0), where 0 is a step number" in note
    assert note.endswith("docs/guides/jax.md#two-gradients-per-step")


def test_step_tuned_sgd_refuses_a_schedule_and_names_a_remedy_that_works() -> None:
    schedule = optax.cosine_decay_schedule(0.1, 10)
    with pytest.raises(ValueError, match="learning_rate must be a number") as error:
        optax_tricks.step_tuned_sgd(schedule)
    remedy = re.search(r"optax\.chain\(.*\)", str(error.value))
    assert remedy
    names = {**vars(optax_tricks), "optax": optax, "schedule": schedule}
    tx = eval(remedy[0], names)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=grad_fn)
    descends = jax.tree.map(lambda u, g: jnp.all(u * g < 0), updates, PARAMS)
    assert jax.tree.all(descends)
