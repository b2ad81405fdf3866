"""The processes that a training starts: those it has a use for."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ray.train import ScalingConfig

from pipelines.cluster.session import PRIVATE
from pipelines.training.rendezvous import Rendezvous
from pipelines.training.trainer import Trainer


@pytest.mark.parametrize("private", [True, False])
def test_helpers_that_nobody_asks_are_not_started(private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in PRIVATE.items():
        monkeypatch.setenv(key, value if private else "")
    trainer = Trainer(
        lambda: None, backend_config=Rendezvous("gloo"), scaling_config=ScalingConfig(num_workers=1)
    )
    names = {type(each).__name__ for each in trainer._create_default_callbacks()}
    assert "DatasetsCallback" not in names
    assert ("PlacementGroupCleanerCallback" in names) == (not private)
    assert {"BackendSetupCallback", "AcceleratorSetupCallback"} <= names


def test_what_the_controller_reads_needs_no_torch() -> None:

    code = "import sys, pipelines.training.rendezvous, pipelines.training.job; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
