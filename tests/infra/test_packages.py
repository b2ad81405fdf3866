"""The files that are sent to other machines: the package of a submitted job, the checkout that `ray job submit` uploads,
and the contents of the image.

Each has everything that the three packages import and read, and no docs, tests, sites or private files.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths
from ray._private.runtime_env.packaging import create_package
from setuptools import find_packages

from pipelines.cluster.jobs import package_source
from pipelines.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
PACKAGES = ("data_prep", "models", "pipelines")
STRAY_FILES = (
    "docs/index.md",
    "docs/conf.py",
    "docs/pipelines/index.md",
    "docs/examples/sweep.ipynb",
    "build/docs/index.html",
    "build/doctrees/index.doctree",
    "site/index.html",
    "mkdocs.yml",
    ".readthedocs.yaml",
    ".pre-commit-config.yaml",
    ".github/workflows/ci.yml",
    ".github/workflows/pages.yaml",
    "CONTRIBUTING.md",
    "build/coverage/data",
    "dist/inpaint_pipelines-0.1.0-py3-none-any.whl",
    "tests/test_more.py",
    "another/module.py",
    "build/lib/pipelines/__init__.py",
    "runs/mlflow.db",
    "photos/a.jpg",
    ".env",
    ".venv/bin/python",
    "pipelines/__pycache__/workflow.cpython-311.pyc",
)
"""files that a checkout may have and that must not be sent"""


def tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    names = [name for name in listing.splitlines() if (ROOT / name).is_file()]
    return names or pytest.skip("no git checkout")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed files of this checkout and stray files."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for name in STRAY_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("planted")
    (folder / "mine.yaml").write_text("name: mine\n")
    return folder


def zipped(folder: Path, target: Path) -> set[str]:
    """Ray's own package of a working_dir: the files in it."""
    create_package(str(folder), target, include_gitignore=True)
    with zipfile.ZipFile(target) as package:
        return {name for name in package.namelist() if not name.endswith("/")}


def submitted(checkout: Path, target: Path) -> set[str]:
    with package_source(load_recipe("demo", ["storage=/shared/runs"])) as folder:
        return zipped(folder, target)


def sent(checkout: Path, target: Path) -> set[str]:
    return zipped(checkout, target)


def copied(checkout: Path, target: Path) -> set[str]:
    """The files that the Dockerfile copies: by docker's rules, without those of .dockerignore."""
    patterns = (checkout / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in patterns if line.strip() and not line.startswith("#")]
    context = {
        Path(path).as_posix()
        for path in exclude_paths(str(checkout), patterns, "infra/Dockerfile")
        if (checkout / path).is_file()
    }
    lines = (checkout / "infra/Dockerfile").read_text().splitlines()
    copies = [line.split() for line in lines if line.startswith("COPY ")]
    sources = [word for words in copies for word in words[1:-1] if not word.startswith("--")]
    assert all((checkout / source).exists() for source in sources)
    assert set(sources) >= {*PACKAGES, "constraints.txt", "pyproject.toml"}
    return context - {"infra/Dockerfile", ".dockerignore"}  # read by docker itself


EVERY_WAY = pytest.mark.parametrize("list_files", [submitted, sent, copied], ids=lambda f: f.__name__)
ListFiles = Callable[[Path, Path], set[str]]


def needed() -> set[str]:
    """All modules of the three packages and the files that they read: all committed files but those of results."""
    return {
        name
        for name in tracked()
        if name.partition("/")[0] in PACKAGES and not name.startswith("pipelines/results/")
    } - {"models/RESULTS.md"}


@cache
def imported(name: str) -> frozenset[str]:
    """Modules of the three packages, or names in them, that a file imports anywhere or refers to as "module:name"."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and (
            match := re.fullmatch(r"(\w+(?:\.\w+)+):\w+", str(node.value))
        ):
            modules.add(match[1])
    return frozenset(module for module in modules if module.partition(".")[0] in PACKAGES)


def file_of(module: str, names: set[str]) -> str | None:
    path = module.replace(".", "/")
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in names), None)


@pytest.mark.slow
@EVERY_WAY
def test_everything_that_the_packages_import_and_read_is_sent(
    list_files: ListFiles, checkout: Path, tmp_path: Path
) -> None:
    names = list_files(checkout, tmp_path / "package.zip")
    assert not needed() - names
    modules = [(name, module) for name in sorted(names) if name.endswith(".py") for module in imported(name)]
    assert len(modules) > 500
    for name, module in modules:
        parent = module.rpartition(".")[0]
        assert file_of(module, names) or file_of(parent, names), f"{name} imports {module}, which is not sent"


@EVERY_WAY
def test_nothing_else_is_sent(list_files: ListFiles, checkout: Path, tmp_path: Path) -> None:
    names = list_files(checkout, tmp_path / "package.zip")
    assert not names & set(STRAY_FILES)
    extra_files: set[str] = {
        submitted: {"recipe.yaml", "pipelines/CODE", "pipelines/SUBMITTED_BY"},
        sent: {"pyproject.toml", "mine.yaml"},
        copied: {"constraints.txt", "pyproject.toml", "README.md", "LICENSE"},
    }[list_files]
    assert extra_files - {"pipelines/CODE"} <= names  # only in a committed or modified checkout
    if list_files is submitted:  # it packs the working tree, which may have new modules
        names -= {name for name in names - extra_files - set(tracked()) if name.endswith(".py")}
    assert not names - needed() - extra_files - {"models/RESULTS.md"}
    assert {name.partition("/")[0] for name in names - extra_files} == set(PACKAGES)
    assert not {name for name in names if name.startswith("pipelines/results/") or "__pycache__" in name}


def test_every_package_and_every_file_that_is_read_is_installed() -> None:
    """The files of the wheel, by setuptools' rules: it packs folders with an __init__.py that packages.find includes,
    and other files only if package-data names them. `make soak` builds the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    installed: set[Path] = set()
    for package in find_packages(str(ROOT), include=settings["packages"]["find"]["include"]):
        folder = ROOT / package.replace(".", "/")
        for pattern in ("*.py", *settings["package-data"].get(package, ())):
            installed |= set(folder.glob(pattern))
    names = {file.relative_to(ROOT).as_posix() for file in installed}
    assert not needed() - names, "name them in pyproject's package-data, or add an __init__.py"
    assert not names & set(tracked()) - needed()
    assert {name.partition("/")[0] for name in names} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= names, "type checkers ignore the annotations"
