"""`inpaint data ...` and `inpaint masks ...`: what they print, the files they write, and what a repair must not replace."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep.canny import assemble_edges, write_edge_shard
from data_prep.preparing import ShardOptions
from data_prep.shards import assemble, load_manifest, make_slice, plan
from data_prep.sources import bundled_photo, open_source
from data_prep.storage import open_storage
from data_prep.tars import read_index
from pipelines.__main__ import main
from pipelines.cli.data_commands import mask_spec
from pipelines.data.repairing import remake_tars

Run = Callable[..., tuple[int, str, str]]
COUNT, SLICE = 20, 8


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `inpaint` in an empty folder: exit status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty crops of the bundled photographs, and a file that is none."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(COUNT):
        photo = bundled_photo(("astronaut", "coffee", "china")[number % 3])
        top, left = (int(rng.integers(length - 64)) for length in photo.shape[:2])
        cv2.imwrite(str(folder / f"{number:02d}.png"), photo[top : top + 64, left : left + 64, ::-1])
    (folder / "notes.txt").write_text("no photograph")
    return folder


def sharded(source: str, folder: Path, root: str | None = None) -> Path:
    """Shards of a source with edges of sigma 1, as the steps leave them."""
    out, options = open_storage(folder), ShardOptions(size=48, val=0.2, test=0.2)
    photos = open_source(source, 48, root)
    slices, _ = plan(photos, out, options, SLICE)
    made = [make_slice(photos, piece, out, options) for piece in slices]
    manifest = assemble(made, options, photos.uri, out)
    edges = out.sub("edges/sigma-1")
    tars = [write_edge_shard(out, entry, {1.0: edges})[1.0] for entry in manifest["shards"]]
    assemble_edges(tars, 1.0, manifest["digest"], edges)
    return folder


def sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_data_show(run: Run, photos: Path, tmp_path: Path) -> None:
    shards = sharded(str(photos), tmp_path / "shards")
    status, out, _ = run("data", "show", shards, "--count", 4, "--out", "new/folder/sheet.png")
    assert status == 0
    counts = load_manifest(open_storage(shards))["splits"]
    assert ", ".join(f"{n} {split}" for split, n in counts.items()) in out
    assert "1 rejects, 0 duplicates; sigmas stored: 1" in out
    assert "new/folder/sheet.png: 4 of train, edges of sigma 1, stored, masks brush" in out
    assert Image.open(tmp_path / "new/folder/sheet.png").format == "PNG"

    status, out, _ = run("data", "show", shards, "--sigma", 3, "--masks", "half", "--split", "val", "--json")
    told = json.loads(out)
    held = [
        key
        for entry in load_manifest(open_storage(shards))["shards"]
        if entry["split"] == "val"
        for key in read_index(open_storage(shards), entry["name"])["keys"]
    ]
    assert sorted(told["samples"]) == sorted(held)
    assert told["sigmas"] == [1.0]

    for arguments, words in (
        ((shards, "--count", 0), "count 0"),
        ((shards, "--masks", "brsh"), "did you mean 'brush'"),
        ((tmp_path / "nothing",), "inpaint shard SOURCE"),
    ):
        status, _, error = run("data", "show", *arguments)
        assert (status, error.count("\n")) == (1, 1)
        assert words in error


def test_masks_show(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("masks", "show", "center=1", "half=3", "--size", 64, "--count", 400)
    assert status == 0
    shares = {line.split()[0]: float(line.split()[2].rstrip("%")) for line in out.splitlines()[2:-1]}
    assert shares["20-30"] + shares["40-50"] == pytest.approx(100, abs=0.2)  # each is rounded to a tenth
    assert shares["20-30"] == pytest.approx(25, abs=4 * 100 * (0.25 * 0.75 / 400) ** 0.5)
    bars = {line.split()[0]: line.count("█") for line in out.splitlines()[2:-1]}
    assert bars["40-50"] == 40 > bars["20-30"] > bars["0-10"] == 0
    assert Image.open(tmp_path / "masks.png").width == 1080

    wide = json.loads(run("masks", "show", "brush", "--count", 200, "--json")[1])
    told = run("masks", "show", "brush.max_width=13", "brush=2", "--count", 200, "--json")
    thin = json.loads(told[1])
    assert "max_width 13" in thin["masks"]
    assert thin["mean"] < 0.8 * wide["mean"]
    assert sum(thin["bands"].values()) == pytest.approx(1)

    for text, words in (("brush=x", "comes a share"), ("brush.max_wdth=3", "did you mean 'max_width'")):
        status, _, error = run("masks", "show", text)
        assert (status, error.count("\n")) == (1, 1)
        assert words in error


def test_masks_are_named_as_in_a_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    folder.mkdir()
    assert mask_spec(["brush=2", "box.rule=glcic", "box.delta=16", str(folder), "half"]) == {
        "brush": {"share": 2.0},
        "box": {"rule": "glcic", "delta": 16},
        str(folder): {},
        "half": {},
    }


def test_a_tar_stays_where_it_cannot_be_made_again(photos: Path, tmp_path: Path) -> None:
    """A photograph is gone, another one is in its place, the names lead nowhere, the record is lost; then all is well."""
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{path.name}\n" for path in sorted(photos.glob("*.png"))))
    folder = sharded(str(names), tmp_path / "shards", str(photos))
    shards, whole = open_storage(folder), sums(folder)
    manifest = load_manifest(shards)
    entry = next(entry for entry in manifest["shards"] if entry["name"] == "train-00000.tar")
    index = read_index(shards, entry["name"])
    data = bytearray((folder / entry["name"]).read_bytes())
    data[index["offsets"][0] + 5] ^= 1
    (folder / entry["name"]).write_bytes(data)
    (folder / "train-00000.json").write_text("{}")
    damaged = sums(folder)
    tries = iter(range(9))

    def remade(root: Path | None) -> str:
        return remake_tars(
            shards,
            open_source(manifest["source"], 48, str(root) if root else None),
            ShardOptions(**manifest["options"]),
            manifest["duplicates"],
            entry["slice"],
            [entry],
            open_storage(tmp_path / f"scratch {next(tries)}"),
        )

    first, second = index["names"][:2]
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    (other / first).unlink()
    refusals = [remade(tmp_path), remade(other)]
    shutil.copy(photos / second, other / first)
    refusals.append(remade(other))
    record = (folder / "slices/00000.json").read_bytes()
    (folder / "slices/00000.json").unlink()
    refusals.append(remade(photos))
    (folder / "slices/00000.json").write_bytes(record)
    for reason, words in zip(
        refusals,
        ("no longer gives", f"no longer gives {first}", "give other bytes", "slices/00000.json"),
        strict=True,
    ):
        assert reason.startswith("train-00000.tar: ")
        assert words in reason
        assert "\n" not in reason
    assert sums(folder) == damaged
    (photos / "later.png").write_bytes((photos / "07.png").read_bytes())  # what comes later is no hindrance
    assert remade(photos) == ""
    assert sums(folder) == whole
