"""What a version's page reads from the storage: intervals and untrained methods by band, and curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipelines.evaluation.comparison import bca_interval
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.methods import baseline_methods
from pipelines.evaluation.results import EvaluationResult
from pipelines.recipe import EvaluationConfig
from pipelines.registry.step import metrics_by_band
from pipelines.studio.registry_snapshot import VersionSummary
from pipelines.studio.score_views import band_panels, score_tables
from pipelines.studio.version_details import stored_curves, stored_scores
from pipelines.training.curves import TrainingCurves

KEY = "97e9597f26251f49-register-one"


@pytest.fixture(scope="module")
def evaluation() -> EvaluationResult:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (4, 4, 3), np.uint8) for _ in range(40)]
    photos = [
        (str(i), cv2.resize(part, (32, 32), interpolation=cv2.INTER_CUBIC)) for i, part in enumerate(noise)
    ]
    methods = {name: baseline_methods()[name] for name in ("telea", "mean_colour")}
    methods["one"] = methods["mean_colour"]
    config = EvaluationConfig(masks=("brush", "center"), distance=None, grid_rows=1)
    return evaluate(methods, photos, config)


@pytest.fixture
def storage(tmp_path: Path, evaluation: EvaluationResult) -> Path:
    """A storage with the manifests of one registered version."""

    def write(key: str, data: bytes) -> None:
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    inputs = {"evaluate": "18bb560a8d0e421e-evaluate", "train-one": "0815f5b6f03ff93f-train-one"}
    values: dict[str, Any] = {
        KEY: {"inputs": inputs, "config": {"model_key": "one"}, "value": {}},
        inputs["evaluate"]: {"value": {"folder": "work/e/a1"}},
        inputs["train-one"]: {"value": {"weights": "work/t/a1"}},
    }
    for key, record in values.items():
        write(f"manifests/{key}.json", json.dumps(record).encode())
    evaluation.save(lambda key, data: write(f"work/e/a1/{key}", data))
    curves = TrainingCurves(((1, {"loss": 1.0}), (2, {"loss": 0.5})), (("train", 0, 2),))
    write("work/t/a1/curves.json", curves.to_json().encode())
    return tmp_path


def version(evaluation: EvaluationResult, key: str = KEY) -> VersionSummary:
    return VersionSummary(
        *("faces", "1", (), "2026-11-30T12:00:00+00:00", "ab12", "m-1", "glcic", 32, None, "demo", ""),
        *("psnr_rgb_hole", {"step_key": key}, metrics_by_band(evaluation, "one"), "", "", "", "", "", "", ""),
    )


def test_bands_have_intervals_from_the_storages_evaluation(
    storage: Path, evaluation: EvaluationResult
) -> None:
    one = version(evaluation)
    stored = stored_scores(str(storage), one, {})
    assert stored.by_band
    assert set(stored.baselines) == {"Telea", "the mean colour"}
    bands = evaluation.bands["brush"]
    counts = {band: bands.count(band) for band in set(bands)}
    assert stored.counts["brush"] == counts | {"all": 40}
    band = max(counts, key=lambda name: counts[name])
    values = evaluation.values["brush"]["one"]["psnr_rgb_hole"]
    expected = bca_interval(np.array([values[i] for i in range(40) if bands[i] == band], np.float64))
    found = stored.intervals[f"brush/{band}/psnr_rgb_hole"]
    assert expected is not None
    assert (found.low, found.high) == pytest.approx(expected)

    sections = dict(band_panels(one, stored))
    panel = sections["brush"][0]
    assert (panel.title, panel.points[0].band, panel.points[0].count) == ("PSNR hole", "all", 40)
    assert panel.baselines["Telea"][band] == pytest.approx(
        evaluation.score("telea", "psnr_rgb_hole", "brush", band)
    )
    assert [point.band for point in sections["center"][0].points] == ["all"], "its only band is all of it"
    table = score_tables(one, stored)[0]
    assert (table.masks, table.rows[0].title, table.rows[-1].title) == (
        "brush",
        "all holes",
        "the mean colour",
    )
    assert table.rows[0].cells[0] is not None
    assert table.rows[0].cells[0].low is not None


def test_without_the_storage_only_recorded_intervals_are_known(
    tmp_path: Path, evaluation: EvaluationResult
) -> None:
    metadata = {
        "intervals": {"brush/psnr_rgb_hole": [16.0, 18.0]},
        "baselines": {"telea": {"brush/psnr_rgb_hole": 19.0}},
        "photographs": {"brush": {"0-10": 30, "10-20": 10}},
    }
    stored = stored_scores(str(tmp_path), version(evaluation), metadata)
    assert not stored.by_band
    assert list(stored.intervals) == ["brush/psnr_rgb_hole"]
    assert stored.counts == {"brush": {"0-10": 30, "10-20": 10, "all": 40}}
    assert list(stored.baselines) == ["Telea"]
    assert stored_scores(str(tmp_path), version(evaluation), {}).intervals == {}
    assert stored_curves(str(tmp_path), version(evaluation)) is None


@pytest.mark.parametrize(
    "key", ["", "../../etc/passwd", "97e9597f26251f49-../x", "x" * 300, "97e9597f26251f49-other"]
)
def test_a_tag_names_no_other_file_of_the_storage(
    storage: Path, evaluation: EvaluationResult, key: str
) -> None:
    (storage / "secret.json").write_text(json.dumps({"inputs": {}}))
    one = version(evaluation, key)
    assert not stored_scores(str(storage), one, {}).by_band
    assert stored_curves(str(storage), one) is None


def test_a_damaged_evaluation_is_as_none(storage: Path, evaluation: EvaluationResult) -> None:
    (storage / "work/e/a1/evaluation.json").write_text("[")
    assert not stored_scores(str(storage), version(evaluation), {}).by_band


def test_curves_come_from_the_storage(storage: Path, evaluation: EvaluationResult) -> None:
    curves = stored_curves(str(storage), version(evaluation))
    assert curves is not None
    assert curves.points == ((1, {"loss": 1.0}), (2, {"loss": 0.5}))
