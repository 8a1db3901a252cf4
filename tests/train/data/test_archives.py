"""Folders and archives: the same files from each, and nothing done that harms."""

import bz2
import gzip
import io
import lzma
import os
import random
import shutil
import stat
import struct
import tarfile
import zipfile

import pytest

from train.data.preparation import archives
from train.data.preparation.archives import SourceError, open_source
from train.errors import UsageError
from train.progress import silent

FILES = {
    "train/cat/1.jpg": b"one",
    "train/cat/2.jpg": b"two" * 500,
    "train/ünï code/3 4.jpg": b"",
    "labels.csv": b"a,b",
}
HIDDEN = (
    ".DS_Store",
    ".git/config",
    "train/cat/._1.jpg",
    "__MACOSX/train/cat/1.jpg",
    "train/Thumbs.db",
    "desktop.ini",
)
FOLDERS = {"train", "train/cat", "train/ünï code", "train/empty"}
KINDS = ("folder", "zip", "tar", "gztar", "bztar", "xztar")


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    for name, content in (FILES | dict.fromkeys(HIDDEN, b"hidden")).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "train" / "empty").mkdir()
    return folder


@pytest.fixture
def opened(tmp_path):
    """Opens a source in an empty scratch folder, which must stay empty."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def read_all(path):
        try:
            with open_source(path, scratch, silent) as source:
                contents = {name: source.read(name) for name in source.names}
                assert source.num_bytes == sum(map(len, contents.values()))
                return contents, source.folders
        finally:
            assert not list(scratch.iterdir())

    return read_all


def packed(folder, kind):
    if kind == "folder":
        return folder
    path = shutil.make_archive(str(folder.parent / "packed"), kind, folder)
    return type(folder)(path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_the_same(tree, opened, kind):
    contents, folders = opened(packed(tree, kind))
    assert contents == FILES
    assert list(contents) == sorted(FILES)
    assert folders == FOLDERS


def write_tar(path, *members, mode="w", **options):
    """A tar of (name, content, attributes of TarInfo)."""
    with tarfile.open(path, mode, **options) as archive:
        for name, content, attributes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_zip(path, *members):
    """A zip of (name, content, mode)."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content)
    return path


HARMFUL = [
    ("../outside", {}),
    ("train/../../outside", {}),
    ("/tmp/outside", {}),
    ("..\\outside", {}),
    ("train/link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    ("train/link", {"type": tarfile.SYMTYPE, "linkname": "cat"}),
    ("train/link", {"type": tarfile.LNKTYPE, "linkname": "train/cat/1.jpg"}),
    ("train/pipe", {"type": tarfile.FIFOTYPE}),
    ("train/device", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
    ("train/disk", {"type": tarfile.BLKTYPE}),
]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(("name", "attributes"), HARMFUL)
def test_a_tar_with_links_or_files_outside_is_refused(
    tmp_path, opened, name, attributes, mode
):
    good = ("train/cat/1.jpg", b"one", {})
    path = write_tar(tmp_path / "bad.tar", good, (name, b"", attributes), mode=mode)
    with pytest.raises(SourceError) as error:
        opened(path)
    assert f"{path} is refused: 1 of its members" in str(error.value)
    assert f"({name})" in str(error.value)
    assert "expected plain files and folders only" in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"bad.tar", "scratch"}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("../outside", 0o644),
        ("/tmp/outside", 0o644),
        ("..\\outside", 0o644),
        ("train\\..\\..\\outside", 0o644),
        ("train/link", stat.S_IFLNK | 0o777),
    ],
)
def test_a_zip_with_links_or_files_outside_is_refused(tmp_path, opened, name, mode):
    path = write_zip(tmp_path / "bad.zip", ("a.jpg", b"one", 0), (name, b"a.jpg", mode))
    with pytest.raises(SourceError, match="1 of its members are links or lie outside"):
        opened(path)
    assert {p.name for p in tmp_path.iterdir()} == {"bad.zip", "scratch"}


def test_the_first_of_many_refused_members_are_named(tmp_path, opened):
    members = [(f"../{i}", b"", {}) for i in range(9)]
    path = write_tar(tmp_path / "bad.tar", *members)
    with pytest.raises(SourceError, match=r"9 of .*\(../0, ../1, ../2, ...\)"):
        opened(path)


def test_an_encrypted_zip_is_refused(tmp_path, opened):
    path = write_zip(tmp_path / "secret.zip", ("a.jpg", b"one", 0))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"secret.zip is encrypted: decrypt it first"):
        opened(path)


def test_names_as_windows_and_tar_write_them(tmp_path, opened):
    contents = {"train/cat/1.jpg": b"one", "train/2.jpg": b"two"}
    folders = {"train", "train/cat"}
    names = [("train\\cat\\1.jpg", b"one"), ("./train/2.jpg", b"two"), ("train\\", b"")]
    zipped = write_zip(tmp_path / "a.zip", *((*pair, 0) for pair in names))
    assert opened(zipped) == (contents, folders)
    names = [("./train/cat/1.jpg", b"one"), ("train/2.jpg", b"two")]
    tarred = write_tar(tmp_path / "a.tar", *((*pair, {}) for pair in names))
    assert opened(tarred) == (contents, folders)


@pytest.mark.parametrize(
    "options",
    [{"format": tarfile.GNU_FORMAT}, {"format": tarfile.PAX_FORMAT}],
    ids=["gnu", "pax"],
)
def test_long_names_in_a_tar(tmp_path, opened, options):
    name = "folder/" * 40 + "é.jpg"
    path = write_tar(tmp_path / "a.tar", (name, b"deep", {}), **options)
    assert opened(path)[0] == {name: b"deep"}


def numbered(count, size):
    return [(f"{i}.jpg", bytes([i]) * size, {}) for i in range(count)]


def test_a_tar_cut_off_anywhere_is_noticed(tmp_path, opened):
    """Also where a member ends, which tarfile takes for the end of the archive."""
    path = write_tar(tmp_path / "cut.tar", *numbered(4, 700))
    content = path.read_bytes()
    end = 4 * (512 + 1024)  # of the last member; zeros follow
    for length in range(0, end + 512, 128):
        path.write_bytes(content[:length])
        with pytest.raises(SourceError, match=r"cut.tar is not a whole .*again") as e:
            opened(path)
        assert str(path) in str(e.value)
    path.write_bytes(content[: end + 512])
    assert len(opened(path)[0]) == 4


def test_a_damaged_header_inside_a_tar_is_noticed(tmp_path, opened):
    path = write_tar(tmp_path / "bad.tar", *numbered(4, 700))
    content = bytearray(path.read_bytes())
    content[2 * 1536 + 150] ^= 255  # in the third checksum
    path.write_bytes(content)
    with pytest.raises(SourceError, match="no end after 2 members"):
        opened(path)


@pytest.mark.parametrize("kind", ["gztar", "bztar", "xztar", "zip"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_a_compressed_archive_cut_off_is_noticed(tree, opened, kind, share):
    rng = random.Random(0)
    for i in range(20):
        (tree / f"noise{i}.bin").write_bytes(rng.randbytes(3000))
    path = packed(tree, kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(SourceError, match="download it again") as error:
        opened(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_damage_inside_a_compressed_tar_is_noticed(tmp_path, opened, compress):
    rng = random.Random(0)
    members = [(f"{i}.jpg", rng.randbytes(5000), {}) for i in range(9)]
    path = write_tar(tmp_path / "bad.tar", *members)
    content = bytearray(compress(path.read_bytes()))
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"bad.tar is not a whole tar or zip"):
        opened(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(100),
        b"hello",
        random.Random(0).randbytes(20_000),
        b"\x1f\x8b",
        b"PK",
    ],
    ids=["empty", "zeros", "text", "random", "gzip", "zip"],
)
def test_what_is_no_archive_is_refused(tmp_path, opened, content):
    path = tmp_path / "no.tar"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"no.tar is not a whole tar .* again"):
        opened(path)


def test_a_path_to_nothing(tmp_path, opened):
    with pytest.raises(SourceError, match=r"there is no folder or archive .*no.tar"):
        opened(tmp_path / "no.tar")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_damage_in_a_zip_is_an_error_of_its_file(tmp_path, compression):
    path = tmp_path / "a.zip"
    noise = random.Random(0).randbytes(3000)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("good.jpg", noise)
        archive.writestr("bad.jpg", noise)
    content = bytearray(path.read_bytes())
    middle = content.rindex(b"PK\3\4") + 40
    content[middle : middle + 500] = bytes(500)
    path.write_bytes(content)
    with open_source(path, tmp_path, silent) as source:
        assert source.read("good.jpg") == noise
        with pytest.raises(ValueError, match="cannot be unpacked"):
            source.read("bad.jpg")


def test_a_compression_python_lacks_is_an_error_of_its_file(tmp_path):
    path = write_zip(tmp_path / "a.zip", ("a.jpg", b"one", 0))
    content = bytearray(path.read_bytes())
    deflate64 = struct.pack("<H", 9)  # of Windows, for large files
    for start in (content.index(b"PK\3\4") + 8, content.index(b"PK\1\2") + 10):
        content[start : start + 2] = deflate64
    path.write_bytes(content)
    with (
        open_source(path, tmp_path, silent) as source,
        pytest.raises(ValueError, match="compression method is not supported"),
    ):
        source.read("a.jpg")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_an_archive_that_would_fill_the_disk_is_refused(
    tmp_path, opened, monkeypatch, compress
):
    plain = write_tar(tmp_path / "a.tar", ("a.jpg", bytes(200_000), {})).read_bytes()
    path = tmp_path / "bomb.tar"
    path.write_bytes(compress(plain))
    assert opened(path)[0] == {"a.jpg": bytes(200_000)}  # small ones are no danger
    monkeypatch.setattr(archives, "_MIN_UNPACKED_LIMIT", 50_000)
    monkeypatch.setattr(archives, "_CHUNK", 10_000)
    with pytest.raises(SourceError, match=r"bomb.tar is refused: .*than 100 times"):
        opened(path)


def test_an_honest_archive_may_be_large(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(archives, "_MIN_UNPACKED_LIMIT", 50_000)
    noise = random.Random(0).randbytes(200_000)
    path = write_tar(tmp_path / "a.tar.gz", ("a.jpg", noise, {}), mode="w:gz")
    assert opened(path)[0] == {"a.jpg": noise}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_larger_than_any_image_is_not_read(tree, opened, monkeypatch, kind):
    monkeypatch.setattr(archives, "_MAX_FILE_BYTES", 1499)
    with pytest.raises(ValueError, match="1,500 bytes; expected at most 1,499"):
        opened(packed(tree, kind))
    monkeypatch.setattr(archives, "_MAX_FILE_BYTES", 1500)
    assert opened(packed(tree, kind))[0] == FILES


def test_a_zip_that_lies_about_sizes_is_an_error_of_its_file(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(1 << 20))
    content = bytearray(path.read_bytes())
    for start in (content.index(b"PK\3\4") + 22, content.index(b"PK\1\2") + 24):
        content[start : start + 4] = struct.pack("<I", 10)
    path.write_bytes(content)
    with (
        open_source(path, tmp_path, silent) as source,
        pytest.raises(ValueError, match="cannot be unpacked"),
    ):
        source.read("a.jpg")


def test_links_of_a_folder_are_followed(tree, tmp_path, opened):
    (tree / "train" / "dog").symlink_to(tree / "train" / "cat")
    (tree / "train" / "cow").symlink_to(tree / "train" / "cat")
    (tree / "5.jpg").symlink_to(tree / "train" / "cat" / "1.jpg")
    contents, folders = opened(tree)
    for name in ("dog", "cow"):
        assert contents.pop(f"train/{name}/1.jpg") == b"one"
        assert contents.pop(f"train/{name}/2.jpg") == b"two" * 500
    assert contents == {"5.jpg": b"one"} | FILES
    assert folders == FOLDERS | {"train/dog", "train/cow"}


def test_a_linked_folder_is_opened(tree, tmp_path, opened):
    (tmp_path / "link").symlink_to(tree)
    assert opened(tmp_path / "link") == (FILES, FOLDERS)


def test_what_is_no_file_in_a_folder_is_left_out(tree, tmp_path):
    os.mkfifo(tree / "train" / "pipe.jpg")
    with open_source(tree, tmp_path, silent) as source:
        assert source.names == tuple(sorted(FILES))


def test_links_that_lead_back_or_nowhere_are_left_out(tree, opened):
    (tree / "train" / "up").symlink_to(tree)
    (tree / "train" / "cat" / "self").symlink_to(tree / "train" / "cat")
    (tree / "train" / "nothing.jpg").symlink_to(tree / "not there")
    (tree / "train" / "loop.jpg").symlink_to(tree / "train" / "loop.jpg")
    assert opened(tree) == (FILES, FOLDERS)


def test_links_that_lead_to_each_other_end(tmp_path, opened):
    tree = tmp_path / "tree"
    for name, other in (("a", "b"), ("b", "a")):
        (tree / name).mkdir(parents=True)
        (tree / name / "1.jpg").write_bytes(name.encode())
        (tree / name / "to").symlink_to(tree / other)
    assert opened(tree)[0] == {
        "a/1.jpg": b"a",
        "a/to/1.jpg": b"b",
        "b/1.jpg": b"b",
        "b/to/1.jpg": b"a",
    }


def test_a_folder_that_cannot_be_listed_is_not_left_out(tree, opened, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="cat"):
        opened(tree)


def test_no_room_to_unpack_is_explained(tree, tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, chunk):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives.tempfile, "TemporaryFile", lambda **kwargs: Full())
    with (
        pytest.raises(UsageError, match=r"cannot unpack .*No space left.*make room"),
        open_source(packed(tree, "gztar"), tmp_path, silent),
    ):
        pass


@pytest.mark.parametrize("kind", KINDS[1:])
def test_damage_of_any_kind_is_a_clear_error(tree, tmp_path, kind):
    path = packed(tree, kind)
    content = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 9, 57, 255))
        path.write_bytes(damaged)
        try:
            with open_source(path, tmp_path, silent) as source:
                for name in source.names:
                    source.read(name)
        except (UsageError, ValueError) as error:
            refused += str(path) in str(error) or "cannot be unpacked" in str(error)
    assert refused > 20
