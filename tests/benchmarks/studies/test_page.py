"""The page of a study: whole in itself, and safe to open."""

import base64
import re
from html.parser import HTMLParser

import pytest

from benchmarks.studies import page
from benchmarks.studies.methods import methods_of
from benchmarks.studies.results import summarize
from benchmarks.studies.tasks import STUDY_TASKS

DIGITS = STUDY_TASKS["classification"]
VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Fails if a tag is not closed, or if the page needs another file."""

    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href"):
                assert value.startswith("data:")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def rendered():
    scores = {
        "sgd": [0.90, 0.91, 0.92, 0.91],
        "sgd, 2x epochs": [0.93, 0.95, 0.96, 0.95],
        "perturbed_unit_step": [0.94, 0.945, 0.965, 0.95],
    }
    rows = [
        {
            "method": name,
            "seed": seed,
            "accuracy": value,
            "ms_per_step": 1.0,
            "gradient_evaluations": 60,
            "failure": None,
        }
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]
    methods = methods_of(DIGITS, ["perturbed_unit_step"])
    return page.render(
        title="Which technique helps on <b>mine</b> & $yours?",
        subtitle="3 methods",
        summaries=summarize(rows, methods, DIGITS),
        task=DIGITS,
        settings={"dataset": "image_folder/a<b"},
        about="about",
        times=[("sgd", "2 of 2", "10", "10", "< 1 s")],
        about_times="the target",
        figure=b"\x89PNG",
        environment={"jax": "1.2"},
        command="python -m benchmarks --dataset '</code>'",
    )


def test_the_page_is_whole(rendered):
    checker = Checker()
    checker.feed(rendered)
    assert checker.open == []
    texts = "".join(checker.texts)
    assert "on <b>mine</b> & $yours?" in texts
    assert "image_folder/a<b" in texts
    assert "--dataset '</code>'" in texts
    assert base64.b64encode(b"\x89PNG").decode() in rendered
    assert "prefers-color-scheme: dark" in rendered
    assert "width=device-width" in rendered


def test_a_technique_has_its_verdicts(rendered):
    (card,) = re.findall(r'<div class="card (\w+)"><h3>(.*?)</h3>', rendered)
    assert card == ("helps", "perturbed_unit_step")
    found = re.findall(r'<p class="(\w+)">At equal (\w+): <b>(.*?)</b>', rendered)
    assert found == [
        ("helps", "epochs", "helps"),
        ("none", "gradients", "no difference found"),
    ]
