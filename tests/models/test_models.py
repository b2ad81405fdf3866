"""Looking models up by name, and registering models of other packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import models
from models import list_models, model_class, register, takes_edges, unregister

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("name", list_models())
def test_every_listed_name_is_its_class_name_attribute(name: str) -> None:
    assert model_class(name).name == name


@pytest.mark.slow
def test_child_processes_know_a_registered_model(tiny: str) -> None:
    assert tiny in list_models()
    code = f"import models; print(models.model_class({tiny!r}), models.takes_edges({tiny!r}, {{}}))"
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    output = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output == "<class 'support.tiny_model.TinyModel'> False\n"
    unregister(tiny)
    with pytest.raises(ValueError, match="unknown model 'tiny'"):
        model_class(tiny)


@pytest.mark.slow
def test_models_of_installed_packages_are_entry_points(tmp_path: Path) -> None:
    package = tmp_path / "tiny-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[inpaint.models]\ntiny = support.tiny_model:TinyModel\n")
    code = "import models; print(models.model_class('tiny').name, 'tiny' in models.list_models())"
    paths = os.pathsep.join(map(str, [tmp_path, TESTS, TESTS.parent]))
    output = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output == "tiny True\n"


@pytest.mark.parametrize(
    ("name", "class_path", "message"),
    [
        ("glcic", "support.tiny_model:TinyModel", "the model name 'glcic' is taken"),
        ("my model", "support.tiny_model:TinyModel", "'my model' is not a model name"),
        ("mine", "support.tiny_model.TinyModel", "give module:Class"),
        ("mine", "__main__:Mine", "give module:Class, of a module that workers can import"),
        ("mine", "support.nowhere:Mine", "cannot be imported from support.nowhere:Mine: No module named"),
        ("mine", "support.tiny_model:Mine", "cannot be imported from support.tiny_model:Mine: .*Mine"),
        ("mine", "support.tiny_model:NAME", "is not a subclass of models.base.Model"),
        ("mine", "support.tiny_model:TinyModel", "the `name` of support.tiny_model:TinyModel is 'tiny'"),
    ],
)
def test_invalid_registrations_give_one_line_errors(
    name: str, class_path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(models.MODELS_ENV_VAR, "")

    def register_and_load() -> None:
        register(name, class_path)
        model_class(name)

    with pytest.raises(ValueError, match=message) as error:
        register_and_load()
    assert "\n" not in str(error.value)


def test_a_malformed_environment_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(models.MODELS_ENV_VAR, "tiny")
    with pytest.raises(ValueError, match=r"INPAINT_MODELS: 'tiny' is not of the form NAME=MODULE:CLASS"):
        model_class("tiny")


def test_takes_edges_does_not_load_torch() -> None:
    code = (
        "import sys, models\n"
        "for name in models.list_models():\n"
        "    models.takes_edges(name, {})\n"
        "print('torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "False\n"
    assert takes_edges("edge_connect", {})
    assert not takes_edges("edge_connect", {"edge_input": "none"})
    assert takes_edges("deepfill_v2", {"guided": True})
