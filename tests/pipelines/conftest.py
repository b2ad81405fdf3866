"""Fixtures of the registry's tests: small models, exported once, and versions that the step of the chain registered."""

from __future__ import annotations

import copy
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from mlflow import MlflowClient
from small import liven, without_traces
from stores import Chain, Store, network_input, photograph

from models import build_model
from models.base import Model
from pipelines.registry import LoadedModel, exporting, load_model


@pytest.fixture(scope="session")
def encoder() -> Model:
    torch.manual_seed(0)
    return liven(build_model("context_encoder", size=32, width=0.0625), network_input(*photograph()))


@pytest.fixture(scope="session")
def edge_connect() -> Model:
    torch.manual_seed(0)
    return liven(build_model("edge_connect", width=0.0625, residual_blocks=1), network_input(*photograph()))


@pytest.fixture(scope="session")
def quiet_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_traces(patch)
        yield


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without experiments of ours."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def exporting_once(
    tmp_path_factory: pytest.TempPathFactory, quiet_torch: None
) -> Callable[[str], AbstractContextManager[None]]:
    """Inside, an export takes its time in one of the tests' processes only; the others copy what it made."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    export = exporting.export

    @contextmanager
    def once(name: str) -> Iterator[None]:
        kept = base / f"export-{name}"

        def export_or_copy(model: Model, folder: Path, *rest: Any) -> None:
            with FileLock(f"{kept}.lock"):
                if not kept.exists():
                    export(model, kept.with_suffix(".part"), *rest)
                    kept.with_suffix(".part").rename(kept)
            shutil.copytree(kept, folder)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exporting, "export", export_or_copy)
            yield

    return once


@pytest.fixture(scope="session")
def store(
    tmp_path_factory: pytest.TempPathFactory,
    empty: Path,
    encoder: Model,
    edge_connect: Model,
    exporting_once: Callable[[str], AbstractContextManager[None]],
) -> Store:
    store = Store.make(tmp_path_factory.mktemp("registry"), empty)
    for name, model in (("encoder", encoder), ("edges", edge_connect)):
        with exporting_once(name):
            assert store.register(model, name) == "1"
    return store


@pytest.fixture(scope="session")
def loaded(store: Store) -> dict[str, LoadedModel]:
    return {name: load_model(f"models:/{name}/1", tracking_uri=store.uri) for name in ("encoder", "edges")}


@pytest.fixture(scope="session")
def exported(store: Store) -> Path:
    """The folder of an exported encoder."""
    version = store.client.get_model_version("encoder", "1")
    logged = store.client.get_logged_model(str(version.source).rpartition("/")[2])
    return Path(logged.artifact_location.removeprefix("file://"))


@pytest.fixture
def bare(tmp_path: Path, empty: Path) -> Store:
    """A store of this test's own, with nothing in it."""
    return Store.make(tmp_path, empty)


@pytest.fixture
def quick(bare: Store, exported: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same, where exporting is a copy."""
    monkeypatch.setattr(exporting, "export", lambda model, folder, *rest: shutil.copytree(exported, folder))
    return bare


@pytest.fixture(scope="session")
def chain(
    tmp_path_factory: pytest.TempPathFactory,
    empty: Path,
    encoder: Model,
    exporting_once: Callable[[str], AbstractContextManager[None]],
) -> Chain:
    """Versions 1 to 3 of `encoder` as the chain registers them: 1 and 3 fill with white, 2 does not, and is champion."""
    chain = Chain.make(tmp_path_factory.mktemp("chain"), empty)
    white = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in list(white.networks["generator"].parameters())[-2:]:
            parameter.fill_(1.0)
    for seed, (name, model) in enumerate((("white", white), ("chain", encoder), ("white", white))):
        with exporting_once(f"{name}-{os.getpid()}"):  # this chain's runs are in it
            chain.values.append(chain.register(model, seed))
    return chain


@pytest.fixture
def registry_of_chain(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a copy of its registry, which is also MLflow's."""
    source, copied = chain.storage.path("mlflow.db") or "", tmp_path / "mlflow.db"
    with closing(sqlite3.connect(source)) as database, closing(sqlite3.connect(copied)) as target:
        database.backup(target)  # what is in its journal too
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"
