"""Names that MLflow or the storage cannot use are refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.cli.main import main
from pipelines.names import check_experiment_name, check_model_name, check_run_name
from pipelines.recipe.load import RecipeError, load_recipe

MESSAGE = "is not a valid name for a registered model: use letters, digits, '_', '-' and '.'"
INVALID_NAMES = ["my model", "a/b", "a:b", "modèle", "名", "a%b", "a\n", " ", "a'b"]


@pytest.mark.parametrize("name", INVALID_NAMES)
def test_the_recipe_refuses_names_that_cannot_be_registered(name: str) -> None:
    with pytest.raises(RecipeError, match=r"models\.context_encoder\.register_as") as error:
        load_recipe("demo", [f"models.context_encoder.register_as={name!r}"])
    assert MESSAGE in str(error.value)
    with pytest.raises(ValueError, match="is not a valid name for a registered model"):
        check_model_name(name)


@pytest.mark.parametrize("command", ["run", "plan", "train", "sweep"])
def test_every_command_refuses_the_name_first(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", "models.context_encoder.register_as=my model"]
    with pytest.raises(SystemExit) as end:
        main([command, "demo", "--storage", str(tmp_path / "runs"), *options])
    assert end.value.code == 1
    captured = capsys.readouterr()
    assert MESSAGE in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_import_refuses_the_name_before_it_reads_files(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["import", "glcic", "nowhere.pth", "--register-as", "my model"])
    assert MESSAGE in capsys.readouterr().err


def test_names_that_are_paths_too_long_or_none() -> None:
    for name in (".", "..", "..x", "None", "NONE", "x" * 257):
        with pytest.raises(ValueError, match="is not a valid name for a registered model"):
            check_model_name(name)
    for name in ("x" * 256, "a.b", "v1", "0", "a..b", "_", "-"):
        assert check_model_name(name) == name
    assert load_recipe("demo", ["models.context_encoder.register_as=none"])
    for name in ("", " ", "e" * 257):
        with pytest.raises(RecipeError, match="is not a valid name for an experiment"):
            load_recipe("demo", [f"experiment={name!r}"])
    assert check_experiment_name("née / 1: ok") == "née / 1: ok"
    for name in ("", "a//b", "../up", "/a", "a/.", "n" * 201, "a\tb"):
        with pytest.raises(ValueError, match="is not a valid name for a run"):
            check_run_name(name)
    assert check_run_name("a b/née (2)") == "a b/née (2)"
