"""The notebooks of docs/examples, executed with few steps and on a small sweep's result."""

from __future__ import annotations

from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from pipelines.recipe.load import load_recipe
from pipelines.sweeps.results import FAILED, FINISHED, SweepResult, TrialRecord, best_recipe_file
from pipelines.sweeps.space import best_recipe, iter_settings
from support.cluster_harness import ROOT, clean_environment

NOTEBOOKS = sorted((ROOT / "docs/examples").glob("*.ipynb"))
MAX_BYTES = 20_000  # of a notebook: no stored outputs
PSNR, FD = "psnr_rgb_hole", "fd"

pytestmark = pytest.mark.timeout(240)


def execute(name: str, folder: Path, **parameters: object) -> list[str]:
    """Run a notebook in a folder, with other values in its cell tagged `parameters`; returns the cells' output as text."""
    notebook = nbformat.read(ROOT / f"docs/examples/{name}.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    environment = clean_environment() | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")}
    client = NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert all(output.output_type != "error" for output in outputs)
    return [output.get("text") or output["data"].get("text/plain", "") for output in outputs]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_has_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MAX_BYTES
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.soak  # two runs, each with a Ray of its own
def test_two_versions_are_trained_compared_and_filled_with(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").symlink_to(photographs)
    overrides = [
        "data.margin=4",
        "data.partition_size=72",
        "data.max_reject_fraction=0.2",
        "train={checkpoint_every: 10, log_every: 5}",
        "evaluate={max_photos: 8, distance: null, grid_rows: 1}",
    ]
    outputs = execute(
        "from-photographs-to-comparison", tmp_path, size=32, steps=10, lambdas=[0, 0.1], overrides=overrides
    )
    text = "\n".join(outputs)
    assert "A: notebook_encoder/1" in text
    assert "B: notebook_encoder/2" in text
    assert (tmp_path / "compared.png").stat().st_size > 1000


def test_a_sweep_is_read(tmp_path: Path) -> None:
    recipe = load_recipe("edge_connect-sigma", ["data.source=photos"])
    assert recipe.sweep
    rng = np.random.default_rng(0)
    trials = [
        TrialRecord(i, values, FINISHED, steps=800, scores={PSNR: 17 + rng.random(), FD: 200 + i})
        for i, values in enumerate(iter_settings(recipe))
    ]
    trials.append(TrialRecord(len(trials), trials[0].values, FAILED, "the loss is not finite"))
    fields = {path: domain.model_dump(exclude_none=True) for path, domain in recipe.sweep.fields.items()}
    baselines = {"telea": {PSNR: 17.85, FD: 869.4}}
    result = SweepResult(recipe.name, "edge_connect", fields, (PSNR, FD), tuple(trials), baselines)
    assert result.best_group
    folder = tmp_path / "runs/work/0123456789abcdef-sweep/a1"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(result.to_json())
    yaml = best_recipe(recipe, result.best_group.values).to_yaml()
    (folder / best_recipe_file(result.name)).write_text(yaml)
    text = "\n".join(execute("reading-a-sweep", tmp_path))
    assert f"{len(trials)} trials of edge_connect" in text
    assert "the loss is not finite" in text
    assert f"best: {result.best_group.values}" in text
    assert "edges:" in text
