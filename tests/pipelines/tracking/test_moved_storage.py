"""Storages that were moved, copied or mounted twice, with MLflow's own client and real SQLite files."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as RegistryStore
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as TrackingStore

from data_prep.manifest import MANIFEST_VERSION, Manifest, write_manifest
from data_prep.preprocess import ShardOptions
from data_prep.storage import open_storage
from data_prep.uris import file_url, path_from_sqlite_url, sqlite_url
from pipelines.private.mlflow_tables import REGISTRY_TAG
from pipelines.registry.client import download_artifact, find_version, registry_client
from pipelines.tracking import runs
from pipelines.tracking.datasets import log_dataset
from pipelines.tracking.moved_storage import adopt_copy, original_registry_uri, relocate_if_moved
from pipelines.tracking.runs import Tracking, TrackingError, ensure_experiment, resolve_tracking


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@pytest.fixture
def old_storage(tmp_path: Path, empty: Path) -> Tracking:
    """A storage `old` with a run, its artifact, a dataset, and a registered version."""
    return make_storage(tmp_path / "old", empty)


def make_storage(folder: Path, empty: Path) -> Tracking:
    folder.mkdir()
    shutil.copy(empty, folder / "mlflow.db")
    tracking = resolve_tracking(None, "inpaint", str(folder))
    run = runs.open_run(tracking, "key", "run")
    client = tracking.client()
    runs.log_text(client, run, "note.txt", "of the run")
    manifest = Manifest(MANIFEST_VERSION, "photos", ShardOptions(), "0" * 64, {"train": 1}, 1, (), (), ())
    shards = open_storage(folder / "work" / "key" / "a1")
    write_manifest(shards, manifest)
    log_dataset(client, run, shards)
    model = client.create_logged_model(client.get_run(run).info.experiment_id, "model", run).model_id
    (folder / "model.txt").write_text("of the model")
    client.log_model_artifact(model, str(folder / "model.txt"))
    client.finalize_logged_model(model, "READY")
    with registry_client(tracking.uri, keep_retries=True) as registry:  # resolves models:/ in this registry
        registry.create_registered_model("model")
        registry.create_model_version("model", f"models:/{model}", run, model_id=model)
    close_databases()
    return tracking


def close_databases() -> None:
    """Close MLflow's databases, as at the end of the process that created them."""
    for store in (TrackingStore, RegistryStore):
        for engine in store._engine_map.values():
            engine.dispose()


def tracking_of(folder: Path) -> Tracking:
    return resolve_tracking(None, "inpaint", str(folder))


def read_artifacts(tracking: Tracking, to: Path) -> set[str]:
    """The artifacts of the run and of the version, read with MLflow's client."""
    run = runs.open_run(tracking, "key", "run")
    texts = {Path(tracking.client().download_artifacts(run, "note.txt", str(to))).read_text()}
    with registry_client(tracking.uri) as client:
        folder = download_artifact(find_version(client, "models:/model/1"), "", to)
    return texts | {path.read_text() for path in folder.rglob("model.txt")}


def cells_with(path: Path, text: str) -> list[str]:
    """All cells of MLflow's tables that contain the text."""
    cells = []
    with closing(sqlite3.connect(path)) as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        for table in tables:
            for row in database.execute(f'select * from "{table}"'):
                cells += [f"{table}: {cell}" for cell in row if text in str(cell)]
    return cells


@pytest.mark.parametrize("name", ["new", "r%20a?1"])
def test_artifact_uris_follow_a_moved_storage(
    old_storage: Tracking, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    old, new = tmp_path / "old", tmp_path / name
    old.rename(new)
    tracking = tracking_of(new)
    assert original_registry_uri(tracking.uri) == old_storage.uri  # so finished steps stay finished
    relocate_if_moved(tracking.uri)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"storage {new} was created as {old}" in message
    assert read_artifacts(tracking, tmp_path) == {"of the run", "of the model"}
    assert cells_with(new / "mlflow.db", str(old)) == [f"experiment_tags: {old_storage.uri}"]
    (source,) = [cell for cell in cells_with(new / "mlflow.db", "work/key") if cell.startswith("datasets")]
    assert f"{new}/work/key/a1" in source
    assert '"uri": "photos"' in source
    assert original_registry_uri(tracking.uri) == old_storage.uri
    relocate_if_moved(tracking.uri)
    assert capsys.readouterr().err == ""
    runs.log_text(tracking.client(), runs.open_run(tracking, "other", "other"), "x", "new one")
    assert not old.exists()  # nothing is written outside the storage
    close_databases()
    new.rename(tmp_path / "third")  # moved again
    third = tracking_of(tmp_path / "third")
    runs.open_run(third, "key", "run")
    assert read_artifacts(third, tmp_path) == {"of the run", "of the model"}
    assert original_registry_uri(third.uri) == old_storage.uri


def test_a_copied_storage_is_an_error_and_can_be_adopted(old_storage: Tracking, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(old, new)
    tracking = tracking_of(new)
    for call in (lambda: relocate_if_moved(tracking.uri), lambda: ensure_experiment(tracking)):
        with pytest.raises(TrackingError) as error:
            call()
        assert f"storage {new} was created as {old}, and both exist" in str(error.value)
        assert f"inpaint models adopt --tracking-uri {tracking.uri}" in str(error.value)
        assert "\n" not in str(error.value)
    relocate_if_moved(old_storage.uri)  # the original is unchanged
    path, count = adopt_copy(tracking.uri)
    assert path == new / "mlflow.db"
    assert count >= 4
    assert adopt_copy(tracking.uri) == (path, 0)
    shutil.rmtree(old)
    assert read_artifacts(tracking, tmp_path) == {"of the run", "of the model"}


def test_a_linked_storage_is_neither_moved_nor_copied(
    old_storage: Tracking, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "old").symlink_to("new")
    tracking = tracking_of(tmp_path / "new")
    relocate_if_moved(tracking.uri)
    relocate_if_moved(old_storage.uri)
    assert read_artifacts(tracking, tmp_path) == {"of the run", "of the model"}
    assert capsys.readouterr().err == ""


def test_another_storage_at_the_old_path_is_unchanged(
    old_storage: Tracking, tmp_path: Path, empty: Path
) -> None:
    (tmp_path / "old").rename(tmp_path / "new")
    second = make_storage(tmp_path / "old", empty)  # opened after close_databases
    tracking = tracking_of(tmp_path / "new")
    relocate_if_moved(tracking.uri)
    assert read_artifacts(tracking, tmp_path) == {"of the run", "of the model"}
    assert read_artifacts(second, tmp_path) == {"of the run", "of the model"}
    assert cells_with(tmp_path / "old" / "mlflow.db", str(tmp_path / "new")) == []


def test_files_in_both_folders_have_to_be_merged(old_storage: Tracking, tmp_path: Path) -> None:
    """As earlier releases left them: files of runs after the move are in the old folder."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.rename(new)
    tracking = tracking_of(new)
    client = tracking.client()
    run = client.create_run(client.get_experiment_by_name("inpaint").experiment_id).info.run_id
    client.log_text(run, "late", "late.txt")
    assert [path.name for path in old.iterdir()] == ["mlflow-artifacts"]
    with pytest.raises(TrackingError, match="has files in both: merge them with cp -a"):
        relocate_if_moved(tracking.uri)
    shutil.copytree(old, new, dirs_exist_ok=True)
    old.rename(tmp_path / "away")
    relocate_if_moved(tracking.uri)
    assert read_artifacts(tracking, tmp_path) == {"of the run", "of the model"}
    assert Path(client.download_artifacts(run, "late.txt", str(tmp_path))).read_text() == "late"


def test_a_database_apart_from_its_artifacts_is_unchanged(
    old_storage: Tracking, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fast").mkdir()
    (tmp_path / "old" / "mlflow.db").rename(tmp_path / "fast" / "mlflow.db")
    tracking = resolve_tracking(f"sqlite:///{tmp_path}/fast/mlflow.db", "inpaint", "unused")
    ensure_experiment(tracking)
    assert read_artifacts(tracking, tmp_path) == {"of the run", "of the model"}
    close_databases()
    (tmp_path / "old").rename(tmp_path / "unmounted")
    relocate_if_moved(tracking.uri)  # reading needs no artifacts
    assert capsys.readouterr().err == ""
    with pytest.raises(TrackingError, match="which does not exist: mount it, or restore its files"):
        ensure_experiment(tracking)
    assert not (tmp_path / "old").exists()


def test_a_chosen_artifact_location_is_unchanged(tmp_path: Path, empty: Path) -> None:
    (tmp_path / "old").mkdir()
    shutil.copy(empty, tmp_path / "old" / "mlflow.db")
    ensure_experiment(
        Tracking(sqlite_url(tmp_path / "old" / "mlflow.db"), "inpaint", file_url(tmp_path / "mine"))
    )
    (tmp_path / "old").rename(tmp_path / "new")
    ensure_experiment(tracking_of(tmp_path / "new"))
    assert cells_with(tmp_path / "new" / "mlflow.db", str(tmp_path / "mine"))


def test_concurrent_checks_rewrite_a_moved_storage_once(
    old_storage: Tracking, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").rename(tmp_path / "new")
    uri = tracking_of(tmp_path / "new").uri
    errors: list[BaseException] = []

    def check() -> None:
        try:
            relocate_if_moved(uri)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=check) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert capfd.readouterr().err.count("rewritten") == 1
    assert len(cells_with(tmp_path / "new" / "mlflow.db", old_storage.uri)) == 1
    assert read_artifacts(tracking_of(tmp_path / "new"), tmp_path) == {"of the run", "of the model"}


def test_a_failed_rewrite_changes_nothing(old_storage: Tracking, tmp_path: Path) -> None:
    (tmp_path / "old").rename(tmp_path / "new")
    path = tmp_path / "new" / "mlflow.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute(
            "create trigger refused before update on model_versions begin select raise(abort, 'readonly database'); end"
        )
        database.commit()
    before = cells_with(path, str(tmp_path / "old"))
    with pytest.raises(
        TrackingError, match="artifact URIs cannot be rewritten: this user may not write"
    ) as error:
        relocate_if_moved(sqlite_url(path))
    assert "\n" not in str(error.value)
    assert cells_with(path, str(tmp_path / "old")) == before
    assert not [cell for cell in before if REGISTRY_TAG in cell]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"this is no database, but a text of some length" * 100, "not a SQLite file"),
        (None, "is a folder"),
    ],
)
def test_a_file_that_is_not_a_database_is_an_error(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "mlflow.db"
    path.mkdir() if content is None else path.write_bytes(content)
    tracking = tracking_of(tmp_path)
    with pytest.raises(TrackingError, match=message) as error:
        ensure_experiment(tracking)
    assert "\n" not in str(error.value)


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    assert ensure_experiment(tracking_of(tmp_path)) == "1"


@pytest.mark.parametrize(
    ("revision", "hint"),
    [
        ("0123456789ab", "newer MLflow .*: install that one"),
        ("c48cb773bb87", "older MLflow .*mlflow db upgrade {}"),
    ],
)
def test_a_database_of_another_mlflow_release_gets_a_hint(
    tmp_path: Path, empty: Path, revision: str, hint: str
) -> None:
    shutil.copy(empty, tmp_path / "mlflow.db")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("update alembic_version set version_num = ?", (revision,))
        database.commit()
    tracking = tracking_of(tmp_path)
    with pytest.raises(TrackingError, match=hint.format(tracking.uri)):
        ensure_experiment(tracking)


def test_a_locked_database_is_reported(old_storage: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    path = path_from_sqlite_url(old_storage.uri)
    monkeypatch.setattr("pipelines.private.mlflow_tables.LOCK_TIMEOUT", 0.1)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:  # type: ignore[arg-type]
        database.execute("pragma locking_mode=exclusive")
        database.execute("begin exclusive")
        with pytest.raises(TrackingError, match="is locked by another process: try again"):
            relocate_if_moved(old_storage.uri)


def test_a_deleted_experiment_gets_the_command_to_restore_it(old_storage: Tracking) -> None:
    client = old_storage.client()
    experiment = client.get_experiment_by_name("inpaint").experiment_id
    client.delete_experiment(experiment)
    with pytest.raises(TrackingError) as error:
        runs.open_run(old_storage, "key", "run")
    assert str(error.value) == (
        f"the experiment inpaint was deleted in MLflow: restore it (MLFLOW_TRACKING_URI={old_storage.uri} "
        f"mlflow experiments restore -x {experiment}), or name another: experiment: NAME"
    )
    client.restore_experiment(experiment)
    assert runs.open_run(old_storage, "key", "run")


def test_a_deleted_run_and_a_renamed_experiment_are_recreated(old_storage: Tracking) -> None:
    client, run = old_storage.client(), runs.open_run(old_storage, "key", "run")
    client.delete_run(run)
    new_run = runs.open_run(old_storage, "key", "run")
    assert new_run != run
    with runs.finish_run_on_exit(old_storage, new_run):
        pass
    experiment = client.get_experiment_by_name("inpaint").experiment_id
    client.rename_experiment(experiment, "other")
    assert ensure_experiment(old_storage) != experiment


def test_a_tilde_in_a_storage_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tracking_of(Path("~/runs")).uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert open_storage("~/runs").uri == str(tmp_path / "runs")
    assert json.loads(json.dumps(vars(tracking_of(Path("~/x"))))) == vars(tracking_of(Path("~/x")))
