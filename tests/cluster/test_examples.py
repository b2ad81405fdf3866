"""The notebooks of docs/examples. The one on sweeps is executed by test_sweep.py, on a real sweep."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from support.cluster_harness import ROOT
from support.notebooks import execute

NOTEBOOKS = sorted((ROOT / "docs/examples").glob("*.ipynb"))
MAX_BYTES = 20_000  # of a notebook: no stored outputs

pytestmark = pytest.mark.timeout(240)


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
