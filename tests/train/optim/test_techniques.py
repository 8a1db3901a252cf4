"""The table of techniques agrees with the library, the README and the docs."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
import tyro

import optax_tricks
from tests.shared import squeezed
from tests.train.optim.chains import KEY, PARAMS, SMALL, build, config, grad_fn, run
from train.optim.techniques import TECHNIQUES, TechniqueOptions, markdown_table

ROOT = Path(__file__).parents[3]
ROWS = pytest.mark.parametrize("row", TECHNIQUES.values(), ids=TECHNIQUES)

# What is there to compare with.
OF_OPTAX = {
    *("sam", "scale_by_mean", "scale_each_by_random", "scale_by_triangle"),
    *("optax_centralize", "normalize"),
}
# Exports that are no technique: functions, and the types of the states.
FUNCTIONS = {"global_norms", "logged_scalars", "triangular_schedule"}
NO_TECHNIQUES = {
    *FUNCTIONS,
    "BarzilaiBorweinStepState",
    "PerturbedUnitStepState",
    "ScaleByRandomState",
}


def state_type(row):
    """Returns the type of a technique's state in the library, if it has one."""
    name = "".join(word.capitalize() for word in row.name.split("_"))
    return getattr(optax_tricks, f"{name}State", None)


def test_every_transform_of_the_library_is_in_the_table():
    names = [name for row in TECHNIQUES.values() for name in (row.name, *row.aliases)]
    assert len(set(names)) == len(names)
    assert {*names} - OF_OPTAX == {*optax_tricks.__all__} - NO_TECHNIQUES
    assert {*optax_tricks.__all__} >= NO_TECHNIQUES
    states = {state_type(row) for row in TECHNIQUES.values()} - {None}
    assert {state.__name__ for state in states} == NO_TECHNIQUES - FUNCTIONS


def test_rows_are_found_by_their_names():
    assert {name: row.name for name, row in TECHNIQUES.items()} == {
        name: name for name in TECHNIQUES
    }


def test_every_option_belongs_to_one_technique_and_says_so():
    options = [option for row in TECHNIQUES.values() for option in row.options]
    fields = [field.name for field in dataclasses.fields(TechniqueOptions)]
    assert sorted(options) == sorted(fields)


class Recorded:
    """Options that remember which of them were read."""

    def __init__(self):
        self.read = set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(TechniqueOptions(), name)


@ROWS
def test_a_technique_reads_the_options_that_it_names(row):
    options = Recorded()
    row.build(options, optax.constant_schedule(0.1), KEY)
    assert options.read == set(row.options)


@ROWS
def test_a_technique_is_a_transform_that_takes_as_many_gradients_as_stated(row):
    tx = row.build(TechniqueOptions(), optax.constant_schedule(0.1), KEY)
    points = []

    def counted(params, step):
        points.append(step)
        return grad_fn(params, step)

    updates, _ = tx.update(
        grad_fn(PARAMS, 0), tx.init(PARAMS), PARAMS, grad_fn=counted, value=0.0
    )
    assert 1 + len(points) == row.gradients_per_step
    assert config(row.name).gradients_per_step == row.gradients_per_step
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


@ROWS
@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_logged_scalars_are_in_the_state_of_the_chain(row, optimizer):
    chosen = config(row.name, optimizer=optimizer)
    tx = build(chosen)
    _, after = run(tx, 1, params=SMALL)
    assert chosen.logged == row.logged
    for state in (tx.init(SMALL), after):
        for name in row.logged:
            value = optax.tree.get(state, name)
            assert isinstance(value, jax.Array)
            assert value.shape == ()
            assert jnp.isfinite(value)


@ROWS
def test_all_scalars_that_a_technique_keeps_are_logged(row):
    if state_type(row) is None:
        assert row.logged == ()
        return
    tx = row.build(TechniqueOptions(), optax.constant_schedule(0.1), KEY)
    state = tx.init(PARAMS)
    assert isinstance(state, state_type(row))
    scalars = {
        name
        for name, value in state._asdict().items()
        if isinstance(value, jax.Array)
        and value.shape == ()
        and not jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
    }
    assert set(row.logged) == scalars


def test_no_two_techniques_log_the_same_name():
    logged = [name for row in TECHNIQUES.values() for name in row.logged]
    assert len(set(logged)) == len(logged)


######## What is written about them ###################################################


def test_the_table_has_a_line_for_each_paper():
    header, rule, *lines = markdown_table().splitlines()
    cells = [cell.strip() for cell in header.strip("|").split("|")]
    assert cells == ["Technique", "Transforms", "Idea", "Gradients per step"]
    assert set(rule) == set("|- ")
    rows = [row for row in TECHNIQUES.values() if row.name not in OF_OPTAX]
    for row, line in zip(rows, lines, strict=True):
        paper, transforms, idea, gradients = map(str.strip, line.strip("|").split("|"))
        assert paper == f"{row.title} ([{row.paper}]({row.url}))"
        assert transforms.split(", ") == [f"`{n}`" for n in (row.name, *row.aliases)]
        assert (idea, gradients) == (row.idea, str(row.gradients_per_step))


def test_the_readme_has_the_table_and_no_page_has_another():
    header = markdown_table().splitlines()[0]
    readme = (ROOT / "README.md").read_text()
    assert f"\n\n{markdown_table()}\n" in readme
    assert readme.count("| Technique |") == 1
    for page in (ROOT / "docs").rglob("*.md"):
        assert header not in page.read_text(), page


@ROWS
def test_papers_are_linked_and_ideas_are_one_line(row):
    assert row.url.startswith("https://arxiv.org/abs/")
    assert "\n" not in row.idea
    if row.name in optax_tricks.__all__:
        assert row.url.removeprefix("https://arxiv.org/abs/") in (
            getattr(optax_tricks, row.name).__doc__
        )


def test_help_says_which_technique_an_option_is_for(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(TechniqueOptions, args=["--help"])
    text = squeezed(capsys.readouterr().out)
    for row in TECHNIQUES.values():
        for option in row.options:
            flag = f"--{option.replace('_', '-')}"
            explanation = text.partition(flag)[2].partition("(default")[0]
            assert f"{row.name}:" in explanation, option
