"""The programme of tests/gpu runs, at toy size on the CPU, with the packages that a machine with a GPU must have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.__main__ import PARTS

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(600)
@pytest.mark.slow  # trains each model for a few steps
def test_the_programme_runs_with_few_packages(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tests/support/few_packages.py",
            "--toy",
            "--seconds",
            "3600",
            "--device",
            "cpu",
            "--out",
            tmp_path,
        ],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert list(results["parts"]) == list(PARTS)
    empty = {name for name, part in results["parts"].items() if not part["rows"]}
    assert empty == {"memory", "batch_sizes", "compiled"}  # which need a GPU, or minutes
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}: passed" in page for name in PARTS)
