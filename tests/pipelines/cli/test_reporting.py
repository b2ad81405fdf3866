"""What a run's report takes from the stored curves."""

from __future__ import annotations

from pathlib import Path

from data_prep.storage import open_storage
from pipelines.cli.reporting import load_curves
from pipelines.contracts import TrainOutputs
from pipelines.training.curves import CURVES_FILE, TrainingCurves


def test_the_report_of_a_training_run_has_the_findings_of_its_curves(tmp_path: Path) -> None:
    points = tuple(
        (step, {"loss/D1": 0.001 if step > 100 else 0.7, "loss/FM": 0.1}) for step in range(20, 320, 20)
    )
    stored = TrainingCurves(points, (("edge", 0, 320), ("skipped", 320, 320)))
    storage = open_storage(str(tmp_path))
    storage.write(f"weights/{CURVES_FILE}", stored.to_json().encode())
    outputs = TrainOutputs((), "weights", "", 320, None, {})
    curves = load_curves(storage, outputs, "https://mlflow/run")
    assert curves.metrics["loss/FM"][0] == (20, 0.1)
    assert curves.phases == [(0, "edge")]
    assert curves.warnings == [
        "phase edge: the discriminator has won: the loss D1 is at most 0.001 from step 120 to 300, so the generator "
        "learns nothing from it"
    ]
    healthy = TrainingCurves(points[:12], (("edge", 0, 320),))
    storage.write(f"weights/{CURVES_FILE}", healthy.to_json().encode())
    assert load_curves(storage, outputs).warnings == []
