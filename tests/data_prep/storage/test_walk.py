"""Folders with symbolic links, loops, missing permissions and special files: everything left out is named."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from data_prep.left_out import LeftOutEntry
from data_prep.manifest import load_manifest
from data_prep.masks import open_masks
from data_prep.partitions import SourceListing
from data_prep.sources import open_source
from data_prep.storage import DeniedKey, StorageError, open_storage
from pipelines.evaluation.photographs import load_photographs
from support.folders import as_unprivileged_user, list_source, shard_folder, write_files


def test_links_to_folders_and_files_are_followed(tmp_path):
    write_files(tmp_path / "lib", "a/1.jpg", "a/deep/2.jpg", "b/3.jpg")
    source = write_files(tmp_path / "source", "0.jpg")
    (source / "a").symlink_to("../lib/a")
    (source / "b").symlink_to(tmp_path / "lib" / "b")
    (source / "c.jpg").symlink_to("../lib/b/3.jpg")
    names, left_out = list_source(source)
    assert names == ["0.jpg", "a/1.jpg", "a/deep/2.jpg", "b/3.jpg", "c.jpg"]
    assert left_out == {}
    assert open_source(str(source)).read("a/deep/2.jpg") == b"a/deep/2.jpg"


def test_a_source_that_is_a_link(tmp_path):
    write_files(tmp_path / "real", "x.jpg", "sub/y.jpg")
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real" / "sub")
    (tmp_path / "link").symlink_to("real")
    names, left_out = list_source(tmp_path / "link")
    assert names == ["sub/y.jpg", "x.jpg"]
    assert left_out == {"repeated folders": ["again/: the same folder as sub/"]}


def test_a_folder_with_several_links_is_walked_once_under_the_first(tmp_path):
    write_files(tmp_path / "lib", "1.jpg", "2.jpg")
    source = write_files(tmp_path / "source", "0.jpg")
    for name in ("z", "m", "b"):
        (source / name).symlink_to("../lib")
    names, left_out = list_source(source)
    assert names == ["0.jpg", "b/1.jpg", "b/2.jpg"]
    assert left_out == {
        "repeated folders": ["m/: the same folder as b/", "z/: the same folder as b/"],
    }


def test_a_folder_inside_the_source_keeps_its_real_name(tmp_path):
    """Whichever comes first: links do not change the names of a source's photographs."""
    source = write_files(tmp_path, "m/1.jpg")
    (source / "a").symlink_to("m")
    (source / "z").symlink_to("m")
    names, left_out = list_source(source)
    assert names == ["m/1.jpg"]
    assert left_out == {"repeated folders": ["a/: the same folder as m/", "z/: the same folder as m/"]}


def test_a_folder_inside_a_linked_folder_is_walked_once(tmp_path):
    write_files(tmp_path / "lib", "1.jpg", "sub/2.jpg")
    source = write_files(tmp_path / "source", "0.jpg")
    (source / "a").symlink_to("../lib/sub")
    (source / "b").symlink_to("../lib")
    names, left_out = list_source(source)
    assert names == ["0.jpg", "a/2.jpg", "b/1.jpg"]
    assert left_out == {"repeated folders": ["b/sub/: the same folder as a/"]}


def test_loops_end(tmp_path):
    source = write_files(tmp_path / "source", "0.jpg", "sub/1.jpg")
    write_files(tmp_path, "beside/2.jpg")
    (source / "self").symlink_to(".")
    (source / "sub" / "up").symlink_to("..")
    (source / "sub" / "out").symlink_to("../..")  # the source's parent, with the source inside
    (tmp_path / "beside" / "back").symlink_to("../source/sub")
    (tmp_path / "beside" / "loop").symlink_to(".")
    names, left_out = list_source(source)
    assert names == ["0.jpg", "sub/1.jpg", "sub/out/beside/2.jpg"]
    assert left_out == {
        "repeated folders": [
            "self/: the same folder as the source itself",
            "sub/out/beside/back/: the same folder as sub/",
            "sub/out/beside/loop/: the same folder as sub/out/beside/",
            "sub/out/source/: the same folder as the source itself",
            "sub/up/: the same folder as the source itself",
        ]
    }


def test_broken_links_are_named(tmp_path):
    source = write_files(tmp_path, "0.jpg")
    (source / "gone.jpg").symlink_to("nowhere/at/all.jpg")
    (source / "itself").symlink_to("itself")
    (source / "ping").symlink_to("pong")
    (source / "pong").symlink_to("ping")
    (source / "through").symlink_to("0.jpg/inside")
    names, left_out = list_source(source)
    assert names == ["0.jpg"]
    assert left_out == {
        "broken links": [
            "gone.jpg: leads to nowhere/at/all.jpg",
            "itself: leads to itself",
            "ping: leads to pong",
            "pong: leads to ping",
            "through: leads to 0.jpg/inside",
        ]
    }


def test_unreadable_entries_are_named(opened):
    source = write_files(opened / "source", "0.jpg", "closed/1.jpg", "listable/2.jpg", "open/3.jpg")
    write_files(opened, "vault/inner/4.jpg")
    (source / "link").symlink_to(opened / "vault" / "inner")
    (source / "link.jpg").symlink_to(opened / "vault" / "inner" / "4.jpg")
    (source / "vault").symlink_to(opened / "vault")
    (source / "closed").chmod(0o000)
    (source / "listable").chmod(0o444)  # only its names can be read
    (opened / "vault").chmod(0o000)
    try:
        with as_unprivileged_user():
            names, left_out = list_source(source)
    finally:
        for folder in (source / "closed", source / "listable", opened / "vault"):
            folder.chmod(0o755)
    assert names == ["0.jpg", "open/3.jpg"]
    denied = "Permission denied"
    assert left_out == {
        "unreadable entries": [
            f"{key}: {denied}" for key in ("closed/", "link", "link.jpg", "listable/2.jpg", "vault/")
        ]
    }


def test_an_unreadable_source_gives_a_one_line_error(opened):
    source = write_files(opened / "source", "0.jpg")
    source.chmod(0o000)
    try:
        with (
            as_unprivileged_user(),
            pytest.raises(StorageError, match="permission denied; check its owner") as e,
        ):
            open_source(str(source)).names()
    finally:
        source.chmod(0o755)
    assert str(source) in str(e.value)


def test_pipes_sockets_and_devices_are_named(tmp_path, monkeypatch):
    source = write_files(tmp_path, "0.jpg")
    os.mkfifo(source / "pipe.jpg")
    (source / "link.jpg").symlink_to("pipe.jpg")
    (source / "zero.jpg").symlink_to("/dev/zero")
    monkeypatch.chdir(source)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        names, left_out = list_source(source)
        assert names == ["0.jpg"]
        assert left_out == {
            "special files": [
                "link.jpg: a named pipe",
                "pipe.jpg: a named pipe",
                "socket.jpg: a socket",
                "zero.jpg: a device",
            ]
        }
        # a listing may name them: reading neither blocks nor returns endless data
        for name in ("pipe.jpg", "link.jpg", "socket.jpg", "zero.jpg"):
            with pytest.raises(DeniedKey, match="not a file"):
                open_storage(source).read(name)


@pytest.mark.parametrize(
    "line", ["x" * 300 + ".jpg", "a:" + "x" * 300, "itself.jpg", "it:self.jpg", "all.txt/x.jpg"]
)
def test_a_listed_name_that_cannot_be_a_file_is_rejected(photos, tmp_path, line):
    good = min(path.name for path in photos.iterdir())
    (tmp_path / good).write_bytes((photos / good).read_bytes())
    for name in ("itself.jpg", "it:self.jpg"):
        (tmp_path / name).symlink_to(name)
    (tmp_path / "all.txt").write_text(f"{line}\n{good}\n")
    manifest = shard_folder(tmp_path / "all.txt", tmp_path / "out")
    assert [reject.name for reject in manifest.rejects] == [line]


def test_awkward_names(tmp_path):
    awkward = ["line\nbreak.jpg", "tab\t.jpg", "\x1b[31mred.jpg", " .jpg", "-rf.jpg", ".hidden.jpg"]
    write_files(tmp_path, *awkward)
    (tmp_path / "gone\n\x1b[31m").symlink_to("nowhere")
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
        os.symlink(b"nowhere\xff", os.fsencode(tmp_path) + b"/gone\xe9")
    except OSError:
        pytest.skip("this file system wants unicode names")
    names, left_out = list_source(tmp_path)
    assert sorted([*awkward, "caf\udce9.jpg"]) == names  # photographs nevertheless
    assert left_out == {
        "broken links": ["gone\\n\\x1b[31m: leads to nowhere", "gone\\udce9: leads to nowhere\\udcff"]
    }


def test_deep_trees_are_walked_completely():
    """Deeper than the recursion limit, and than the longest path."""
    original, source = os.getcwd(), Path(tempfile.mkdtemp())  # pytest cannot remove such a tree
    os.chdir(source)
    try:
        for level in range(1320):
            if level in (0, 1200):
                Path(f"{level}.jpg").write_bytes(b"")
            name = "d" if level < 1300 else "d" * 200
            os.mkdir(name)
            os.chdir(name)
        os.chdir(original)
        names, left_out = list_source(source)
    finally:
        os.chdir(original)
        subprocess.run(["rm", "-r", source], check=True)  # shutil.rmtree does not go that deep
    assert [Path(name).name for name in names] == ["0.jpg", "1200.jpg"]
    assert list(left_out) == ["unreadable entries"]
    assert "File name too long" in left_out["unreadable entries"][0]


@pytest.fixture
def library(photos, tmp_path) -> Path:
    """23 photographs behind links and loops."""
    source = tmp_path / "library"
    source.mkdir()
    (source / "all").symlink_to(photos)
    (source / "twice").symlink_to(photos)
    (source / "loop").symlink_to(".")
    (source / "gone").symlink_to("nowhere")
    return source


def test_shards_of_linked_folders(library, photos, tmp_path):
    manifest = shard_folder(library, tmp_path / "out")
    assert sum(manifest.splits.values()) == 23
    assert manifest.rejects == manifest.duplicates == ()
    assert manifest.left_out == {
        "repeated folders": LeftOutEntry(
            2, ("loop/: the same folder as the source itself", "twice/: the same folder as all/")
        ),
        "broken links": LeftOutEntry(1, ("gone: leads to nowhere",)),
    }
    assert load_manifest(open_storage(tmp_path / "out")) == manifest
    plain = shard_folder(photos, tmp_path / "plain")
    hashes = [sorted(entry.sha256 for entry in m.shards) for m in (manifest, plain)]
    assert hashes[0] == hashes[1]
    assert plain.left_out == {}


def test_masks_and_photographs_of_an_evaluation_follow_links(library, photos, tmp_path, capsys):
    assert len(load_photographs(str(library), 32, 100)) == 23
    errors = capsys.readouterr().err
    assert "2 repeated folders" in errors
    assert "1 broken link (gone: leads to nowhere)" in errors
    assert len(open_masks({str(library): {"invert": False}}).names) == 23


def test_the_digest_of_a_listing_is_stable(tmp_path):
    """It is part of the step keys: a new digest would repeat finished steps."""
    write_files(tmp_path, "b.jpg", "a/2.jpg", "a.png", "a b/é.jpg", ".hidden.jpg", "notes.txt")
    (tmp_path / "linked.jpg").symlink_to("b.jpg")
    listing = SourceListing(open_source(str(tmp_path)))
    assert listing.digest == "9e3cc77b7a1dbf2dd5305c24d61e96dc81a204a48fbe1a953ee412ae51b42dbb"
