"""What pages tell users of pip runs with the built wheel, without the checkout."""

import json
import re
from itertools import takewhile
from pathlib import Path

import pytest

from tests.wheel_environment import CHECKOUT, Environment, imports

ROOT = Path(__file__).parents[1]


def blocks_for_pip(page: Path) -> list[str]:
    """Returns the Python blocks of a page before the first that needs the checkout."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return list(takewhile(lambda block: not imports(block) & CHECKOUT, blocks))


PAGES = {
    path.relative_to(ROOT).as_posix(): blocks
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if (blocks := blocks_for_pip(path))
}

RUN_PAGES = """
import contextlib, io, json, traceback
import jax

jax.config.update("jax_num_cpu_devices", 8)  # for the page about sharding
results = {}
for page, blocks in json.load(sys.stdin).items():
    printed, names, error = io.StringIO(), {}, None
    try:
        with contextlib.redirect_stdout(printed):
            for block in blocks:
                exec(block, names)
    except Exception:
        error = traceback.format_exc()
    results[page] = printed.getvalue(), error
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory, wheel):
    """What `pip install optax_tricks` brings."""
    return Environment(tmp_path_factory.mktemp("plain"), wheel)


def test_every_guide_is_for_users_of_pip():
    guides = {path.relative_to(ROOT) for path in (ROOT / "docs/guides").glob("*.md")}
    assert guides
    assert {guide.as_posix() for guide in guides} <= PAGES.keys()
    assert {"README.md", "docs/index.md"} <= PAGES.keys()


@pytest.mark.slow
def test_blocks_of_pages_run(with_extras):
    results = json.loads(with_extras.run(RUN_PAGES, json.dumps(PAGES)))
    assert results.keys() == PAGES.keys()
    errors = [f"{page}: {error}" for page, (_, error) in results.items() if error]
    assert not errors, "\n".join(errors)
    for page, (printed, _) in results.items():
        # A comment says what a comparison prints.
        said = re.findall(
            r"^print\(.*  # (True|False)\b", "".join(PAGES[page]), flags=re.MULTILINE
        )
        found = [word for word in printed.split() if word in ("True", "False")]
        assert found == said, page


def test_the_readme_needs_no_extra_and_learns(plain):
    (example,) = PAGES["README.md"]
    loss, factor = map(float, plain.run(example).split())
    assert loss < 0.7  # it was 1 at the start
    assert 0 <= factor < 1


def test_the_library_alone_does_not_import_flax(with_extras):
    code = "print('flax' in sys.modules); import flax"
    assert with_extras.run(code).split() == ["False"]


def test_nnx_without_flax_says_what_to_install(plain):
    result = plain.try_to_run("import optax_tricks.nnx")
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: optax_tricks.nnx needs Flax")
    assert "pip install 'optax_tricks[nnx]'" in message
