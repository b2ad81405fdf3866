"""Fixtures for the registry's tests: small models, exported once, and versions that the register step created."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from models import build_model
from models.base import Model
from pipelines.cli.main import main
from pipelines.registry import LoadedModel, load_model, registration
from support.mlflow_stores import (
    MlflowStore,
    PipelineOutputs,
    copied,
    copied_exports,
    network_input,
    photograph,
)
from support.small_models import scale_activations


@pytest.fixture(scope="session")
def encoder() -> Model:
    torch.manual_seed(0)
    return scale_activations(
        build_model("context_encoder", size=32, width=0.0625), network_input(*photograph())
    )


@pytest.fixture(scope="session")
def edge_connect() -> Model:
    torch.manual_seed(0)
    return scale_activations(
        build_model("edge_connect", width=0.0625, residual_blocks=1), network_input(*photograph())
    )


@pytest.fixture
def command_line(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `inpaint` in this process: exit status, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def store(
    tmp_path_factory: pytest.TempPathFactory,
    made_once: Callable[..., Any],
    quiet_torch: None,
    empty: Path,
    encoder: Model,
    edge_connect: Model,
) -> MlflowStore:
    """Version 1 of `encoder` and of `edges`, in a database for this process; all processes share the artifacts."""

    def make(folder: Path) -> tuple[Path, str]:
        made = MlflowStore.create(folder, empty)
        for name, model in (("encoder", encoder), ("edges", edge_connect)):
            assert made.register(model, name) == "1"
        return folder / "mlflow.db", made.run_id

    database, run = made_once("registry", make)
    uri = f"sqlite:///{copied(database, tmp_path_factory.mktemp('store') / 'mlflow.db')}"
    return MlflowStore(uri, MlflowClient(uri, registry_uri=uri), run)


@pytest.fixture(scope="session")
def loaded(store: MlflowStore) -> dict[str, LoadedModel]:
    return {name: load_model(f"models:/{name}/1", tracking_uri=store.uri) for name in ("encoder", "edges")}


@pytest.fixture(scope="session")
def exported(store: MlflowStore) -> Path:
    """The folder of an exported encoder."""
    version = store.client.get_model_version("encoder", "1")
    logged = store.client.get_logged_model(str(version.source).rpartition("/")[2])
    return Path(logged.artifact_location.removeprefix("file://"))


@pytest.fixture
def bare(tmp_path: Path, empty: Path) -> MlflowStore:
    """An empty store for this test."""
    return MlflowStore.create(tmp_path, empty)


@pytest.fixture
def quick(bare: MlflowStore, exported: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowStore:
    """An empty store in which exports are copies of one export."""
    monkeypatch.setattr(
        registration, "export_model", lambda model, folder, *rest: shutil.copytree(exported, folder)
    )
    return bare


@pytest.fixture(scope="session")
def chain(made_once: Callable[..., Any], quiet_torch: None, empty: Path, encoder: Model) -> PipelineOutputs:
    """Versions 1 to 3 of `encoder` as the chain registers them: 1 and 3 fill with white, 2 does not, and is champion.
    It is every process's: who changes its registry takes `registry_of_chain`."""

    def make(folder: Path) -> PipelineOutputs:
        made, white = PipelineOutputs.create(folder, empty), copy.deepcopy(encoder)
        with torch.no_grad():
            for parameter in list(white.networks["generator"].parameters())[-2:]:
                parameter.fill_(1.0)
        with copied_exports(folder / "exports"):
            for seed, model in enumerate((white, encoder, white)):
                made.register_outputs.append(made.register(model, seed))
        return made

    found: PipelineOutputs = made_once("chain", make)
    return found


@pytest.fixture
def registry_of_chain(chain: PipelineOutputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a copy of its registry, which is also MLflow's."""
    uri = f"sqlite:///{copied(Path(chain.storage.local_path('mlflow.db') or ''), tmp_path / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri
