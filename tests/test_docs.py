"""What the pages of docs/ say is what the catalogue and the committed rows say."""

import csv
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import models
import optax_tricks
import optax_tricks.nnx
from benchmarks import networks
from optax_tricks import _documentation
from tests.wheel_environment import CHECKOUT, imports

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/networks.md").read_text()
PAGES = {
    path.relative_to(ROOT / "docs").as_posix(): path.read_text()
    for path in sorted((ROOT / "docs").rglob("*.md"))
}
# Blocks of these pages need data that no test has, or more time than a fast test.
NEEDS_DATA = ("paired_images/maps",)
SLOW = ("training.md",)


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def catalogue(task):
    """The table of the networks for a task."""
    rows = []
    for name in models.names(task=task):
        entry = models.describe(name)
        authors, year, link = entry.paper.rsplit(", ", 2)
        rows.append(
            (
                f"`{name}`",
                entry.description,
                f"[{authors}, {year}]({link})",
                f"{entry.num_parameters:,}",
                "x".join(map(str, entry.input_shape)),
            )
        )
    return markdown(("name", "network", "paper", "parameters", "input"), rows)


def results(path):
    """The table of a benchmark's rows."""
    with path.open() as file:
        rows = [
            {key: number(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]
    assert [row["network"] for row in rows] == list(models.names())
    return markdown(networks.HEADER, [networks.cells(row) for row in rows])


def number(text):
    try:
        return float(text)
    except ValueError:
        return text or None


@pytest.mark.parametrize("task", ["classification", "segmentation", "translation"])
def test_the_tables_of_networks_are_the_catalogue(task):
    assert catalogue(task) in PAGE


def test_the_table_of_costs_is_that_of_the_committed_rows():
    assert results(ROOT / "benchmarks/results/networks_cpu.csv") in PAGE


def test_every_option_is_explained():
    options = {o for name in models.names() for o in models.describe(name).options}
    explained = set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE))
    assert options == explained - set(models.names())


def test_what_has_been_trained_is_that_of_the_committed_rows():
    page = (ROOT / "docs/training.md").read_text()
    commands = page.replace("\\\n    ", "")
    with (ROOT / "benchmarks/results/training_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    for row in rows:
        score, seconds = float(row["score"]), float(row["train_seconds"])
        time = f"{seconds:.0f} s" if seconds < 180 else f"{seconds / 60:.0f} min"
        line = (
            rf"\| .*{row['data']}.* \| `{row['network']}` "
            rf"\| {row['metric']} {score:.3f} \| .* "
            rf"\| {int(row['steps']):,} of {row['batch_size']} .* \| {time} \|"
        )
        assert re.search(line, page), line
        assert row["command"] in commands


def blocks(page):
    """The Python blocks of a page that needs the checkout, except those with data.

    Those of all other pages run with the wheel alone, in test_wheel.py.
    """
    found = re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL)
    if not any(imports(block) & CHECKOUT for block in found):
        return []
    return [block for block in found if not any(name in block for name in NEEDS_DATA)]


def marked(page):
    return pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if blocks(page)])
def test_python_blocks_run(page, tmp_path, monkeypatch, one_device):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(page):
        with jax.numpy_rank_promotion("allow"):  # as it is for the reader
            exec(block, names)
        if "expected" in names:
            assert names["logits"].shape == names["expected"]


DIFFERENCE = r"[+-][\d.]+ \[[^]]+\]"


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def measured(study, technique, equal):
    """The difference of a technique on the page of digits, or of all studies."""
    if study == "digits":
        row = rf"\| {technique} \| [^|]+ \| {equal} \| ({DIFFERENCE}) \|"
        return re.search(row, PAGES["digits.md"])[1]
    section = PAGES["studies.md"].split(f"\n## {study}\n")[1]
    row = re.search(rf"^\| {technique} \| .*$", section, flags=re.MULTILINE)[0]
    by_equal = dict(zip(("epochs", "gradients"), cells(row)[3:], strict=True))
    return re.search(DIFFERENCE, by_equal[equal])[0]


def test_the_numbers_of_the_choice_are_those_of_the_studies():
    choice, digits, studies = (
        " ".join(PAGES[name].split())
        for name in ("choose.md", "digits.md", "studies.md")
    )
    section = PAGES["choose.md"].split("## What we measured")[1]
    header, _, *rows = map(cells, re.findall(r"^\|.*\|$", section, flags=re.MULTILINE))
    studies_of_table = [re.match(r"\[(\w+)\]", column)[1] for column in header[2:]]
    shown = {
        (study, technique.strip("`"), equal): difference
        for technique, equal, *differences in rows
        for study, difference in zip(studies_of_table, differences, strict=True)
        if difference
    }
    assert shown == {key: measured(*key) for key in shown}
    in_prose = set(re.findall(DIFFERENCE, choice)) - set(shown.values())
    assert len(in_prose) >= 3
    assert all(f" {difference} |" in studies for difference in in_prose)
    tuned = re.findall(DIFFERENCE, PAGES["finetuning.md"])
    techniques = ("centralize", "perturbed_unit_step")
    assert tuned == [measured("fine_tuning", name, "epochs") for name in techniques]
    report = " ".join(PAGES["centralize_report.md"].split())
    on_digits, *of_axes, with_vit = re.findall(DIFFERENCE, report)
    for difference in (on_digits, with_vit):
        assert f"| centralize | optax_centralize | {difference} |" in studies
    assert of_axes == [
        measured(f"wrong_axis_{study}", name, "epochs")
        for study in ("cifar10", "vit", "digits")
        for name in ("centralize", "optax_centralize")
    ]
    sgd, twice = (
        float(re.search(rf"\| {name} \| 1 \| ([\d.]+)", digits)[1])
        for name in ("sgd", "sgd, 2x epochs")
    )
    pugd = re.search(r"\| perturbed_unit_step \| 2 \| [^|]+ \| \+([\d.]+) ", digits)[1]
    assert f"they gain {twice - sgd:.2f} points, and PUGD gains {pugd}." in choice


@pytest.mark.slow
def test_faults_are_counted():
    page = (ROOT / "docs/training.md").read_text()
    (said,) = re.findall(r"more than ([\d,]+) faults and unusual inputs", page)
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "faults"]
    listed = subprocess.run(
        [*command, "tests"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = sum("::" in line for line in listed.stdout.splitlines())
    assert 0 <= found - int(said.replace(",", "")) < 200


@pytest.mark.parametrize("module", [optax_tricks, optax_tricks.nnx], ids=str)
def test_every_public_name_is_in_the_reference(module):
    page = PAGES[f"api/{module.__name__.split('.')[-1]}.md"]
    listed = re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE)
    assert sorted(listed) == [f"{module.__name__}.{name}" for name in module.__all__]


def test_links_into_the_repository_and_between_pages_exist():
    for name, page in PAGES.items():
        links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page)
        for link in links:
            assert (ROOT / "docs" / name).parent.joinpath(link).exists(), (name, link)


def anchors(page):
    """The anchors of the headings of a page, on the site and on GitHub."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("package", ["optax_tricks", "models", "train", "benchmarks"])
def test_pages_that_messages_name_exist(package):
    sources = "".join(path.read_text() for path in (ROOT / package).rglob("*.py"))
    named = re.findall(r'\bsee\(\s*"([^"]+)"|\bdocs/([\w/]+\.md(?:#[\w-]+)?)', sources)
    assert named
    for page, anchor in ("".join(name).partition("#")[::2] for name in named):
        assert page in PAGES, page
        assert not anchor or anchor in anchors(PAGES[page]), (page, anchor)


def test_messages_of_the_library_name_pages_on_the_web():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = project["urls"]["Documentation"].replace("/tree/", "/blob/")
    assert _documentation.see("faq.md") == f" See {folder}/faq.md"


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    # No page asks another server for anything but what a reader clicks on.
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img)[^>]* src=\"?(http[^\" >]+)", page.read_text()
        )
        assert not loaded, (page, loaded)
