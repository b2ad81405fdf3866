"""`inpaint data ...` and `inpaint masks ...`: output, written files, and tars that a repair must not replace."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep.edge_maps import write_edge_manifest, write_edge_tars
from data_prep.left_out import LeftOut, LeftOutEntry
from data_prep.manifest import MANIFEST_VERSION, Duplicate, Manifest, Reject, count_text, load_manifest
from data_prep.preprocess import ShardOptions
from data_prep.shards import merge_partitions, plan_shards, write_partition
from data_prep.sources import bundled_photo, open_source
from data_prep.storage import open_storage
from data_prep.tars import read_index
from pipelines.cli.masks import parse_mask_spec
from pipelines.cli.reporting import describe_photographs
from pipelines.data.check import rebuild_tars

Run = Callable[..., tuple[int, str, str]]
COUNT, PARTITION_SIZE = 20, 8


@pytest.fixture
def run(tmp_path: Path, command_line: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `inpaint` in an empty folder: exit status, output, errors."""
    monkeypatch.chdir(tmp_path)
    return command_line


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty crops of the bundled photographs, and two other files."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(COUNT):
        photo = bundled_photo(("astronaut", "coffee", "china")[number % 3])
        top, left = (int(rng.integers(length - 64)) for length in photo.shape[:2])
        cv2.imwrite(str(folder / f"{number:02d}.png"), photo[top : top + 64, left : left + 64, ::-1])
    (folder / "notes.txt").write_text("no photograph")
    (folder / ".DS_Store").write_bytes(b"")
    return folder


def write_shards(source: str, folder: Path, root: str | None = None) -> Path:
    """Write shards of a source and edges of sigma 1, as the steps do."""
    storage, options = open_storage(folder), ShardOptions(size=48, val=0.2, test=0.2)
    photos = open_source(source, 48, root)
    left_out = LeftOut()
    partitions_to_write, _ = plan_shards(photos, storage, options, PARTITION_SIZE, left_out)
    partitions = [write_partition(photos, partition, storage, options) for partition in partitions_to_write]
    manifest = merge_partitions(partitions, options, photos.uri, storage, left_out)
    edges = storage.subfolder("edges/sigma-1")
    tars = [write_edge_tars(storage, entry, {1.0: edges})[1.0] for entry in manifest.shards]
    write_edge_manifest(tars, 1.0, manifest.digest, edges)
    return folder


def file_checksums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_photographs_are_described_with_printable_names() -> None:
    manifest = Manifest(
        version=MANIFEST_VERSION,
        source="/photos",
        options=ShardOptions(),
        digest="",
        splits={"train": 3, "val": 1, "test": 0},
        partitions=1,
        shards=(),
        rejects=tuple(Reject(f"\udce9\n{n}.jpg", "empty") for n in range(12)),
        duplicates=(Duplicate("b.jpg", "a.jpg"),),
        left_out={"companions": LeftOutEntry(2, ("._a.jpg", "._b.jpg"))},
    )
    facts = describe_photographs(manifest)
    assert facts["photographs"] == "3 train, 1 val, 0 test"
    assert facts["rejects"].startswith(r"12 (\udce9\n0.jpg: empty; ")
    assert facts["rejects"].endswith("; and 2 more)")
    assert facts["duplicates"] == "1 (b.jpg is a copy of a.jpg)"
    assert facts["left out"] == "2 companions (._a.jpg, ._b.jpg)"
    assert "".join(facts.values()).encode().isascii()
    assert count_text(manifest) == "3 train, 1 val, 0 test; 12 rejects, 1 duplicate, 2 left out"
    assert count_text(replace(manifest, rejects=(), duplicates=(), left_out=None)) == "3 train, 1 val, 0 test"
    assert describe_photographs(replace(manifest, left_out={}))["left out"] == "0"
    old_manifest = replace(manifest, left_out=None)  # from before left-out files were recorded
    assert "left out" not in describe_photographs(old_manifest)


def test_data_show(run: Run, photos: Path, tmp_path: Path) -> None:
    shards = write_shards(str(photos), tmp_path / "shards")
    status, out, _ = run("data", "show", shards, "--count", 4, "--out", "new/folder/sheet.png")
    assert status == 0
    counts = load_manifest(open_storage(shards)).splits
    assert ", ".join(f"{n} {split}" for split, n in counts.items()) in out
    assert "1 rejects, 0 duplicates; sigmas stored: 1" in out
    assert "left out of the source: 1 companion (.DS_Store)\n" in out
    assert "new/folder/sheet.png: 4 of train, edges of sigma 1, stored, masks brush" in out
    assert Image.open(tmp_path / "new/folder/sheet.png").format == "PNG"

    status, out, _ = run("data", "show", shards, "--sigma", 3, "--masks", "half", "--split", "val", "--json")
    result = json.loads(out)
    expected_keys = [
        key
        for entry in load_manifest(open_storage(shards)).shards
        if entry.split == "val"
        for key in read_index(open_storage(shards), entry.name)["keys"]
    ]
    assert sorted(result["samples"]) == sorted(expected_keys)
    assert result["sigmas"] == [1.0]

    assert run("data", "show", shards, "--count", 0)[0] == 2
    for arguments, words in (
        ((shards, "--masks", "brsh"), "did you mean 'brush'"),
        ((tmp_path / "nothing",), "inpaint shard SOURCE"),
    ):
        status, _, error = run("data", "show", *arguments)
        assert (status, error.count("\n")) == (1, 1)
        assert words in error


@pytest.mark.slow
def test_masks_show(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("masks", "show", "center=1", "half=3", "--size", 64, "--count", 400)
    assert status == 0
    percentages = {line.split()[0]: float(line.split()[2].rstrip("%")) for line in out.splitlines()[2:-1]}
    assert percentages["20-30"] + percentages["40-50"] == pytest.approx(
        100, abs=0.2
    )  # each is rounded to a tenth
    assert percentages["20-30"] == pytest.approx(25, abs=4 * 100 * (0.25 * 0.75 / 400) ** 0.5)
    bars = {line.split()[0]: line.count("█") for line in out.splitlines()[2:-1]}
    assert bars["40-50"] == 40 > bars["20-30"] > bars["0-10"] == 0
    assert Image.open(tmp_path / "masks.png").width == 1080

    wide = json.loads(run("masks", "show", "brush", "--count", 200, "--json")[1])
    thin_result = run("masks", "show", "brush.max_width=13", "brush=2", "--count", 200, "--json")
    thin = json.loads(thin_result[1])
    assert "max_width 13" in thin["masks"]
    assert thin["mean"] < 0.8 * wide["mean"]
    assert sum(thin["bands"].values()) == pytest.approx(1)

    for text, words in (
        ("brush=x", "a weight must follow ="),
        ("brush.max_wdth=3", "did you mean 'max_width'"),
    ):
        status, _, error = run("masks", "show", text)
        assert (status, error.count("\n")) == (1, 1)
        assert words in error


def test_mask_arguments_are_parsed_like_a_recipes_masks(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    folder.mkdir()
    assert parse_mask_spec(["brush=2", "box.rule=glcic", "box.delta=16", str(folder), "half"]) == {
        "brush": {"weight": 2.0},
        "box": {"rule": "glcic", "delta": 16},
        str(folder): {},
        "half": {},
    }


def test_a_tar_that_cannot_be_rebuilt_is_kept(photos: Path, tmp_path: Path) -> None:
    """Refused: wrong root, a missing photograph, a changed one, a lost partition record. Then a rebuild succeeds."""
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{path.name}\n" for path in sorted(photos.glob("*.png"))))
    folder = write_shards(str(names), tmp_path / "shards", str(photos))
    shards, checksums = open_storage(folder), file_checksums(folder)
    manifest = load_manifest(shards)
    entry = next(entry for entry in manifest.shards if entry.name == "train-00000.tar")
    index = read_index(shards, entry.name)
    data = bytearray((folder / entry.name).read_bytes())
    data[index["offsets"][0] + 5] ^= 1
    (folder / entry.name).write_bytes(data)
    (folder / "train-00000.json").write_text("{}")
    damaged_checksums = file_checksums(folder)
    tries = iter(range(9))

    def rebuild(root: Path | None) -> str:
        return rebuild_tars(
            shards,
            open_source(manifest.source, 48, str(root) if root else None),
            manifest.options,
            manifest.duplicates,
            entry.partition,
            [entry],
            open_storage(tmp_path / f"scratch {next(tries)}"),
        )

    first, second = index["names"][:2]
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    (other / first).unlink()
    refusals = [rebuild(tmp_path), rebuild(other)]
    shutil.copy(photos / second, other / first)
    refusals.append(rebuild(other))
    record = (folder / "partitions/00000.json").read_bytes()
    (folder / "partitions/00000.json").unlink()
    refusals.append(rebuild(photos))
    (folder / "partitions/00000.json").write_bytes(record)
    for reason, words in zip(
        refusals,
        ("no longer gives", f"no longer gives {first}", "give other bytes", "partitions/00000.json"),
        strict=True,
    ):
        assert reason.startswith("train-00000.tar: ")
        assert words in reason
        assert "\n" not in reason
    assert file_checksums(folder) == damaged_checksums
    (photos / "later.png").write_bytes((photos / "07.png").read_bytes())  # new photographs do not matter
    assert rebuild(photos) == ""
    assert file_checksums(folder) == checksums
