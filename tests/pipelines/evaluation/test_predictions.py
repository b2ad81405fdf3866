"""Pictures that another program filled: exported inputs, names, equal scores, and what is reported about the files."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut

from data_prep.masks import read_mask
from data_prep.storage import open_storage
from models import classical
from pipelines.evaluation.evaluate import evaluate, make_masks
from pipelines.evaluation.methods import Baseline
from pipelines.evaluation.predictions import (
    FolderPredictions,
    describe_predictions,
    export_inputs,
    file_stems,
    method_name,
    open_predictions,
)
from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.tables import table_text
from pipelines.recipe import EvaluationConfig

CommandLine = Callable[..., tuple[int, str, str]]
Photographs = list[tuple[str, np.ndarray]]
SIDE, COUNT = 48, 11
CONFIG = EvaluationConfig(masks=("center", "lama_thick"), distance=None, grid_rows=1)
ONE_SET = EvaluationConfig(masks=("box",), distance=None, grid_rows=1, seed=3)


@pytest.fixture(scope="module")
def photos() -> Photographs:
    picture = astronaut()
    tiles = [np.ascontiguousarray(picture[40 : 40 + SIDE, 40 * n : 40 * n + SIDE]) for n in range(COUNT)]
    return [(f"{'sub/' if n % 2 else ''}tile {n}.jpg", tile) for n, tile in enumerate(tiles)]


def save(path: Path, image: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)  # type: ignore[arg-type]


def score(
    folder: Path, photos: Photographs, config: EvaluationConfig
) -> tuple[EvaluationResult, FolderPredictions]:
    """The pictures of `folder` beside Telea's method."""
    sets = list(make_masks(config, [image for _, image in photos]))
    predictions = open_predictions(str(folder), [name for name, _ in photos], sets)
    methods = {"telea": Baseline("telea"), method_name(str(folder)): predictions}
    return evaluate(methods, photos, config), predictions


def test_the_picture_of_a_classical_method_has_its_scores_exactly(
    tmp_path: Path, photos: Photographs
) -> None:
    """A program that knows only the exported files."""
    export_inputs(photos, CONFIG, str(tmp_path / "inputs"))
    for image_file in (tmp_path / "inputs").glob("*/images/**/*.png"):
        masks, _, *name = image_file.relative_to(tmp_path / "inputs").parts
        mask_file = tmp_path / "inputs" / masks / "masks" / Path(*name)
        image, mask = cv2.imread(str(image_file)), cv2.imread(str(mask_file), cv2.IMREAD_GRAYSCALE)
        filled = classical.inpaint(np.ascontiguousarray(image[..., ::-1]), mask // 255, "telea")
        save(tmp_path / "other" / masks / Path(*name), filled)
    evaluation, predictions = score(tmp_path / "other", photos, CONFIG)
    for masks in ("center", "lama_thick"):
        assert evaluation.values[masks]["other"] == evaluation.values[masks]["telea"]
    assert describe_predictions(evaluation, "other", predictions) == []
    assert evaluation.methods == ("telea", "other")
    assert "other" in evaluation.sample_grids()[0].columns
    assert pickle.loads(pickle.dumps(predictions)) == predictions


def test_exported_images_show_nothing_of_the_hole(tmp_path: Path, photos: Photographs) -> None:
    record = export_inputs(photos, ONE_SET, str(tmp_path))
    masks = make_masks(ONE_SET, [image for _, image in photos])["box"]
    for (name, image), mask in zip(photos, masks, strict=True):
        stem = name.removesuffix(".jpg")
        exported = np.asarray(Image.open(tmp_path / "box" / "images" / f"{stem}.png"))
        assert np.array_equal(read_mask(tmp_path / "box" / "masks" / f"{stem}.png"), mask)
        assert not exported[mask == 1].any()
        assert np.array_equal(exported[mask == 0], image[mask == 0])
    assert (tmp_path / "protocol.json").is_file()
    assert record["photographs"]["tile 0"] == "tile 0.jpg"
    assert record["masks"] == {"box": "box"}


def test_the_truth_has_an_infinite_psnr_as_elsewhere(tmp_path: Path, photos: Photographs) -> None:
    for name, image in photos:
        save(
            tmp_path / "truth" / name.replace(".jpg", ".png"), image
        )  # with one mask set, without its folder
    evaluation, predictions = score(tmp_path / "truth", photos, ONE_SET)
    row = evaluation.row("truth")
    assert row.metrics["psnr_rgb_hole"] == math.inf
    assert row.exact["psnr_rgb_hole"] == COUNT
    assert row.metrics["l1_percent"] == 0
    assert "truth       exact*" in table_text(evaluation)
    assert describe_predictions(evaluation, "truth", predictions) == []


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_changed_known_pixels_are_a_warning_with_the_mean_difference(
    tmp_path: Path, photos: Photographs, kind: str
) -> None:
    masks = make_masks(ONE_SET, [image for _, image in photos])["box"]
    differences = []
    for (name, image), mask in zip(photos, masks, strict=True):
        path = tmp_path / "lossy" / Path(name).with_suffix(".jpeg" if kind == "JPEG" else ".webp")
        save(path, image, format=kind, quality=60)
        stored = np.asarray(Image.open(path).convert("RGB")).astype(float)
        differences.append(np.abs(stored - image)[mask == 0].mean())
    evaluation, predictions = score(tmp_path / "lossy", photos, ONE_SET)
    (line,) = describe_predictions(evaluation, "lossy", predictions)
    assert line.startswith(f"warning: lossy changed known pixels of {COUNT} of {COUNT} photographs, by ")
    reported = float(line.partition(", by ")[2].split()[0])
    assert reported == pytest.approx(np.mean(differences), rel=0.15)  # two digits, and another decoder
    assert "lossy changed known pixels: l1" in " ".join(table_text(evaluation).split())


def test_missing_and_unusable_files_are_listed_and_the_rest_keeps_its_scores(
    tmp_path: Path, photos: Photographs
) -> None:
    folder = tmp_path / "some"
    for name, image in photos[2:]:
        save(folder / name.replace(".jpg", ".png"), image)
    save(folder / "tile 2.png", photos[2][1][:32])
    (folder / "sub" / "tile 3.png").write_bytes(b"text")
    save(folder / "extra.png", photos[0][1])
    (folder / "notes.txt").write_text("nothing")
    evaluation, predictions = score(folder, photos, ONE_SET)
    missing, unusable, unmatched = describe_predictions(evaluation, "some", predictions)
    assert missing == "some: 2 of 11 pictures are missing: tile 0.jpg, sub/tile 1.jpg"
    assert unusable.startswith(
        "some: 2 of 11 pictures cannot be used: tile 2.png is 48x32, the photograph 48x48, sub/tile 3"
    )
    assert unmatched == "some: 1 pictures belong to no photograph: extra.png"
    assert "some is n/a: 4 of 11 photographs not completed (there is no file)" in table_text(evaluation)
    column = evaluation.values["box"]["some"]["l1_percent"]
    assert column[:4] == [None] * 4
    assert column[4:] == [0.0] * 7
    assert evaluation.row("telea").failed == 0


def test_a_folder_without_a_matching_picture_is_an_error(tmp_path: Path, photos: Photographs) -> None:
    names = [name for name, _ in photos]
    with pytest.raises(ValueError, match="is not a folder"):
        open_predictions(str(tmp_path / "none"), names, ["box"])
    save(tmp_path / "x_filled.png", photos[0][1])
    with pytest.raises(ValueError, match=r"has 1 pictures, and none belongs .* such as tile 0\.png$"):
        open_predictions(str(tmp_path), names, ["box"])
    with pytest.raises(ValueError, match=r"such as center/tile 0\.png$"):
        open_predictions(str(tmp_path), names, ["center", "box"])
    with pytest.raises(ValueError, match="need folders of different names"):
        open_predictions(str(tmp_path), names, ["a/masks", "a-masks"])
    for suffix in ("png", "jpg"):
        save(tmp_path / f"tile 0.{suffix}", photos[0][1])
    with pytest.raises(ValueError, match=r"two pictures for the photograph tile 0\.jpg: remove tile 0"):
        open_predictions(str(tmp_path), names, ["box"])


def test_names_of_files() -> None:
    assert file_stems(["a.jpg", "b/a.png", "c.v2", "d"]) == {
        "a.jpg": "a",
        "b/a.png": "b/a",
        "c.v2": "c.v2",
        "d": "d",
    }
    same_stem = ["a.jpg", "a.png", "x", "x.jpg"]
    assert file_stems(same_stem) == {name: name for name in same_stem}
    with pytest.raises(ValueError, match="2 photographs are called a"):
        file_stems(["a", "b", "a"])
    assert method_name("out/lama/") == "lama"
    assert method_name("s3://bucket/mat") == "mat"


def test_photographs_with_the_same_stem_are_told_apart(tmp_path: Path, photos: Photographs) -> None:
    pair = [("a.jpg", photos[0][1]), ("a.png", photos[1][1])]
    export_inputs(pair, ONE_SET, str(tmp_path / "inputs"))
    assert {path.name for path in (tmp_path / "inputs/box/masks").iterdir()} == {"a.jpg.png", "a.png.png"}
    for name, image in pair:
        save(tmp_path / "truth" / f"{name}.png", image)
    evaluation, _ = score(tmp_path / "truth", pair, ONE_SET)
    assert evaluation.values["box"]["truth"]["l1_percent"] == [0.0, 0.0]


def test_pictures_in_a_bucket(s3: str, photos: Photographs) -> None:
    storage = open_storage(f"{s3}/filled")
    for name, image in photos:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        storage.write(name.replace(".jpg", ".png"), file.getvalue())
    predictions = open_predictions(f"{s3}/filled", [name for name, _ in photos], ["box"])
    assert len(predictions.files) == COUNT
    assert np.array_equal(
        predictions.for_photo("tile 0.jpg", "box")(photos[0][1], photos[0][1][..., 0], None), photos[0][1]
    )


@pytest.fixture
def inpaint(tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INPAINT_CACHE", str(tmp_path / "cache"))
    for n in range(4):
        save(Path(f"photos/{n}.png"), astronaut()[: 60 + n, 50 * n : 50 * n + 70])
    return command_line


def test_the_commands_export_and_score(inpaint: CommandLine) -> None:
    status, _, error = inpaint("masks", "freeze", "brush", "--count", "4", "--size", "48", "--out", "set.tar")
    assert status == 0, error
    common = ("--images", "photos", "--masks", "set.tar")
    status, out, _ = inpaint("evaluate", *common, "--export", "inputs")
    assert status == 0
    assert "inputs: 4 photographs of 48 x 48 pixels, masks set" in out
    assert "inpaint evaluate --predictions OUT --images photos --masks set.tar --size 48" in out
    for path in Path("inputs/set/images").iterdir():
        image, mask = (
            np.asarray(Image.open(f"inputs/set/{kind}/{path.name}")) for kind in ("images", "masks")
        )
        save(Path("filled") / path.name, np.where(mask[..., None] > 0, np.uint8(90), image))
        if path.name != "3.png":
            save(Path("partly") / path.name, image)
    scoring = (*common, "--predictions", "filled", "--predictions", "partly/", "--out", "scores")
    status, out, error = inpaint("evaluate", *scoring)
    assert status == 0, error
    lines = out.splitlines()
    assert {"telea", "filled", "partly"} <= {line.split()[0] for line in lines if line.strip()}
    assert "partly: 1 of 4 pictures are missing: 3.png" in error
    assert any(line.startswith("filled: ") and "than" in line for line in lines), "a sentence, as for models"
    assert "| filled |" in Path("scores/table.md").read_text()
    assert "filled" in Path("scores/report.html").read_text()
    again = inpaint("evaluate", *scoring)
    assert again[1] == out


def test_the_command_says_what_is_missing(inpaint: CommandLine) -> None:
    common = ("evaluate", "--images", "photos", "--masks", "center")
    for arguments, words in (
        (("--out", "s"), "name a model to score, or a folder of filled pictures with --predictions"),
        (("--predictions", "photos"), "--out is missing"),
        (("--predictions", "photos", "--out", "s"), "--size is missing: without a model"),
        (("--export", "e"), "--size is missing"),
        (
            ("--export", "e", "--out", "s"),
            "--export writes the inputs of an evaluation and scores nothing: leave out --out",
        ),
        (("--predictions", "nowhere", "--out", "s", "--size", "48"), "nowhere is not a folder"),
        (
            ("--predictions", "telea", "--out", "s", "--size", "48"),
            "another method is called telea; rename the folder",
        ),
    ):
        status, _, error = inpaint(*common, *arguments)
        assert status == 1
        assert words in error
        assert not Path("s/table.md").exists()
