"""Frozen mask sets: the same bytes twice, the same masks as the source, and errors for damaged and other files."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.frozen_masks import (
    FrozenManifest,
    FrozenMasks,
    FrozenSetError,
    freeze_masks,
    is_frozen_set,
    load_frozen_set,
    masks_digest,
)
from data_prep.hole_areas import hole_area_band
from data_prep.masks import (
    check_mask_spec,
    check_training_masks,
    fixed_masks,
    is_mask_folder,
    make_mask_specs,
    mask_folders,
    open_masks,
    read_mask,
)

Members = list[tuple[str, bytes]]
SPEC: dict[str, dict[str, object]] = {"lama_thick": {"weight": 2}, "half": {}}
COUNT, SIZE, SEED = 12, 48, 5


def freeze(path: str | Path, **changed: int) -> FrozenManifest:
    arguments = {"count": COUNT, "size": SIZE, "seed": SEED} | changed
    return freeze_masks(open_masks(SPEC), SPEC, **arguments, uri=str(path))[0]


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    path = tmp_path / "set.tar"
    freeze(path)
    return path


def read_members(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def write_members(path: Path, members: Members) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_set_made_twice_has_the_same_bytes(frozen: Path, tmp_path: Path) -> None:
    freeze(tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == frozen.read_bytes()
    freeze(tmp_path / "seed.tar", seed=SEED + 1)
    assert (tmp_path / "seed.tar").read_bytes() != frozen.read_bytes()


def test_its_masks_are_those_of_the_source(frozen: Path) -> None:
    expected = fixed_masks(SPEC, SIZE, SIZE, COUNT, SEED)
    masks = open_masks(str(frozen))
    assert isinstance(masks, FrozenMasks)
    for seed in (0, 7):  # the seed of an evaluation changes nothing
        assert all(
            np.array_equal(a, b)
            for a, b in zip(masks.fixed_set(SIZE, SIZE, COUNT, seed), expected, strict=True)
        )
    assert all(mask.dtype == np.uint8 and mask.flags.writeable for mask in masks.fixed_set(SIZE, SIZE, 3, 0))
    manifest = masks.manifest
    assert manifest.digest == masks_digest(expected)
    assert manifest.masks == SPEC
    assert manifest.hole_fractions == tuple(float(mask.mean()) for mask in expected)
    bands = [hole_area_band(mask) for mask in expected]
    assert manifest.bands == {band: bands.count(band) for band in sorted(set(bands))}
    assert (
        f"{COUNT} frozen masks of {frozen} (lama_thick and half, seed 5, digest {manifest.digest[:12]})"
        == (masks.describe())
    )
    assert pickle.loads(pickle.dumps(masks)) == masks


def test_it_is_a_webdataset_of_pngs(frozen: Path, tmp_path: Path) -> None:
    members = read_members(frozen)
    assert [name for name, _ in members] == ["manifest.json", *(f"{n:06d}.png" for n in range(COUNT))]
    expected = fixed_masks(SPEC, SIZE, SIZE, COUNT, SEED)
    for (_, png), mask in zip(members[1:], expected, strict=True):
        assert np.array_equal(read_mask(png), mask)  # as any program reads it: white is the hole
    with tarfile.open(frozen) as tar:
        assert {(info.mtime, info.uid, info.gid, info.mode) for info in tar} == {(0, 0, 0, 0o444)}
        tar.extractall(tmp_path / "folder", filter="data")
    unpacked = open_masks(str(tmp_path / "folder"))
    assert len(unpacked.fixed_set(SIZE, SIZE, COUNT, 0)) == COUNT


def test_a_set_is_never_replaced_by_another(frozen: Path) -> None:
    before = frozen.read_bytes()
    _, written = freeze_masks(open_masks(SPEC), SPEC, COUNT, SIZE, SEED, str(frozen))
    assert not written
    with pytest.raises(
        ValueError, match=r"set\.tar exists and is not this set of masks: remove it, or name another"
    ):
        freeze(frozen, seed=SEED + 1)
    assert frozen.read_bytes() == before


def test_masks_of_a_folder_and_of_a_set_can_be_frozen(frozen: Path, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(255 * (rng.random((30, 40)) < 0.3).astype(np.uint8)).save(folder / f"{number}.png")
    for name, source in (("of_folder", str(folder)), ("of_set", str(frozen))):
        freeze_masks(open_masks(source), {source: {}}, 8, SIZE, 3, str(tmp_path / f"{name}.tar"))
        masks = load_frozen_set(str(tmp_path / f"{name}.tar")).fixed_set(SIZE, SIZE, 8, 0)
        assert all(
            np.array_equal(a, b) for a, b in zip(masks, fixed_masks(source, SIZE, SIZE, 8, 3), strict=True)
        )


@pytest.mark.parametrize(
    ("size", "count", "words"),
    [
        (
            (SIZE, SIZE),
            COUNT + 1,
            "12 masks for 13 photographs: freeze a set of --count 13, or score 12 photographs",
        ),
        ((SIZE, 64), 1, "masks of 48 x 48 pixels, not 64 x 48 as the photographs: score at --size 48"),
        ((64, 64), 1, "or freeze masks of the photographs' size"),
    ],
)
def test_too_few_masks_and_another_size_are_errors(
    frozen: Path, size: tuple[int, int], count: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as error:
        fixed_masks(str(frozen), *size, count, 0)
    assert "\n" not in str(error.value)
    assert str(frozen) in str(error.value)


def flip_a_pixel(members: Members) -> Members:
    with Image.open(io.BytesIO(members[4][1])) as image:
        pixels = np.asarray(image).copy()
    pixels[0, 0] = ~pixels[0, 0]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return [*members[:4], (members[4][0], file.getvalue()), *members[5:]]


def edit_manifest(**changed: object) -> Callable[[Members], Members]:
    def edit(members: Members) -> Members:
        return [(members[0][0], json.dumps(json.loads(members[0][1]) | changed).encode()), *members[1:]]

    return edit


DAMAGES: dict[str, tuple[Callable[[Members], Members], str]] = {
    "a flipped pixel": (
        flip_a_pixel,
        r"damaged \(its masks have the digest \w{12}, the manifest \w{12}\): copy it again",
    ),
    "another digest": (edit_manifest(digest="0" * 64), "the manifest 000000000000"),
    "two masks exchanged": (
        lambda m: [*m[:1], (m[1][0], m[2][1]), (m[2][0], m[1][1]), *m[3:]],
        "its masks have the digest",
    ),
    "a mask is missing": (lambda m: m[:-1], r"damaged \(it has 11 of 12 masks\)"),
    "a mask too many": (lambda m: [*m, ("x.png", b"")], r"damaged \(it has 13 of 12 masks\)"),
    "another order": (lambda m: [m[0], m[2], m[1], *m[3:]], "000001.png stands in the place of 000000.png"),
    "no PNG": (lambda m: [*m[:3], (m[3][0], b"text"), *m[4:]], "000002.png is not a readable PNG"),
    "half a PNG": (lambda m: [*m[:3], (m[3][0], m[3][1][:60]), *m[4:]], "000002.png is not a readable PNG"),
    "another size": (edit_manifest(size=64), "000000.png is not 64 x 64 pixels"),
    "no manifest": (lambda m: m[1:], "is a tar without manifest.json, not a frozen mask set: make one with"),
    "no masks": (lambda m: [], "is a tar without manifest.json"),
    "another manifest": (lambda m: [(m[0][0], b"{}"), *m[1:]], "is not a frozen mask set: .*is missing"),
    "another format": (
        edit_manifest(version=2),
        "version 2; this release reads 'inpaint frozen masks', version 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_set_is_an_error_in_one_line(frozen: Path, damage: str) -> None:
    edit, words = DAMAGES[damage]
    write_members(frozen, edit(read_members(frozen)))
    with pytest.raises(FrozenSetError, match=words) as error:
        load_frozen_set(str(frozen))
    assert "\n" not in str(error.value)
    assert str(frozen) in str(error.value)


@pytest.mark.parametrize("kept", [0.1, 0.35, 0.5, 0.9])
def test_a_truncated_set_is_an_error(frozen: Path, kept: float) -> None:
    data = frozen.read_bytes()
    end = data.rindex(b".png\0")  # without the padding at the end, which holds nothing
    frozen.write_bytes(data[: int(kept * end)])
    with pytest.raises(FrozenSetError, match=r"damaged|without manifest"):
        load_frozen_set(str(frozen))


def test_other_files_and_names_are_errors(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("no tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    for name, words in (
        ("text.tar", "is not a tar, so not a frozen mask set: make one with `inpaint masks freeze"),
        ("empty.tar", "is not a tar"),
        ("none.tar", "does not exist: make one with"),
    ):
        with pytest.raises(FrozenSetError, match=words):
            open_masks(str(tmp_path / name))
    for name, words in (("set.zip", "ends with .tar"), (".tar", "give the frozen mask set a name")):
        with pytest.raises(ValueError, match=words):
            freeze(tmp_path / name)


def test_a_set_is_for_evaluations_and_has_no_options(frozen: Path) -> None:
    name = str(frozen)
    check_mask_spec(name, SIZE)
    with pytest.raises(ValueError, match="masks of 48 x 48 pixels, not 64 x 64"):
        check_mask_spec(name, 64)
    with pytest.raises(
        ValueError, match=r"is for evaluation; to train on its masks unpack them into a folder \(tar xf\)"
    ):
        check_training_masks({name: 1, "center": 1}, SIZE)
    check_training_masks("center", SIZE)
    with pytest.raises(ValueError, match="has no option 'invert'; it has no options"):
        open_masks({name: {"invert": True}})


def test_names_that_end_with_tar_are_sets_unless_they_are_folders(tmp_path: Path, frozen: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    assert is_frozen_set("s3://bucket/thick.TAR")
    assert is_frozen_set(str(frozen))
    assert not is_mask_folder(str(frozen))
    assert mask_folders(str(frozen)) == {}
    assert not is_frozen_set(str(tmp_path / "folder.tar"))
    assert is_mask_folder(str(tmp_path / "folder.tar"))
    assert make_mask_specs([str(frozen)], None) == [str(frozen)]
    with pytest.raises(ValueError, match="applies to mask folders only"):
        make_mask_specs([str(frozen)], 2)


def test_a_set_in_a_bucket(s3: str, frozen: Path) -> None:
    freeze(f"{s3}/sets/set.tar")
    remote = load_frozen_set(f"{s3}/sets/set.tar")
    local = load_frozen_set(str(frozen))
    assert (remote.manifest, remote.packed) == (local.manifest, local.packed)
    with pytest.raises(FrozenSetError, match="does not exist"):
        load_frozen_set(f"{s3}/sets/none.tar")
