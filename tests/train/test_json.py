"""Whatever JSON a run folder holds, it gives settings or one line of an error."""

import dataclasses
import functools
import json
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from train.errors import UsageError
from train.settings import from_json
from train.tasks import TASKS
from train.tasks.classification import ClassificationConfig
from train.tasks.recipes import RECIPES

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()  # json.loads reads NaN and Infinity
    | st.text(max_size=8)
    | st.sampled_from(["imagenet", "dataset", "none", "test", "digits", "\ud800", "\0"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def as_json(config):
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


CONFIGS = {
    **{name: task.config_type() for name, task in TASKS.items()},
    **{name: make() for name, make in RECIPES.items()},
    "fine-tuning": ClassificationConfig(
        weights=Path("w.safetensors"),
        freeze="backbone",
        norm="frozen_batch",
        normalization=((0.5,) * 3, (0.25,) * 3),
    ),
}


def places(content, path=()):
    """Returns the paths of all values."""
    inside = content.items() if isinstance(content, dict) else ()
    return [path, *(p for key, value in inside for p in places(value, (*path, key)))]


def is_config_or_one_line(kind, content):
    try:
        config = from_json(kind, content)
    except UsageError as error:
        message = str(error)
    else:
        message = "fine"
        assert isinstance(config, kind)
        assert from_json(kind, as_json(config)) == config
    assert message == message.strip() != ""
    assert len(message.splitlines()) == 1


@quick
@given(st.sampled_from(sorted(TASKS)), VALUES)
@example("classification", [])
@example("classification", None)
@example("translation", "text")
@example("segmentation", {"\ud800": "\ud800"})
def test_any_json(task, content):
    is_config_or_one_line(TASKS[task].config_type, content)


@quick
@given(st.sampled_from(sorted(CONFIGS)), st.data())
def test_a_config_with_changes(name, data):
    config = CONFIGS[name]
    content = as_json(config)
    for _ in range(data.draw(st.integers(1, 3))):
        *outer, last = data.draw(st.sampled_from(places(content)[1:]))
        parent = functools.reduce(lambda inside, key: inside[key], outer, content)
        change = data.draw(st.sampled_from(["replace", "remove", "rename", "add"]))
        if change in ("remove", "rename"):
            removed = parent.pop(last)
            if change == "rename":
                parent[data.draw(st.text(max_size=8))] = removed
        else:
            key = last if change == "replace" else data.draw(st.text(max_size=8))
            parent[key] = data.draw(VALUES)
        if len(places(content)) == 1:
            break
    is_config_or_one_line(type(config), content)
