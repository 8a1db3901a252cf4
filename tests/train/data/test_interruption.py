"""Killed at any point, run twice at once, on a full disk: complete, or not there."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.forked import processes
from tests.shared import disk_of
from train import data
from train.data.cache import write_arrays
from train.errors import UsageError
from train.progress import Reporter

NAME = "image_folder/noise"
SIZE = (200, 200)  # not the images' own, so that decoding takes its time
REPORTS_BETWEEN_POINTS = 40
LEAST_POINTS = 3


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


def run(work):
    """Does work in its own process."""
    process = processes.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0


# What changes files or folders, by its name among Python's audit events.
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def _work_until(work, data_dir, point):
    """Works until the given point, where the process kills itself.

    Points are the changes of files and folders below a folder, files opened for
    writing, and some of the reports of progress.
    """
    points, reports = itertools.count(1), itertools.count()
    advance = Reporter.advance

    def meet_point():
        if next(points) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, arguments):
        opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or opened) and data_dir in str(arguments[0]):
            meet_point()

    def counting_advance(reporter, steps=1):
        if next(reports) % REPORTS_BETWEEN_POINTS == 0:
            meet_point()
        advance(reporter, steps)

    Reporter.advance = counting_advance
    sys.addaudithook(watch)
    work()


def killed(work, data_dir, point):
    """Whether work in its own process is killed before its end."""
    arguments = (work, str(data_dir), point)
    process = processes.Process(target=_work_until, args=arguments)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def kill_at_every_point(work, data_dir, check):
    """Kills work at each of its points, and lets it end at last.

    Each time it goes on with what the last one left.

    Args:
      work: what the process does.
      data_dir: the folder of datasets that it changes.
      check: called after each kill.
    """
    point = 1
    while killed(work, data_dir, point):
        check()
        point += 1
    print(f"killed at {point - 1} points")
    assert point > LEAST_POINTS


@pytest.mark.slow
def test_preparing_is_killed(source, undisturbed, place):
    expected = content(undisturbed)
    found = []

    def check():
        found.append(content(place))
        if found[-1] is not None:
            shutil.rmtree(data.folder_of(NAME, place))

    kill_at_every_point(preparing(source, place), place, check)
    assert None in found
    assert set(found) <= {None, expected}
    assert content(place) == expected
    assert_nothing_is_left_over(place)


@pytest.mark.slow
def test_building_the_cache_is_killed(undisturbed, copied):
    expected = cached(undisturbed)
    assert len(expected) == 2
    work = loading(copied)().split("train").arrays
    lacking = 0

    def check():
        nonlocal lacking
        found = cached(copied)
        assert found.items() <= expected.items()
        lacking += len(found) < 2
        if len(found) == 2:
            shutil.rmtree(data.folder_of(NAME, copied) / "cache")

    kill_at_every_point(work, copied, check)
    assert lacking > 0
    arrays = work()
    assert arrays["image"].shape == (250, *SIZE, 3)
    assert cached(copied) == expected
    assert_nothing_is_left_over(copied)


@pytest.mark.slow
def test_measuring_is_killed(undisturbed, copied):
    expected = statistics(undisturbed)
    file = data.folder_of(NAME, copied) / "statistics.json"
    found = []

    def check():
        found.append(statistics(copied))
        file.unlink(missing_ok=True)

    kill_at_every_point(loading(copied), copied, check)
    assert None in found
    assert all(one in (None, expected) for one in found)
    assert statistics(copied) == expected
    assert_nothing_is_left_over(copied)


@pytest.mark.slow
def test_measuring_and_building_the_cache_at_once_is_killed(undisturbed, copied):
    files, measured = cached(undisturbed), statistics(undisturbed)
    work = loading(copied, **CACHE)
    folder = data.folder_of(NAME, copied)
    found = []

    def check():
        found.append(statistics(copied))
        assert cached(copied).items() <= files.items()
        # The next one is to have all the work before it again.
        for path in (*folder.glob("cache/*.npy"), folder / "statistics.json"):
            path.unlink(missing_ok=True)

    kill_at_every_point(work, copied, check)
    assert None in found
    assert all(one in (None, measured) for one in found)
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


# What a full disk refuses, by its name among Python's audit events.
GROWTH = {"os.mkdir", "os.rename"}


class _FullDisk:
    """Refuses all that needs room in a folder, from one of its events on.

    Events are folders made, files opened for writing, synced and renamed.
    """

    def __init__(self, folder):
        self._folder, self._left, self.events = str(folder), None, []
        sys.addaudithook(self._watch)
        fsync = os.fsync

        def refusing_fsync(descriptor):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self._meet("fsync", path)
            return fsync(descriptor)

        os.fsync = refusing_fsync

    @contextlib.contextmanager
    def after(self, events):
        """Within the block, the disk is full after some events."""
        self._left, self.events = events, []
        try:
            yield
        finally:
            self._left = None

    def _watch(self, event, arguments):
        opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in GROWTH or opened:
            self._meet(event, str(arguments[0]))

    def _meet(self, event, path):
        if self._left is None or not path.startswith(self._folder):
            return
        self.events.append(f"{event} {os.path.basename(path)}")
        self._left -= 1
        if self._left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def _sweep_full_disk(make_work, clear, outcome, place, log):
    """Does work on a disk that is full after 0, 1, 2, ... events, until it is not met.

    Each time, the work then goes on with room, and ends as if undisturbed.
    """
    disk = _FullDisk(place)
    clear(place)
    make_work(place)()
    expected = outcome(place)
    for room in itertools.count():
        clear(place)
        said = ""
        with disk.after(room):
            try:
                make_work(place)()
            except (UsageError, OSError) as error:
                said = str(error)
        events = disk.events
        assert "\n" not in said
        assert_nothing_is_left_over(place)
        assert outcome(place, partly=True).items() <= expected.items(), events
        make_work(place)()
        assert outcome(place) == expected, events
        if len(events) <= room:
            break
    log.write_text("\n".join(events))


def _clear_all(place):
    shutil.rmtree(place, ignore_errors=True)


def _clear_measured(place):
    folder = data.folder_of(NAME, place)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    (folder / "statistics.json").unlink(missing_ok=True)


def _prepared_content(place, partly=False):
    found = content(place)
    return {} if partly and found is None else {"content": found}


def _measured_content(place, partly=False):
    found = {name: file.hex() for name, file in cached(place).items()}
    measured = statistics(place)
    return found if partly and measured is None else found | {"statistics": measured}


@pytest.mark.slow
@pytest.mark.parametrize("file", ["noise.tar.gz", "tree"])
def test_a_disk_is_full_at_every_event_of_preparing(source, place, tmp_path, file):
    make = partial(preparing, source.with_name(file))
    log = tmp_path / "events.txt"
    run(partial(_sweep_full_disk, make, _clear_all, _prepared_content, place, log))
    events = log.read_text().splitlines()
    print(len(events), "events:", *events, sep="\n")
    assert any(event.startswith("os.rename") for event in events)
    assert sum(event.startswith("fsync") for event in events) >= 5
    assert len(events) >= 12


@pytest.mark.slow
def test_a_disk_is_full_at_every_event_of_measuring_and_caching(
    undisturbed, copied, tmp_path
):
    make = partial(loading, **CACHE)
    log = tmp_path / "events.txt"
    run(
        partial(_sweep_full_disk, make, _clear_measured, _measured_content, copied, log)
    )
    events = log.read_text().splitlines()
    print(len(events), "events:", *events, sep="\n")
    assert sum(event.startswith("os.rename") for event in events) == 3
    assert sum(event.startswith("fsync") for event in events) == 3


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 100, 4_000, 70_000, 500_000, 3_000_000])
def test_a_disk_is_full_after_some_bytes(source, undisturbed, place, size):
    work = preparing(source.with_name("tree"), place)
    with disk_of(size), contextlib.suppress(UsageError, OSError):
        work()
    assert content(place) in (None, content(undisturbed))
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
    def refuse(descriptor):
        raise OSError(number, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        dataset = loading(copied)()
    assert statistics(copied) is None
    assert_nothing_is_left_over(copied)
    assert dataset.mean == loading(undisturbed)().mean
    loading(copied)()
    assert statistics(copied) == statistics(undisturbed)
    assert_nothing_is_left_over(copied)
