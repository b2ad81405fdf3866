"""Look-ups in the registry stay cheap: what they import, and how many queries they send."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from sqlalchemy import event
from sqlalchemy.engine import Engine

from pipelines import registry
from pipelines.cli.main import main
from pipelines.registry import searching
from support.cluster_harness import clean_environment

LOOKUPS = ("list", "show encoder", "show encoder@champion", "best encoder --metric psnr", "history encoder")
MORE_VERSIONS = 20
MAX_QUERIES = 60
# imports MLflow and searches once, as every look-up has to; then prints what the look-ups import in addition
PROGRAM = """
import json, sys
from mlflow import MlflowClient
uri, path, *commands = sys.argv[1:]
MlflowClient(uri, registry_uri=uri).search_model_versions()
before, found = {name.partition(".")[0] for name in sys.modules}, {}
from pipelines.cli.main import main
for command in commands:
    try:
        main(["models", *command.split(), "--tracking-uri", uri])
    except SystemExit as end:
        assert not end.code, command
    packages = {name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
    found[command] = sorted(packages)
open(path, "w").write(json.dumps(found))
"""


def test_lookups_import_no_package_that_mlflow_does_not_need(registry_of_chain: str, tmp_path: Path) -> None:
    """Only our own. No torch, Ray, OpenCV, scikit-image, pandas or SciPy, unless MLflow imports them itself."""
    command = [sys.executable, "-c", PROGRAM, registry_of_chain, str(tmp_path / "found.json"), *LOOKUPS]
    done = subprocess.run(
        command, env=clean_environment(), cwd=Path(__file__).parents[3], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == set(LOOKUPS)
    for command_line, packages in found.items():
        assert set(packages) <= {"__main__", "data_prep", "models", "pipelines"}, command_line


@contextmanager
def counted_queries() -> Iterator[list[str]]:
    """The SQL statements sent inside the block."""
    statements: list[str] = []

    def record(_: Any, __: Any, statement: str, *___: Any) -> None:
        statements.append(statement)

    event.listen(Engine, "before_cursor_execute", record)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", record)


@pytest.mark.parametrize("command", LOOKUPS)
def test_the_number_of_queries_does_not_depend_on_the_number_of_versions(
    command: str, registry_of_chain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def queries() -> int:
        with counted_queries() as statements, pytest.raises(SystemExit) as end:
            main(["models", *command.split(), "--tracking-uri", registry_of_chain])
        assert not end.value.code, capsys.readouterr().err
        return len(statements)

    queries()  # the first look-up also checks the database's schema
    before = queries()
    client = MlflowClient(registry_of_chain, registry_uri=registry_of_chain)
    first = client.get_model_version("encoder", "1")
    for _ in range(MORE_VERSIONS):
        client.create_model_version("encoder", first.source, first.run_id, tags=first.tags)
    assert queries() == before
    assert before <= MAX_QUERIES


def test_every_public_name_is_listed_and_can_be_imported() -> None:
    assert set(registry.__all__) <= set(dir(registry))
    for name in registry.__all__:
        assert callable(getattr(registry, name)), name
    assert registry.best is searching.best
    assert registry.Overtaken is registry.ConcurrentPromotion
    with pytest.raises(AttributeError, match="no attribute 'load_modell'"):
        _ = registry.load_modell  # type: ignore[attr-defined]


def test_a_new_process_lists_the_names_without_importing_mlflow() -> None:
    program = "import sys; from pipelines import registry; print(*dir(registry)); assert 'mlflow' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"load_model", "LoadedModel", "search"} <= set(done.stdout.split())
