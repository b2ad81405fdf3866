"""Scans of mask folders: unusable masks are named, and cached masks are not read again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import mask_folder
from data_prep.mask_folder import MaskFolder, MaskScan
from data_prep.mask_reading import parse_hole_values
from data_prep.masks import (
    check_mask_spec,
    make_mask,
    make_mask_specs,
    mask_folders,
    open_masks,
    read_mask,
)
from data_prep.storage import StorageError, open_storage
from data_prep.storage.local import LocalStorage

COUNT = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve brush masks, red on black, and a companion file of macOS."""
    path = tmp_path / "masks"
    path.mkdir()
    for number in range(COUNT):
        hole = make_mask("brush", 64, 64, np.random.default_rng(number))
        Image.fromarray(hole[..., None] * np.uint8((255, 0, 0))).save(path / f"{number:02d}.png")
    (path / "._00.png").write_bytes(b"written by macOS beside a file")
    return path


@pytest.fixture
def scan_cache(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "cache"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that are read from any local storage, the cache included."""
    keys: list[str] = []
    read = LocalStorage.read

    def recorded(self: LocalStorage, key: str) -> bytes:
        keys.append(key)
        return read(self, key)

    monkeypatch.setattr(LocalStorage, "read", recorded)
    return keys


def scan(folder: Path | str, scan_cache: LocalStorage | None = None, **options: object) -> MaskScan:
    masks = mask_folders({str(folder): options})[str(folder)]
    result = masks.folder.scan(scan_cache)
    masks.folder.check_usable(result, masks.band, "--hole VALUE")
    return result


def masks_read(reads: list[str]) -> list[str]:
    names = sorted({name for name in reads if name.endswith(".png")})
    reads.clear()
    return names


def test_every_mask_is_read_once_and_cached(folder: Path, scan_cache: LocalStorage, reads: list[str]) -> None:
    first = scan(folder, scan_cache)
    assert masks_read(reads) == [f"{number:02d}.png" for number in range(COUNT)]
    assert first.hole_fractions == {
        path.name: read_mask(path).mean() for path in sorted(folder.glob("[0-9]*.png"))
    }
    assert scan(folder, scan_cache) == first
    assert masks_read(reads) == []
    (cache_file,) = Path(scan_cache.uri, "masks").iterdir()
    assert len(json.loads(cache_file.read_text())["masks"]) == COUNT

    Image.fromarray(np.eye(64, dtype=np.uint8) * 255).save(folder / "03.png")
    (folder / "05.png").unlink()
    changed = scan(folder, scan_cache, invert=False)  # with other options, nothing is cached
    assert len(masks_read(reads)) == COUNT - 1
    assert changed.hole_fractions["03.png"] == 1 / 64
    scan(folder, scan_cache)
    assert set(changed.hole_fractions) == set(scan(folder, scan_cache).hole_fractions)


def test_only_changed_masks_are_read_again(folder: Path, scan_cache: LocalStorage, reads: list[str]) -> None:
    scan(folder, scan_cache, hole="red")
    reads.clear()
    hole = np.eye(64, dtype=np.uint8)[..., None] * np.uint8((255, 0, 0))
    Image.fromarray(hole).save(folder / "03.png")
    os.utime(folder / "07.png", ns=(1, 1))
    assert scan(folder, scan_cache, hole="red").hole_fractions["03.png"] == 1 / 64
    assert masks_read(reads) == ["03.png", "07.png"]


def test_a_band_selects_the_same_masks_with_and_without_a_cache(
    folder: Path, scan_cache: LocalStorage, reads: list[str]
) -> None:
    options = {"band": [0.1, 0.3], "dilate": 2}
    uncached = open_masks({str(folder): options})
    scan(folder, scan_cache, **options)
    reads.clear()
    cached = open_masks({str(folder): options}, scan_cache)
    assert masks_read(reads) == []
    assert cached == uncached
    assert 0 < len(cached.names) < COUNT  # type: ignore[attr-defined]
    pairs = zip(uncached.fixed_set(32, 32, 5, 0), cached.fixed_set(32, 32, 5, 0), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_polarity_is_cached(tmp_path: Path, scan_cache: LocalStorage, reads: list[str]) -> None:
    for number in range(5):
        hole = make_mask("box", 64, 64, np.random.default_rng(number))
        Image.fromarray(255 - 255 * hole).save(tmp_path / f"{number}.png")
    assert scan(tmp_path, scan_cache).inverted
    reads.clear()
    assert "black = hole" in open_masks(str(tmp_path), scan_cache).describe()
    assert masks_read(reads) == []


def test_a_scan_works_when_the_cache_is_not_writable(
    folder: Path, scan_cache: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(LocalStorage, "write", disk_full)
    assert len(scan(folder, scan_cache).hole_fractions) == COUNT
    file = folder.parent / "file"
    file.write_text("not a folder")
    assert len(scan(folder, LocalStorage(str(file / "cache"))).hole_fractions) == COUNT


@pytest.mark.parametrize("damage", [b"", b"{", b'{"masks": {}}', b'{"inverted": 1, "masks": [1]}', b"[1]"])
def test_a_damaged_cache_is_rebuilt(folder: Path, scan_cache: LocalStorage, damage: bytes) -> None:
    first = scan(folder, scan_cache)
    (cache_file,) = Path(scan_cache.uri, "masks").iterdir()
    cache_file.write_bytes(damage)
    assert scan(folder, scan_cache) == first
    assert json.loads(cache_file.read_text())["masks"].keys() == first.hole_fractions.keys()


def test_progress_is_reported_for_every_mask(folder: Path) -> None:
    reports: list[tuple[int, int]] = []
    MaskFolder(open_storage(folder)).scan(progress=lambda done, total: reports.append((done, total)))
    assert reports == [(n, COUNT) for n in range(1, COUNT + 1)]


def save(folder: Path, name: str, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.uint8)).save(folder / name)


def test_unusable_masks_are_named_with_a_hint(folder: Path) -> None:
    save(folder, "black.png", np.zeros((64, 64)))
    with pytest.raises(
        ValueError, match=r"^mask black.png in .*masks: no hole: all of it is black.*remove it$"
    ):
        scan(folder)
    scan(folder, band=[0, 0.9])  # masks outside the band are not used
    classes = np.zeros((64, 64))
    classes[:20], classes[30:40] = 1, 2
    save(folder, "classes.png", classes)
    (folder / "empty.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"^3 of 15 masks .*black.png: no hole.*classes.png: .*0 \(.*"
    ) as error:
        scan(folder)
    assert "empty.png: empty file" in str(error.value)
    assert "--hole VALUE, and repair or remove the others" in str(error.value)
    for number in range(20):
        save(folder, f"{number + 100}.png", classes)
    with pytest.raises(ValueError, match=r"23 of 35 masks .* 100.png, 101.png, .*; and 19 more; ") as error:
        scan(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"mask classes.png in .*hole: VALUE"):
        mask_folders(str(folder))[str(folder)].folder.read("classes.png")


def test_a_white_mask_has_no_hole_in_a_folder_where_black_is_the_hole(folder: Path) -> None:
    for path in folder.glob("[0-9]*.png"):
        save(folder, path.name, 255 - 255 * read_mask(path))
    save(folder, "white.png", np.full((64, 64), 255))
    with pytest.raises(ValueError, match=r"white.png in .*all of it is white, .*invert: false"):
        scan(folder)


def test_a_hole_value_that_no_mask_has_is_an_error(folder: Path) -> None:
    assert scan(folder, hole="#ff0000").hole_fractions == scan(folder).hole_fractions
    with pytest.raises(ValueError, match=r"hole: #00ff00 is in no mask of .*: 00.png has the values #000000"):
        scan(folder, hole=["red", "#00ff00"])
    save(folder, "other.png", 255 * np.eye(64))
    with pytest.raises(ValueError, match=r"other.png in .*no hole: no #ff0000 in it, the values 0 "):
        scan(folder, hole="red")


def test_masks_of_a_bucket_are_cached_by_their_etags(
    folder: Path, scan_cache: LocalStorage, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = open_storage(s3)
    for path in folder.glob("*.png"):
        bucket.write(f"masks/{path.name}", path.read_bytes())
    first = scan(f"{s3}/masks", scan_cache)
    assert first.hole_fractions == scan(folder).hole_fractions
    monkeypatch.setattr(mask_folder, "read_mask_and_matches", None)  # fails if a mask is read again
    assert scan(f"{s3}/masks", scan_cache) == first
    monkeypatch.undo()


def test_specs_are_checked_without_reading_masks(folder: Path, reads: list[str]) -> None:
    check_mask_spec({str(folder): {"hole": 2, "weight": 2}, "brush": 1}, 64)
    assert masks_read(reads) == []
    with pytest.raises(ValueError, match="hole: 'reddish' is not valid"):
        check_mask_spec({str(folder): {"hole": "reddish"}}, 64)
    with pytest.raises(ValueError, match="no mask images"):
        check_mask_spec(f"{folder}/none", 64)
    assert make_mask_specs(["brush", str(folder)], [1]) == ["brush", {str(folder): {"hole": [1]}}]
    with pytest.raises(ValueError, match="hole: 1 applies to mask folders only, not to brush"):
        make_mask_specs(["brush"], 1)
    source = open_masks({str(folder): {"hole": "red"}})
    assert source.describe() == f"{COUNT} masks of {folder} (hole: #ff0000)"
    assert parse_hole_values("red") == source.hole  # type: ignore[attr-defined]
