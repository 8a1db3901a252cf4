"""The folder of a run: who may use it, and what is written to it."""

import contextlib
import json
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train.output import run_folder
from train.output.run_folder import RunFolderError, open_run_folder

CONFIG = {
    "epochs": 3,
    "optimizer": {"techniques": ("scale_by_random",), "momentum": 0.9},
}


def open_folder(path, config=CONFIG, *, resume=True):
    return open_run_folder(path, "run", config, resume=resume)


def test_a_new_folder_is_named_by_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_folder(None) as first, open_folder(None) as second:
        first.start()
        assert first.path != second.path
        assert first.path.parent.name == "runs"
        assert first.path.name.startswith("run-")
    content = json.loads((first.path / "config.json").read_text())
    assert content["config"]["optimizer"] == {
        "techniques": ["scale_by_random"],
        "momentum": 0.9,
    }
    assert {"jax", "device", "commit"} <= content["environment"].keys()


def test_records_survive_a_half_written_line(tmp_path):
    with open_folder(tmp_path / "run") as folder:
        folder.append("rows.jsonl", {"a": 1})
        folder.append("rows.jsonl", {"a": 2})
        with (folder.path / "rows.jsonl").open("a") as file:
            file.write('{"a": 3, "b"')
        assert folder.read("rows.jsonl") == [{"a": 1}, {"a": 2}]
        folder.append("rows.jsonl", {"a": 4})
        assert folder.read("rows.jsonl") == [{"a": 1}, {"a": 2}, {"a": 4}]
        assert folder.read("absent.jsonl") == []


def test_a_run_of_the_same_config_is_continued_only_if_asked(tmp_path):
    with open_folder(tmp_path) as folder:
        folder.start()
    with open_folder(tmp_path):
        pass
    with (
        pytest.raises(RunFolderError, match="already holds this run"),
        open_folder(tmp_path, resume=False),
    ):
        pass


def test_another_config_is_refused_with_the_difference(tmp_path):
    with open_folder(tmp_path) as folder:
        folder.start()
    other = {"epochs": 3, "optimizer": {"techniques": (), "momentum": 0.9}}
    message = r"optimizer.techniques: \['scale_by_random'\] in the folder, now \[\]"
    with pytest.raises(RunFolderError, match=message), open_folder(tmp_path, other):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with (
        pytest.raises(RunFolderError, match="holds other files"),
        open_folder(tmp_path),
    ):
        pass


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_config_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with (
        pytest.raises(RunFolderError, match=r"config.json was not written by a run"),
        open_folder(tmp_path),
    ):
        pass


WHOLE = json.dumps({"config": {"epochs": 3}, "environment": {"jax": "1"}}).encode()


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_content_of_the_settings_is_taken_or_refused(tmp_path, data):
    changed = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place : place + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=3)
        )
    (tmp_path / "config.json").write_bytes(changed)
    with contextlib.suppress(RunFolderError), open_folder(tmp_path, {"epochs": 3}):
        assert json.loads(changed)["config"] == {"epochs": 3}


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"\xff", b"null", b'{"config": 1}']
)
def test_settings_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RunFolderError), open_folder(tmp_path):
        pass


def finished(folder):
    with open_folder(folder) as found:
        return found.is_finished()


def test_a_run_is_finished_while_all_its_results_are_there(tmp_path):
    with open_folder(tmp_path) as folder:
        folder.start()
        folder.append("metrics.jsonl", {"loss": 1})
        (tmp_path / "curves.png").write_bytes(b"drawn")
        assert not folder.is_finished()
        folder.finish({"loss": 1})
    assert finished(tmp_path)
    (tmp_path / "comparison.png").write_bytes(b"of the user")
    assert finished(tmp_path)
    summary = (tmp_path / "summary.json").read_bytes()
    for name in ("metrics.jsonl", "curves.png"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1])
        assert not finished(tmp_path)
        (tmp_path / name).unlink()
        assert not finished(tmp_path)
        (tmp_path / name).write_bytes(content)
        assert finished(tmp_path)
    for broken in (
        summary[:-9],
        b"",
        b"[]",
        b'{"files": {}}',
        b'{"files": 3}',
        b"\xff",
    ):
        (tmp_path / "summary.json").write_bytes(broken)
        assert not finished(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunFolderError, match=r"cannot write to .*choose another"),
        open_folder(tmp_path / "file" / "run"),
    ):
        pass


def test_two_processes_do_not_share_a_folder(tmp_path):
    with (
        open_folder(tmp_path),
        pytest.raises(RunFolderError, match="in use by another process"),
        open_folder(tmp_path),
    ):
        pass


def test_a_run_that_never_started_leaves_the_folder_free(tmp_path):
    with open_folder(tmp_path):
        pass  # such as with a config that does not fit the data
    with open_folder(tmp_path, {"epochs": 4}) as folder:
        folder.start()


def test_a_process_that_does_not_write_refuses_another_config_too(tmp_path):
    with open_run_folder(tmp_path, "run", {"epochs": 3}, resume=True) as folder:
        folder.start()
    settings = {"resume": True, "writes": False}
    with open_run_folder(tmp_path, "run", {"epochs": 3}, **settings) as folder:
        folder.append("rows.jsonl", {"a": 1})
    assert not (tmp_path / "rows.jsonl").exists()
    with (
        pytest.raises(RunFolderError, match="epochs: 3 in the folder, now 4"),
        open_run_folder(tmp_path, "run", {"epochs": 4}, **settings),
    ):
        pass


def test_a_commit_is_dirty_if_code_differs_and_not_if_results_do(tmp_path, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(("git", *who, *arguments), cwd=tmp_path, check=True)

    results, code = tmp_path / "benchmarks/results/rows.csv", tmp_path / "train/step.py"
    for path in (results, code):
        path.parent.mkdir(parents=True)
        path.write_text("old")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    monkeypatch.setattr(run_folder, "__file__", str(code))
    clean = run_folder.environment()["commit"]
    assert len(clean) == 12
    results.write_text("new")
    assert run_folder.environment()["commit"] == clean
    code.write_text("new")
    assert run_folder.environment()["commit"] == f"{clean}-dirty"
