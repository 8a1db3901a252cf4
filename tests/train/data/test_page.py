"""The layouts that docs/data.md shows are prepared by the commands beside them."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train.data.__main__ as command_line
from train import data

PAGE = (Path(__file__).parents[3] / "docs/data.md").read_text()
LAYOUTS = re.findall(r"```text\n(.*?)```\n\n```sh\n(.*?)\n```", PAGE, re.DOTALL)


def test_every_builder_of_own_files_is_shown():
    shown = {command.split()[4].partition("/")[0] for _, command in LAYOUTS}
    own = {name for name, builder in data.BUILDERS.items() if builder.NEEDS_NAME}
    assert shown == own


@pytest.mark.parametrize(("files", "command"), LAYOUTS)
def test_a_layout_of_the_page_is_prepared(tmp_path, monkeypatch, files, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    for name in files.split():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = np.arange(24, dtype=np.uint8).reshape(4, 6) % 3
        image = Image.fromarray(mask)
        (image if "masks" in name else image.convert("RGB")).save(path)
    start, *arguments = command.split("train.data ")
    assert start == "python -m "
    monkeypatch.setattr(sys, "argv", ["train.data", *arguments[0].split()])
    command_line.main()
    (name,) = data.prepared()
    splits = data.load(name).splits
    examples = sum(map(len, splits.values()))
    pairs = "masks" in files or "/A/" in files
    assert examples == len(files.split()) // (2 if pairs else 1)
    assert set(splits) == {"train", "test"}
