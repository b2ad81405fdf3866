"""What travels with a job, and what a person is told when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from ports import free_port

from pipelines.reading import load_recipe, parse_recipe
from pipelines.submitting import SubmitError, check_reach, connect, staged

ROOT = Path(__file__).parents[2]


def test_the_package_is_small_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-123")
    recipe = load_recipe("demo", ["seed=7"])
    with staged(recipe) as folder:
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5_000_000
        assert (folder / "pipelines/templates/report.html").exists()
        assert (folder / "pipelines/recipes/demo.yaml").exists()
        assert not list(folder.rglob("__pycache__"))
        assert load_recipe(str(folder / "recipe.yaml")) == recipe
        for path in folder.rglob("*"):
            assert not path.is_file() or b"planted-secret-123" not in path.read_bytes()


def test_a_checkout_as_working_dir_is_small() -> None:
    """What .rayignore leaves of the files that git knows."""
    left_out = [
        line.strip("/") for line in (ROOT / ".rayignore").read_text().splitlines() if line[:1] not in "#"
    ]
    size = 0
    for package in ROOT.iterdir():
        if package.name in left_out or package.name.endswith(".egg-info") or package.name.startswith(".git"):
            continue
        files = package.rglob("*") if package.is_dir() else [package]
        size += sum(
            path.stat().st_size
            for path in files
            if path.is_file() and "__pycache__" not in path.parts and "results" not in path.parts
        )
    assert size < 5_000_000


@pytest.mark.parametrize(
    ("change", "field"),
    [({}, "storage"), ({"storage": "/shared", "data": {"source": "photos"}}, "data.source")],
)
def test_places_of_this_machine_alone_are_refused(change: dict, field: str) -> None:
    recipe = parse_recipe({"name": "x", "models": {"context_encoder": {}}, **change})
    with pytest.raises(SubmitError, match=rf"{field} is .* a folder of this machine"):
        check_reach(recipe)


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(SubmitError, match=f"no Ray dashboard answers at {address}"):
        connect(address)
