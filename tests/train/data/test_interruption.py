"""Killed at any moment, run twice at once, on a full disk: whole, or not there."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.shared import disk_of
from train import data
from train.data.cache import write_arrays
from train.errors import UsageError
from train.progress import Reporter

NAME = "image_folder/noise"
SIZE = (200, 200)  # not the images' own, so that decoding takes its time
KILLS = 30

# Its processes start at once, with everything imported.
processes = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def _imported():
    processes.set_forkserver_preload(["train.data"])
    timed(partial(time.sleep, 0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A compressed archive of some hundred images."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for split, count in (("train", 250), ("test", 50)):
        for i in range(count):
            path = folder / "tree" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(path)
    return Path(shutil.make_archive(str(folder / "noise"), "gztar", folder / "tree"))


def preparing(source, data_dir):
    return partial(data.prepare, NAME, source=source, data_dir=data_dir)


def loading(data_dir, **options):
    return partial(data.load, NAME, size=SIZE, data_dir=data_dir, **options)


# Of the training split alone, as `undisturbed` has it.
CACHE = {"cache": [("train", SIZE)]}


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """A folder of datasets with this one, its statistics and its cache."""
    data_dir = tmp_path_factory.mktemp("undisturbed")
    preparing(source, data_dir)()
    loading(data_dir)().split("train").arrays()
    return data_dir


@pytest.fixture
def place(tmp_path):
    """An empty folder of datasets."""
    return tmp_path / "place"


@pytest.fixture
def copied(undisturbed, place):
    """A folder of datasets with this one, without statistics and cache."""
    ignored = shutil.ignore_patterns("cache", "statistics.json", ".*")
    shutil.copytree(undisturbed, place, ignore=ignored)
    return place


def content(data_dir):
    """A digest of all that is prepared, decoded; None if nothing is."""
    if data.folder_of(NAME, data_dir) is None:
        return None
    found = data.open_prepared(NAME, data_dir=data_dir)
    digest = hashlib.sha256()
    for split, examples in found.sources.items():
        digest.update(f"{split} {len(examples)}".encode())
        for record in examples.__getitems__(range(len(examples))):
            for field in found.fields(None).values():
                digest.update(field.read(record).tobytes())
    return digest.hexdigest()


def cached(data_dir):
    """Files of the cache, those that count as whole, by name."""
    folder = data.folder_of(NAME, data_dir) / "cache"
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def statistics(data_dir):
    """What the file of statistics says; None if there is none."""
    path = data.folder_of(NAME, data_dir) / "statistics.json"
    return json.loads(path.read_text()) if path.exists() else None


def assert_nothing_is_left_over(data_dir):
    names = [path.name for path in data_dir.rglob("*")]
    assert not [n for n in names if "incomplete" in n or n.endswith(".part")]


def timed(work):
    """Seconds that work takes in a process of its own."""
    process = processes.Process(target=work)
    start = time.monotonic()
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - start


def killed(work, seconds):
    """Whether work in a process of its own is killed before its end."""
    process = processes.Process(target=work)
    process.start()
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def kill_at_all_stages(work, duration, check):
    """Kills work at random moments of all its duration, each time where it was left.

    Args:
      work: what a process of its own does.
      duration: of it undisturbed, in seconds.
      check: called after each kill.
    """
    rng = random.Random(0)
    kills = 0
    while kills < KILLS:
        if killed(work, duration * (kills + rng.random()) / KILLS):
            kills += 1
        else:
            duration *= 0.9  # it is faster now than when it was measured
            assert duration > 0.01
        check()


@pytest.mark.slow
def test_preparing_is_killed(source, undisturbed, place, tmp_path):
    duration = timed(preparing(source, tmp_path / "measured"))
    expected = content(undisturbed)
    assert content(tmp_path / "measured") == expected
    found = []

    def check():
        found.append(content(place))
        if found[-1] is not None:
            shutil.rmtree(data.folder_of(NAME, place))

    kill_at_all_stages(preparing(source, place), duration, check)
    assert None in found
    assert set(found) <= {None, expected}
    timed(preparing(source, place))
    assert content(place) == expected
    assert_nothing_is_left_over(place)


@pytest.mark.slow
def test_building_the_cache_is_killed(undisturbed, copied, tmp_path):
    expected = cached(undisturbed)
    assert len(expected) == 2
    work = loading(copied)().split("train").arrays
    duration = timed(work)
    shutil.rmtree(data.folder_of(NAME, copied) / "cache")
    lacking = 0

    def check():
        nonlocal lacking
        found = cached(copied)
        assert found.items() <= expected.items()
        lacking += len(found) < 2
        if len(found) == 2:
            shutil.rmtree(data.folder_of(NAME, copied) / "cache")

    kill_at_all_stages(work, duration, check)
    assert lacking > 0
    arrays = work()
    assert arrays["image"].shape == (250, *SIZE, 3)
    assert cached(copied) == expected
    assert_nothing_is_left_over(copied)


@pytest.mark.slow
def test_measuring_is_killed(undisturbed, copied):
    expected = statistics(undisturbed)
    file = data.folder_of(NAME, copied) / "statistics.json"
    duration = timed(loading(copied))
    file.unlink()
    found = []

    def check():
        found.append(statistics(copied))
        file.unlink(missing_ok=True)

    kill_at_all_stages(loading(copied), duration, check)
    assert None in found
    assert all(one in (None, expected) for one in found)
    loading(copied)()
    assert statistics(copied) == expected
    assert_nothing_is_left_over(copied)


@pytest.mark.slow
def test_measuring_and_building_the_cache_at_once_is_killed(undisturbed, copied):
    files, measured = cached(undisturbed), statistics(undisturbed)
    work = loading(copied, **CACHE)
    folder = data.folder_of(NAME, copied)
    duration = timed(work)
    found = []

    def start_again():
        shutil.rmtree(folder / "cache", ignore_errors=True)
        (folder / "statistics.json").unlink(missing_ok=True)

    def check():
        found.append(statistics(copied))
        assert cached(copied).items() <= files.items()
        start_again()

    start_again()
    kill_at_all_stages(work, duration, check)
    assert None in found
    assert all(one in (None, measured) for one in found)
    work()
    assert (cached(copied), statistics(copied)) == (files, measured)
    assert_nothing_is_left_over(copied)


@contextlib.contextmanager
def ending_before_files_are_renamed():
    """As by a kill at the last moment."""

    def end(path, target):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", end)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_the_last_moment_before_statistics_are_there(undisturbed, copied):
    with ending_before_files_are_renamed():
        loading(copied)()
    assert statistics(copied) is None
    loading(copied)()
    assert statistics(copied) == statistics(undisturbed)
    assert_nothing_is_left_over(copied)


def test_the_last_moment_before_a_cache_is_there(undisturbed, copied):
    split = loading(copied)().split("train")
    with ending_before_files_are_renamed():
        split.arrays()
    assert cached(copied) == {}
    split.arrays()
    assert cached(copied) == cached(undisturbed)
    assert_nothing_is_left_over(copied)


def test_the_last_moment_before_statistics_and_cache_are_there(undisturbed, copied):
    work = loading(copied, **CACHE)
    with ending_before_files_are_renamed():
        work()
    assert (cached(copied), statistics(copied)) == ({}, None)
    work()
    assert cached(copied) == cached(undisturbed)
    assert statistics(copied) == statistics(undisturbed)
    assert_nothing_is_left_over(copied)


def at_once(work):
    """Does the same in three processes."""
    started = [processes.Process(target=work) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return {process.exitcode for process in started}


@pytest.mark.slow
def test_several_prepare_at_once(source, undisturbed, place):
    assert at_once(preparing(source, place)) == {0}
    assert content(place) == content(undisturbed)
    assert_nothing_is_left_over(place)


@pytest.mark.slow
def test_several_measure_and_build_a_cache_at_once(undisturbed, copied):
    assert at_once(loading(copied)) == {0}
    assert statistics(copied) == statistics(undisturbed)
    assert at_once(loading(copied)().split("train").arrays) == {0}
    assert cached(copied) == cached(undisturbed)
    assert_nothing_is_left_over(copied)


@pytest.mark.slow
def test_several_measure_and_build_a_cache_in_one_pass_at_once(undisturbed, copied):
    assert at_once(loading(copied, **CACHE)) == {0}
    assert statistics(copied) == statistics(undisturbed)
    assert cached(copied) == cached(undisturbed)
    assert_nothing_is_left_over(copied)


def test_a_cache_that_another_process_made_meanwhile_is_taken(tmp_path):
    def unread():
        pytest.fail("decoded again")
        yield

    path = tmp_path / "cache" / "image.npy"
    spec = {"image": ((2,), np.dtype(np.uint8))}
    batch = {"image": np.zeros((3, 2), np.uint8)}
    write_arrays({"image": path}, spec, 3, [batch], Reporter("", 3))
    write_arrays({"image": path}, spec, 3, unread(), Reporter("", 3))
    np.testing.assert_array_equal(np.load(path), batch["image"])


def test_what_a_killed_process_left_is_no_dataset_and_removed(
    source, undisturbed, place
):
    whole = data.folder_of(NAME, undisturbed)
    # Killed right before its folder is renamed; and one that a user put aside.
    for name in ("incomplete.ABCDEF_1.0.0", "1.0.0.old"):
        shutil.copytree(whole, place / NAME / name)
    assert data.folder_of(NAME, place) is None
    assert data.prepared(place) == []
    preparing(source, place)()
    assert content(place) == content(undisturbed)
    assert_nothing_is_left_over(place)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("noise.tar.gz", r"cannot unpack .*noise.tar.gz to .*make room or choose"),
        ("tree", r"cannot write image_folder to .*make room or choose another"),
    ],
    ids=["unpacking", "writing"],
)
def test_a_disk_is_full_while_preparing(source, undisturbed, place, file, message):
    work = preparing(source.with_name(file), place)
    with disk_of(1_000_000), pytest.raises(UsageError, match=message):
        work()
    assert content(place) is None
    assert_nothing_is_left_over(place)
    work()
    assert content(place) == content(undisturbed)


def test_a_disk_is_full_while_building_a_cache(undisturbed, copied):
    split = loading(copied)().split("train")
    with (
        disk_of(10_000_000),
        pytest.raises(UsageError, match=r"File too large.*make room, .*to .grain."),
    ):
        split.arrays()
    assert cached(copied) == {}
    split.arrays()
    assert cached(copied) == cached(undisturbed)
    assert_nothing_is_left_over(copied)


def test_a_disk_is_full_while_measuring_and_building_a_cache(undisturbed, copied):
    """Statistics are measured all the same; what the cache lacks, `arrays` tells."""
    work = loading(copied, **CACHE)
    with disk_of(10_000_000):
        dataset = work()
        assert cached(copied) == {}
        assert_nothing_is_left_over(copied)
        with pytest.raises(UsageError, match="cannot write decoded images"):
            dataset.split("train").arrays()
    assert statistics(copied) == statistics(undisturbed)
    dataset.split("train").arrays()
    assert cached(copied) == cached(undisturbed)


def test_no_cache_can_be_made_while_measuring(undisturbed, copied):
    (data.folder_of(NAME, copied) / "cache").touch()
    loading(copied, **CACHE)()
    assert statistics(copied) == statistics(undisturbed)


def test_a_cache_that_cannot_be_made_is_explained(copied):
    (data.folder_of(NAME, copied) / "cache").touch()
    with pytest.raises(UsageError, match=r"cannot write decoded images to .*cache"):
        loading(copied)().split("train").arrays()


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_statistics_need_no_place_to_write(undisturbed, copied, monkeypatch, number):
    def refuse(path, text):
        path.touch()
        raise OSError(number, "refused", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        dataset = loading(copied)()
    assert statistics(copied) is None
    assert dataset.mean == loading(undisturbed)().mean
    loading(copied)()
    assert statistics(copied) == statistics(undisturbed)
    assert_nothing_is_left_over(copied)
