"""model.json: its fields, byte-identical copies, and invalid records; and the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.records import RecordError
from pipelines.evaluation.model_methods import model_method
from pipelines.weights import INFO_FILE, CheckpointInfo, load_weights, save_weights
from support.small_models import build_small

TRAINED = {  # as release 0.1.0 wrote it; sorted
    "edge_source": "full",
    "hole_range": [0.25, 0.25],
    "masks": {"center": 1.0},
    "name": "edge_connect",
    "options": {"lambda_p": 0, "lr": 0.002, "residual_blocks": 1, "width": 0.03125},
    "seed": 0,
    "sigma": 1.5,
    "sigmas": [1.5, 2],
    "size": 64,
    "steps": 60,
}
REGISTERED = TRAINED | {"metric": "psnr_rgb", "model": "edge_connect", "needs_edges": True, "sweep": None}


@pytest.mark.parametrize("record", [TRAINED, REGISTERED, TRAINED | {"sigma": None, "seed": 7, "size": None}])
def test_a_copy_has_the_same_text(record: dict[str, Any]) -> None:
    assert json.dumps(CheckpointInfo.from_record(record, "x").as_json()) == json.dumps(
        dict(sorted(record.items()))
    )


def test_fields() -> None:
    info = CheckpointInfo.from_record(REGISTERED, "x")
    assert (info.sigma, info.sigmas, info.hole_range, info.steps) == (1.5, (1.5, 2), (0.25, 0.25), 60)
    assert (info.needs_edges, info.takes_edges, info.imported) == (True, None, None)
    assert info.extra == {"metric": "psnr_rgb", "sweep": None}
    assert CheckpointInfo.from_record({"name": "glcic"}, "x") == CheckpointInfo("glcic")
    updated = replace(CheckpointInfo.from_record(TRAINED | {"steps": None}, "x"), steps=80)
    assert updated.as_json() == TRAINED | {"steps": 80}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"name": "glcic", "size": "32"}', "size is '32', should be a whole number"),
        ('{"name": "glcic", "steps": true}', "steps is True, should be a whole number"),
        ('{"name": "glcic", "hole_range": [0.1]}', r"hole_range\[1\]"),
        ('{"name": "glcic", "options": [1]}', "options should be an object with named fields"),
        ('{"name": 7}', "name is 7, should be text"),
        ('{"size": 32}', "name is missing"),
        ("[1]", "is not an object with named fields"),
        ('{"name": ', "is not JSON"),
    ],
)
def test_invalid_records_are_refused(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / INFO_FILE).write_text(text)
    with pytest.raises(RecordError, match=problem) as error:
        load_weights(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / INFO_FILE}, ")
    assert "\n" not in str(error.value)


def test_save_and_load_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_small("edge_connect")
    info = CheckpointInfo(model.name, vars(model.options), size=32, hole_range=(0.1, 0.2))
    assert save_weights(tmp_path, model, {}, info) == ["model.safetensors", "model.json"]
    text = json.dumps(info.as_json(), indent=1, sort_keys=True) + "\n"
    assert (tmp_path / INFO_FILE).read_text() == text
    loaded_model, loaded_info = load_weights(tmp_path)
    assert loaded_info == info
    assert all(
        torch.equal(value, loaded_model.state_dict()[key]) for key, value in model.state_dict().items()
    )
    with pytest.raises(ValueError, match="edge_connect takes edges, but its model"):
        model_method(loaded_model, loaded_info)
