"""The README's examples run as they stand."""

import re
from pathlib import Path

import jax
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_two_examples_of_less_than_25_lines():
    assert len(EXAMPLES) == 2
    assert all(example.count("\n") < 25 for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=["library", "nnx"])
def test_example_runs(example, capsys):
    names = {}
    with jax.numpy_rank_promotion("allow"):  # as it is for the reader
        exec(example, names)
    if "print" in example:
        loss, factor = map(float, capsys.readouterr().out.split())
        assert loss < 0.7  # it was 1 at the start
        assert 0 <= factor < 1
    else:
        assert names["loss"].shape == ()
        mean = names["model_state"]["bn1"]["mean"]
        assert abs(mean).max() > 0  # the running statistics have moved
