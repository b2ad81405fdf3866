"""Executes the notebooks of docs/examples."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from support.cluster_harness import ROOT, clean_environment


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
