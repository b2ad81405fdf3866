"""Who started a run, and with which code: a wrong commit is worse than none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines import provenance


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The repository of somebody's project, with a commit."""
    for command in (
        ["init", "-q"],
        ["config", "user.name", "ann"],
        ["config", "user.email", "ann@example.com"],
        ["commit", "-q", "--allow-empty", "-m", "start"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return tmp_path


def test_a_copy_installed_in_another_repository_does_not_claim_its_commit(repository: Path) -> None:
    package = repository / ".venv" / "pipelines"
    package.mkdir(parents=True)
    shutil.copy(provenance.__file__, package)
    assert provenance.code_version(package) == {}
    subprocess.run(["git", "-C", str(repository), "add", "-f", str(package)], check=True)
    assert provenance.code_version(package)["dirty"] == "true", "now it is part of this repository"


def test_a_job_has_the_commit_and_user_of_its_submission(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "service-account")
    assert provenance.user_name(repository) == "service-account"
    (repository / provenance.CODE_FILE).write_text("0123abcd true\n")
    (repository / provenance.USER_FILE).write_text("ann\n")
    assert provenance.code_version(repository) == {"commit": "0123abcd", "dirty": "true"}
    assert provenance.user_name(repository) == "ann"


def test_tags_are_those_that_mlflow_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    monkeypatch.setenv("LOGNAME", "bob")
    assert provenance.source_tags("inpaint run demo") == {
        "mlflow.user": "bob",
        "mlflow.source.name": "inpaint run demo",
        "mlflow.source.type": "LOCAL",
    }
    monkeypatch.setattr(provenance, "code_version", dict)
    assert provenance.git_tags() == {}
