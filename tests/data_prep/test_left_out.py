"""Companions and side files are not counted as rejects, and are named."""

from __future__ import annotations

import json
import os
import random
import shutil

import boto3
import pytest

from data_prep.left_out import (
    COMPANIONS,
    MAX_NAMES,
    LeftOut,
    LeftOutEntry,
    exclude_side_files,
    find_companion,
    is_companion,
    left_out_lines,
)
from data_prep.manifest import load_manifest
from data_prep.masks import open_masks
from data_prep.records import from_json, to_json
from data_prep.sources import open_source
from data_prep.storage import open_storage
from pipelines.data.inspect import summarize_shards
from pipelines.evaluation.photographs import load_photographs
from support.folders import list_source, shard_folder, write_files

APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "
FILES = [
    *("._x.jpg", "._", ".DS_Store", ".localized", "Icon\r", "Icon\uf00d", ".VolumeIcon.icns", ".apdisk"),
    *("Thumbs.db", "thumbs.db", "THUMBS.DB", "Thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db"),
    *("desktop.ini", "Desktop.ini", "x.jpg:Zone.Identifier", "x.jpg\uf03aZone.Identifier"),
    *(".picasa.ini", "Picasa.ini", "ZbThumbnail.info", ".directory", ".nomedia"),
]
FOLDERS = [
    *("__MACOSX", ".AppleDouble", ".Spotlight-V100", ".Trashes", ".fseventsd", ".TemporaryItems"),
    *("$RECYCLE.BIN", "$Recycle.Bin", "System Volume Information", "@eaDir", "#recycle", ".@__thumb"),
    *("@Recycle", ".thumbnails", ".Trash-1000", "Network Trash Folder"),
]
PHOTOGRAPHS = [
    *("x.jpg", ".x.jpg", "..x.jpg", "_x.jpg", "x._.jpg", "DS_Store.jpg", "Thumbs.db.jpg", "desktop.jpg"),
    *("Icon", "Icon.png", "thumbs.jpg", "no ending", "MACOSX/x.jpg", "eaDir/x.jpg", ".hidden/x.jpg"),
    *("._folder/x.jpg", "trash/x.jpg", ".trash-can/x.jpg", "Zone.Identifier.jpg"),
]


@pytest.mark.parametrize("name", FILES)
def test_companions(name):
    assert is_companion(name)
    assert find_companion(f"a/b/{name}") == f"a/b/{name}"


@pytest.mark.parametrize("name", FOLDERS)
def test_companion_folders(name):
    assert find_companion(f"a/{name}/b/x.jpg") == f"a/{name}/"
    assert find_companion(f"a/{name}") is None  # a file of that name


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_other_names_are_photographs(name):
    assert find_companion(name) is None


def make_mac_copy(photos, folder):
    """The 23 photographs as copied from a Mac through Windows and a network drive. Returns the number of companions."""
    for path in photos.iterdir():
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "sub" / path.name).write_bytes(path.read_bytes())
        (folder / "sub" / f"._{path.name}").write_bytes(APPLE_DOUBLE)
    real = min(photos.iterdir()).read_bytes()
    write_files(folder, ".DS_Store", "sub/.DS_Store", "sub/Thumbs.db", "sub/desktop.ini")
    write_files(
        folder, "__MACOSX/sub/._x.jpg", "__MACOSX/sub/._y.jpg", "sub/@eaDir/x.jpg/SYNOINDEX_MEDIA_INFO"
    )
    (folder / "sub" / "@eaDir" / "x.jpg" / "SYNOPHOTO_THUMB_XL.jpg").write_bytes(real)
    return 23 + 4 + 2


def test_a_copy_from_a_mac_is_sharded_without_a_reject(photos, tmp_path):
    count = make_mac_copy(photos, tmp_path / "mac")
    manifest = shard_folder(tmp_path / "mac", tmp_path / "out")
    assert sum(manifest.splits.values()) == 23
    assert manifest.rejects == manifest.duplicates == ()
    (companions,) = manifest.left_out.values()
    assert (list(manifest.left_out), companions.count) == ([COMPANIONS], count)
    assert {".DS_Store", "__MACOSX/", "sub/@eaDir/", "sub/Thumbs.db"} < set(companions.names)
    assert summarize_shards(open_storage(tmp_path / "out")).left_out == manifest.left_out


def test_a_bucket_and_a_folder_list_the_same(photos, tmp_path, s3):
    make_mac_copy(photos, tmp_path / "mac")
    write_files(
        tmp_path / "mac", "sub/.tmp-half.jpg", "sub/photo 00.json", "sub/photo 01.txt", "sub/other.txt"
    )
    local, remote = open_storage(tmp_path / "mac"), open_storage(f"{s3}/mac")
    for path in (tmp_path / "mac").rglob("*"):
        if path.is_file():
            remote.upload(path, str(path.relative_to(tmp_path / "mac")))
    remote.write("empty", b"")  # listed as a photograph: only names count
    local.write("empty", b"")
    marker = "mac/folder/"
    for key, body in ((marker, b""), (f"{marker}data/", b"x")):
        boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).put_object(
            Bucket=remote.bucket, Key=key, Body=body
        )
    listings = []
    for storage in (local, remote):
        left_out = LeftOut()
        names = [name for name, _ in open_source(storage.uri).list_photos(left_out)]
        listings.append((names, left_out.entries()))
    special = listings[1][1].pop("special files")
    assert special.names == ("folder/data/: an object with the name of a folder",)
    sets = [{kind: (e.count, sorted(e.names)) for kind, e in left_out.items()} for _, left_out in listings]
    assert sets[0] == sets[1]
    assert sorted(listings[0][0]) == listings[1][0]
    assert "sub/other.txt" in listings[0][0]
    assert sets[0]["side files"][1] == ["sub/photo 00.json", "sub/photo 01.txt"]
    assert sets[0]["unfinished files"][1] == ["sub/.tmp-half.jpg"]


def test_a_listing_that_names_companions(photos, tmp_path):
    make_mac_copy(photos, tmp_path / "mac")
    lines = [str(path.relative_to(tmp_path)) for path in (tmp_path / "mac").rglob("*") if path.is_file()]
    lines[::2] = [f"{tmp_path}/{line}" for line in lines[::2]]  # some as absolute paths
    (tmp_path / "all.txt").write_text("\n".join(lines))
    manifest = shard_folder(tmp_path / "all.txt", tmp_path / "out")
    assert sum(manifest.splits.values()) == 23
    assert manifest.rejects == ()
    assert manifest.left_out[COMPANIONS].count == len(lines) - 23


def test_a_source_with_only_companions_is_empty(tmp_path, s3):
    write_files(tmp_path / "mac", ".DS_Store", "._a.jpg", "._b.jpg", "__MACOSX/c.jpg", "d.json")
    message = (
        r"is empty: all of its files are left out, 4 companions \(.DS_Store, ._a.jpg, ._b.jpg and 1 more\); "
        r"1 side file \(d.json\); put photographs there"
    )
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "mac")).names()
    open_storage(f"{s3}/mac").write("Thumbs.db", b"x")
    with pytest.raises(ValueError, match=r"is empty: .* 1 companion \(Thumbs.db\); put"):
        open_source(f"{s3}/mac").names()
    (tmp_path / "all.txt").write_text("._a.jpg\n.DS_Store\n")
    with pytest.raises(ValueError, match=r"names no photograph: all of its files are left out, 2 companions"):
        open_source(str(tmp_path / "all.txt")).names()


def test_the_error_without_usable_photographs_names_what_was_left_out(tmp_path):
    write_files(tmp_path / "mac", ".DS_Store", "notes.txt")
    (tmp_path / "mac" / "away").symlink_to("/nowhere/at/all")
    with pytest.raises(
        ValueError, match=r"1 rejects, first notes.txt: .*; left out: 1 companion .* 1 broken link"
    ):
        shard_folder(tmp_path / "mac", tmp_path / "out")


def test_masks_and_photographs_of_an_evaluation(photos, tmp_path, capsys):
    make_mac_copy(photos, tmp_path / "mac")
    assert len(open_masks({str(tmp_path / "mac"): {"invert": False}}).names) == 23
    assert len(load_photographs(str(tmp_path / "mac"), 32, 100)) == 23
    errors = capsys.readouterr().err
    assert "skipped" not in errors
    assert "29 companions" in errors


def test_an_evaluation_skips_unreadable_photographs(photos, tmp_path, capsys):
    good = min(photos.iterdir())
    (tmp_path / good.name).write_bytes(good.read_bytes())
    (tmp_path / "all.txt").write_text(f"gone.jpg\n../secret.jpg\n{good.name}\n")
    assert len(load_photographs(str(tmp_path / "all.txt"), 32, 100)) == 1
    errors = capsys.readouterr().err
    assert "skipped gone.jpg: gone.jpg is not in" in errors
    assert "skipped ../secret.jpg: " in errors


TAKEOUT = [
    "IMG_1.jpg",
    "IMG_1.jpg.json",
    "IMG_1.jpg.supplemental-metadata.json",
    "metadata.json",
    "IMG_1(1).JPG",
]
PHONE = ["IMG_2.HEIC", "IMG_2.MOV", "IMG_3.jpg", "IMG_3.mp4", "IMG_3.AAE", "film.mov", "IMG_3.jpg.xmp"]
CAPTIONS = [
    "a.jpg",
    "a.txt",
    "b.webp",
    "b.txt",
    "c.png",
    "c.PNG.txt",
    "c.png.txt",
    "d.e.jpg",
    "d.e.txt",
    "d.txt",
]


@pytest.mark.parametrize(
    ("names", "photos"),
    [
        (TAKEOUT, ["IMG_1(1).JPG", "IMG_1.jpg"]),
        (PHONE, ["IMG_2.HEIC", "IMG_3.jpg", "film.mov"]),
        (CAPTIONS, ["a.jpg", "b.webp", "c.PNG.txt", "c.png", "d.e.jpg", "d.txt"]),
        (["a.txt", "b.txt", "notes.txt"], ["a.txt", "b.txt", "notes.txt"]),
        (["labels/a.txt", "images/a.jpg"], ["images/a.jpg", "labels/a.txt"]),
        (["a.b.jpg", "a.txt", "a.u.png", "a.u.txt", "a.webp"], ["a.b.jpg", "a.u.png", "a.webp"]),
        (["a.jpg", "a.x.jpg", "a.x.txt", "a.txt"], ["a.jpg", "a.x.jpg"]),
        (["Annotations/a.xml", "ImageSets/train.txt", "JPEGImages/a.jpg"], ["ImageSets/train.txt", "JPEGImages/a.jpg"]),
    ],
)  # fmt: skip
def test_side_files_of_photographs(tmp_path, names, photos):
    write_files(tmp_path, *names)
    listed, left_out = list_source(tmp_path)
    assert listed == photos
    assert sorted(left_out.get("side files", [])) == sorted({*names} - {*photos})


def test_side_files_are_found_between_similar_names():
    """Compared with the definition, on many similar names."""
    rng = random.Random(0)
    stems = ["a", "b", "a.b", "a.u", "a.txt", "a b", "b.jpg"]
    suffixes = [".jpg", ".webp", ".txt", ".png", ".TXT", "", ".u", ".caption", ".json"]
    image_suffixes = (".jpg", ".webp", ".png")
    for _ in range(3000):
        keys = sorted({rng.choice(stems) + rng.choice(suffixes) for _ in range(rng.randrange(1, 12))})
        with_image = {key for key in keys if key.endswith(image_suffixes)}
        with_image |= {key.rpartition(".")[0] for key in with_image}
        expected = [
            key
            for key in keys
            if not key.endswith(".json")
            and not (key.lower().endswith((".txt", ".caption")) and key.rpartition(".")[0] in with_image)
        ]
        left_out = LeftOut()
        listed = [key for key, _ in exclude_side_files(((key, 1) for key in keys), left_out)]
        assert listed == expected, keys
        assert left_out.total == len(keys) - len(expected)


def test_all_companions_are_counted_and_the_first_named():
    left_out = LeftOut()
    for number in range(1000):
        left_out.add(COMPANIONS, f"._{number}.jpg")
    entries = left_out.entries()
    assert entries == {
        COMPANIONS: LeftOutEntry(1000, tuple(f"._{number}.jpg" for number in range(MAX_NAMES)))
    }
    assert left_out_lines(entries) == ["1000 companions (._0.jpg, ._1.jpg, ._2.jpg and 997 more)"]
    assert from_json(LeftOutEntry, to_json(entries[COMPANIONS]), "it") == entries[COMPANIONS]


def test_a_manifest_without_left_out_is_read(photos, tmp_path):
    shard_folder(photos, tmp_path / "out")
    out = open_storage(tmp_path / "out")
    manifest = load_manifest(out)
    record = json.loads(out.read("manifest.json"))
    del record["left_out"]
    out.write("manifest.json", json.dumps(record).encode())
    assert summarize_shards(out).left_out is None
    resharded = shard_folder(photos, tmp_path / "out")
    assert resharded == manifest
    assert resharded.left_out == {}


def test_shards_from_before_companions_were_left_out_are_reused(photos, tmp_path, monkeypatch):
    """Companions were rejects then: the tars stay the same."""
    make_mac_copy(photos, tmp_path / "mac")
    shutil.rmtree(tmp_path / "mac" / "sub" / "@eaDir")  # its thumbnail would be a photograph then
    with monkeypatch.context() as older_version:
        older_version.setattr("data_prep.storage.walk.is_companion", lambda name: False)
        older_version.setattr("data_prep.storage.walk.is_companion_folder", lambda name: False)
        old = shard_folder(tmp_path / "mac", tmp_path / "out")
    assert len(old.rejects) > 23
    new = shard_folder(tmp_path / "mac", tmp_path / "out")
    assert (new.rejects, sum(new.splits.values())) == ((), 23)
    hashes = [sorted(entry.sha256 for entry in manifest.shards) for manifest in (old, new)]
    assert hashes[0] == hashes[1]
