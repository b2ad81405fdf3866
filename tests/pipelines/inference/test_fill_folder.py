"""Filling a folder: which mask belongs to which photograph, failures, resuming, formats, and nothing half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from models.base import Model
from pipelines.inference import fill_tasks
from pipelines.inference.fill import fill
from pipelines.inference.fill_folder import (
    FillOptions,
    FillOutcome,
    FillSettings,
    FolderResult,
    fill_folder,
    fill_here,
    model_digest,
)
from pipelines.inference.fill_record import RECORD_FILE, open_record
from pipelines.inference.fill_tasks import ModelSource, RayFillRunner, load_source
from pipelines.inference.folder_plan import FillJob, plan_folder
from pipelines.inference.writing import WriteError
from pipelines.registry import LoadedModel, load_model
from pipelines.weights import CheckpointInfo, save_weights
from support.inpainting import hole_mask, loaded_model, photograph
from support.mlflow_stores import Killed


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with four photographs in `photos` and their masks in `masks`."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.png", "b b.png", "sub/c.png", "sub/deep/é.png")):
        save_photo(tmp_path / "photos" / name, seed)
        mask = tmp_path / "masks" / name
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(hole_mask(), seed, axis=1)).save(mask)
    return tmp_path


def save_photo(path: Path, seed: int = 0, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photograph(seed=seed)).save(path, **options)


def run(
    model: LoadedModel | None = None, masks: str = "masks", out: str = "out", **options: Any
) -> FolderResult:
    return fill_folder(model or loaded_model(), "photos", masks, out, **options)


def files(folder: Path) -> dict[str, bytes]:
    """The written photographs: name -> bytes."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != RECORD_FILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def modification_times(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in files(folder)}


def stopping_after(count: int) -> Callable[..., Iterator[FillOutcome]]:
    """A runner that is killed when it has filled `count` photographs."""

    def run_jobs(
        model: LoadedModel, settings: FillSettings, jobs: Iterable[FillJob]
    ) -> Iterator[FillOutcome]:
        for number, outcome in enumerate(fill_here(model, settings, jobs)):
            if number == count:
                raise Killed
            yield outcome

    return run_jobs


def test_a_folder_is_filled_like_single_photographs(folders: Path) -> None:
    reports: list[tuple[str, int, int, str]] = []
    result = run(progress=lambda *now: reports.append(now))
    assert result.filled == ("a.png", "b b.png", "sub/c.png", "sub/deep/é.png")
    assert (result.skipped, result.failures, result.without_mask, result.warnings) == ((), (), (), ())
    assert result.report_lines == ("filled 4 photographs in out",)
    assert reports == [("fill", done, 4, "photographs") for done in range(5)]
    for name, data in files(folders / "out").items():
        fill(loaded_model(), f"photos/{name}", f"masks/{name}", "single.png")
        assert data == Path("single.png").read_bytes(), name
    assert not list(Path("out").rglob(".*"))


def test_masks_have_any_image_suffix_and_the_photographs_relative_path(folders: Path) -> None:
    Path("masks/a.png").rename("masks/a.TIFF")  # Pillow reads by content
    Path("masks/sub/c.png").rename("masks/c.png")
    Path("masks/notes.txt").write_text("no mask")
    save_photo(Path("photos/a.jpg"), 7)
    result = run()
    assert result.filled == ("a.jpg", "a.png", "b b.png", "sub/deep/é.png")
    assert result.without_mask == ("sub/c.png",)
    assert result.unused_masks == ("c.png",)
    assert "1 photograph without a mask: sub/c.png" in result.report_lines
    assert "1 mask without a photograph: c.png" in result.report_lines
    assert result.failures == ()


def test_one_mask_fills_all(folders: Path) -> None:
    result = run(masks="masks/a.png")
    assert len(result.filled) == 4
    fill(loaded_model(), "photos/sub/c.png", "masks/a.png", "single.png")
    assert Path("out/sub/c.png").read_bytes() == Path("single.png").read_bytes()


def test_failures_are_listed_and_the_rest_is_filled(folders: Path) -> None:
    Path("photos/broken.png").write_bytes(Path("photos/a.png").read_bytes()[:300])
    Image.fromarray(np.zeros((50, 44), bool)).save("masks/b b.png")
    Image.fromarray(hole_mask()).save("masks/broken.png")
    Path("masks/sub/c.jpg").write_bytes(b"")
    result = run()
    assert result.filled == ("a.png", "sub/deep/é.png")
    (mask, aspect), (broken, unreadable), (twice, ambiguous) = result.failures
    assert (mask, broken, twice) == ("b b.png", "broken.png", "sub/c.png")
    assert "44x50 px, the photograph 60x44: their aspect ratios must match" in aspect
    assert "photos/broken.png cannot be read as a photograph" in unreadable
    assert ambiguous == "masks has several masks of this name: sub/c.jpg, sub/c.png"
    assert "3 photographs failed; the same command tries them again:" in result.report_lines
    assert f"  broken.png: {unreadable}" in result.report_lines
    assert all("\n" not in line for line in result.report_lines)
    # mended, only these are filled
    Image.fromarray(hole_mask()).save("masks/b b.png")
    Path("masks/sub/c.jpg").unlink()
    Path("photos/broken.png").unlink()
    result = run()
    assert (result.filled, result.failures) == (("b b.png", "sub/c.png"), ())
    assert result.skipped == ("a.png", "sub/deep/é.png")
    assert result.report_lines[0] == "filled 2 photographs in out; 2 were filled before"


def test_filled_photographs_are_skipped_until_an_input_or_option_changes(folders: Path) -> None:
    run()
    before = modification_times(folders / "out")
    reports: list[tuple[str, int, int, str]] = []
    assert len(run(progress=lambda *now: reports.append(now)).skipped) == 4
    assert reports[3:] == [("check", 4, 4, "4 filled before"), ("fill", 4, 4, "photographs")]
    assert modification_times(folders / "out") == before
    save_photo(Path("photos/a.png"), 9)
    assert run().filled == ("a.png",)
    Image.fromarray(np.roll(hole_mask(), 9, axis=1)).save("masks/b b.png")
    assert run().filled == ("b b.png",)
    Path("out/sub/c.png").write_bytes(b"changed")
    Path("out/sub/deep/é.png").unlink()
    assert run().filled == ("sub/c.png", "sub/deep/é.png")
    assert run(options=FillOptions(hole_values=("255",))).skipped == ()
    assert len(run(options=FillOptions(hole_values=("255",))).skipped) == 4
    assert run(options=FillOptions(dilate=1)).skipped == ()
    assert run(loaded_model(sigma=2)).skipped == ()
    assert run(loaded_model(sigma=2), options=FillOptions(dilate=1)).skipped == ()


def test_a_killed_fill_resumes_and_ends_with_the_same_files(folders: Path) -> None:
    run(out="whole")
    with pytest.raises(Killed):
        run(run_jobs=stopping_after(2))
    assert files(folders / "out").keys() == {"a.png", "b b.png", "sub/c.png"}  # the third was not recorded
    Path("out/.inpaint-abc").write_bytes(b"half a file")
    Path("out/sub/.inpaint-def").write_bytes(b"half a file")
    record = Path("out", RECORD_FILE)
    record.write_bytes(record.read_bytes()[:-30])  # the last line is cut
    result = run()
    assert result.skipped == ("a.png",)
    assert files(folders / "out") == files(folders / "whole")
    assert len(run().skipped) == 4
    entries = [json.loads(line) for line in record.read_text().splitlines() if line.endswith("}")]
    assert {entry["out"] for entry in entries} == files(folders / "out").keys()
    assert all(entry["hole_percent"] == 6.25 and entry["model"] == "toy/1" for entry in entries)


def test_a_full_disk_ends_the_fill(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise WriteError("--out out/b b.png cannot be written: No space left on device")

    with pytest.raises(Killed):
        run(run_jobs=stopping_after(1))
    monkeypatch.setattr("pipelines.inference.writing.write_atomically", fail)
    with pytest.raises(WriteError, match="No space left"):
        run()
    monkeypatch.undo()
    monkeypatch.chdir(folders)
    assert run().skipped == ("a.png",)


def test_two_commands_do_not_write_to_one_folder(folders: Path) -> None:
    message = "another `inpaint fill` writes to out: wait until it has ended"
    with open_record(Path("out")), pytest.raises(ValueError, match=message):
        run()
    assert len(run().filled) == 4


def test_formats_are_kept_where_they_can_be_written(folders: Path) -> None:
    save_photo(Path("photos/d.webp"), lossless=True)
    save_photo(Path("photos/e.JPG"))
    save_photo(Path("photos/f.tiff"))
    Path("photos/notes.txt").write_text("no photograph")
    Path("photos/.DS_Store").write_bytes(b"\0")
    result = run(masks="masks/a.png", options=FillOptions(blend=True))
    assert files(folders / "out").keys() == {
        "a.png", "b b.png", "d.png", "e.JPG", "f.tiff", "sub/c.png", "sub/deep/é.png",
    }  # fmt: skip
    assert result.notes == (
        "1 photograph is written as PNG, as only PNG, TIFF and JPEG can be: d.webp",
        "JPEG cannot keep the known pixels identical (1 of 7 files); --format png keeps them",
        "left out: 1 companion (.DS_Store)",
        "left out: 1 side file (notes.txt)",
    )
    assert result.warnings == ()
    assert Image.open("out/e.JPG").format == "JPEG"
    run(masks="masks/a.png", out="tiffs", output_format="tiff")
    assert files(folders / "tiffs").keys() == {
        "a.tif", "b b.tif", "d.tif", "e.tif", "f.tiff", "sub/c.tif", "sub/deep/é.tif",
    }  # fmt: skip


def test_exif_and_modes_survive_as_with_single_photographs(folders: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    save_photo(Path("photos/turned.jpg"), exif=exif, quality=95)
    values = np.random.default_rng(0).integers(0, 65536, (44, 60)).astype(np.uint16)
    Image.fromarray(values).save("photos/deep.png")
    Image.fromarray(photograph()).convert("CMYK").save("photos/print.tif")
    for name in ("turned", "deep", "print"):
        Image.fromarray(hole_mask()).save(f"masks/{name}.png")
    assert run().failures == ()
    for photo, mask in (("turned.jpg", "turned"), ("deep.png", "deep"), ("print.tif", "print")):
        fill(loaded_model(), f"photos/{photo}", f"masks/{mask}.png", f"single-{photo}")
        assert Path(f"out/{photo}").read_bytes() == Path(f"single-{photo}").read_bytes()
    with Image.open("out/turned.jpg") as turned:
        assert (turned.size, turned.getexif()[0x010E]) == ((44, 60), "a description")
    with Image.open("out/deep.png") as deep:
        np.testing.assert_array_equal(np.asarray(deep)[~hole_mask()], values[~hole_mask()])
    with Image.open("out/print.tif") as printed:
        assert printed.mode == "CMYK"


def test_warnings_are_listed_by_photograph(folders: Path) -> None:
    hole = np.zeros((44, 60), bool)
    hole[4:40, 4:50] = True
    Image.fromarray(hole).save("masks/a.png")
    model, options = loaded_model(hole_range=[0.1, 0.3], size=64), FillOptions(blend=True)
    result = run(model, options=options)
    ((name, warning),) = result.warnings
    assert name == "a.png"
    assert f"warning: a.png: {warning}" in result.report_lines
    assert "larger than toy was trained for" in warning
    many = run(model, masks="masks/a.png", out="many", options=options)
    assert len(many.warnings) == 4
    assert many.report_lines[1:] == (f"warning: a.png and 3 more: {warning}",)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ("", {"out": "photos"}, "--out photos is the folder of the photographs: name another folder"),
        ("", {"out": "masks"}, "--out masks is the folder of the masks: name another folder"),
        ("", {"masks": "photos"}, "photos has the photographs, and cannot also have the masks"),
        ("", {"masks": "nowhere"}, "the masks nowhere do not exist"),
        ("", {"out": "photos/a.png"}, "--out photos/a.png is not a folder"),
        (
            "photos/b b.jpg",
            {"output_format": "png"},
            r"b b\.jpg and b b\.png would both be written to b b\.png",
        ),
        ("photos/a.webp", {}, r"a\.png and a\.webp would both be written to a\.png: rename one of them"),
        (
            "other/a.png",
            {"out": "other"},
            r"--out other has files that would be overwritten.*: a\.png; name another",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused_before_anything_is_filled(
    folders: Path, change: str, arguments: dict[str, Any], message: str
) -> None:
    if change:
        save_photo(Path(change))
    before = files(folders)
    with pytest.raises(ValueError, match=message) as error:
        run(**arguments)
    assert "\n" not in str(error.value)
    assert files(folders) == before


def test_no_photographs_and_no_matching_masks_are_errors(folders: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=r"^empty has no photographs$"):
        plan_folder("empty", "masks", "out")
    with pytest.raises(
        ValueError, match=r"no photograph of photos has a mask in empty: the mask of a\.png is a\.png"
    ):
        plan_folder("photos", "empty", "out")
    with pytest.raises(ValueError, match=r"photos/a\.png is not a folder of photographs"):
        plan_folder("photos/a.png", "masks", "out")


def test_masks_and_outputs_may_lie_among_the_photographs(folders: Path) -> None:
    Path("masks").rename("photos/masks")
    for skipped in (0, 4):
        result = fill_folder(loaded_model(), "photos", "photos/masks", "photos/filled")
        assert (len(result.filled), len(result.skipped)) == (4 - skipped, skipped)
        assert (result.without_mask, result.failures, result.notes) == ((), (), ())
    Path("photos/masks/a.png").rename("photos/one.png")
    assert len(plan_folder("photos", "photos/one.png", "out").jobs) == 11  # the others are photographs now


def test_an_output_never_overwrites_an_input(folders: Path) -> None:
    save_photo(Path("photos/photos/a.png"))
    with pytest.raises(ValueError, match=r"--out \. would overwrite photos/a\.png: name another folder"):
        plan_folder("photos", "masks/a.png", ".")


def test_a_models_digest_is_that_of_its_options_and_weights(encoder: Model) -> None:
    def digest(seed: int, version: str | None = None, **metadata: Any) -> str:
        torch.manual_seed(seed)
        program = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3))
        model = loaded_model(program, **metadata)
        return model_digest(LoadedModel(model.forward, model.name, version, model.info))

    digests = [digest(0), digest(1), digest(0, "1"), digest(0, "2"), digest(0, sigma=2.0)]
    assert len(set(digests)) == 5
    assert digest(0) == digests[0]


def test_a_versions_digest_covers_its_exported_weights(loaded: dict[str, LoadedModel]) -> None:
    digests = {name: model_digest(model) for name, model in loaded.items()}
    assert len(set(digests.values())) == 2
    program = loaded["encoder"].forward
    assert isinstance(program, torch.nn.Module)
    weight = max(program.state_dict().values(), key=torch.Tensor.numel).view(-1)
    value = weight[-1].clone()
    with torch.no_grad():
        weight[-1] += 1
        assert model_digest(loaded["encoder"]) != digests["encoder"]
        weight[-1] = value
    assert model_digest(loaded["encoder"]) == digests["encoder"]


def test_the_record_of_another_release_is_not_trusted(folders: Path) -> None:
    run()
    record = Path("out", RECORD_FILE)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    del lines[0]["sha256"]
    lines[1]["inputs"]["more"] = 1
    record.write_text("\n".join(["", "[]", "nonsense", *map(json.dumps, lines)]))
    assert len(run().skipped) == 2


def test_a_model_that_changes_meanwhile_ends_a_task(folders: Path, encoder: Model) -> None:
    Path("model").mkdir()
    info = CheckpointInfo("context_encoder", vars(encoder.options), size=32)
    save_weights(Path("model"), encoder, {}, info)
    source = ModelSource.of(load_model("model"), "model", "")
    assert source.uri == str(folders / "model")
    job = plan_folder("photos", "masks", "out").jobs[0]
    fill_task = fill_tasks._fill_task._function
    digest = model_digest(load_model("model"))
    outcome = fill_task((source, FillSettings(digest, FillOptions())), job)
    assert outcome.entry is not None
    assert outcome.entry.model == "context_encoder"
    assert Path("out/a.png").exists()
    with pytest.raises(ValueError, match=r"model has changed since this command began: run it again"):
        fill_task((source, FillSettings("another", FillOptions())), job)
    load_source.cache_clear()


def test_a_process_that_saves_no_time_starts_no_ray(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = run(run_jobs=RayFillRunner(ModelSource("nowhere", "")))
    assert len(result.filled) == 4
    assert not ray.is_initialized()
    saves_time = fill_tasks._saves_time
    cpus = len(os.sched_getaffinity(0))
    assert not saves_time(100.0, 1, 15)
    assert saves_time(100.0, 2, 15) == (cpus > 1)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert saves_time(1.0, 20, 15)
    assert not saves_time(1.0, 15, 15)
