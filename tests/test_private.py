"""Private APIs of other packages: all that are used exist, and only the modules for them use any."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch.nn.utils.parametrizations import spectral_norm

import models.private
import pipelines.private
from pipelines.private import mlflow_tables

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_prep", "models", "pipelines")
PRIVATE_MODULES = [models.private.__name__] + [
    found.name for found in pkgutil.iter_modules(pipelines.private.__path__, "pipelines.private.")
]
PRIVATE_APIS: dict[str, tuple[str, str]] = {
    name: reason
    for module in PRIVATE_MODULES
    for name, reason in getattr(importlib.import_module(module), "PRIVATE_APIS", {}).items()
}
TESTED_VERSIONS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
)
PUBLIC_SETTINGS = {
    "torch.compiler.config": "settings that its documentation says to assign",
    "torch.backends.cudnn": "the same",
}
SQL = re.compile(r"\s*(select\s.+\sfrom|insert\s+into|update\s.+\sset|delete\s+from|pragma)\s", re.I | re.S)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_foreign(module: str) -> bool:
    top = module.partition(".")[0]
    return top not in PACKAGES and top not in sys.stdlib_module_names and top != "__future__"


def source() -> dict[str, str]:
    """Every module of the packages -> its text."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def dotted_names(node: ast.expr) -> list[str]:
    """The names of a.b.c; empty if the expression does not start with a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [*reversed([*names, node.id])] if isinstance(node, ast.Name) else []


def imports(tree: ast.AST) -> dict[str, str]:
    """Imported name in a module -> its full name."""
    bound_names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                bound = each.asname or each.name.partition(".")[0]
                bound_names[bound] = each.name if each.asname else bound
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            bound_names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return bound_names


def own_private_names(trees: dict[str, ast.AST]) -> set[str]:
    """Names with a leading underscore that our own classes and modules define."""
    names: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if dotted_names(node)[:1] in (["self"], ["cls"]) else set()
    return {name for name in names if is_private(name)}


def used(tree: ast.AST, own_names: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of every private API that a module uses."""
    bound = imports(tree)
    names = {name: full for name, full in bound.items() if is_foreign(full)}
    texts = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                if is_foreign(each.name) and any(map(is_private, each.name.split("."))):
                    yield node.lineno, each.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level and is_foreign(node.module):
            for each in node.names:
                full = f"{node.module}.{each.name}"
                if any(map(is_private, full.split("."))):
                    yield node.lineno, full
        elif isinstance(node, ast.Attribute):
            path = dotted_names(node)
            if path and path[0] in names:
                full = ".".join([names[path[0]], *path[1:]])
                assigned = isinstance(node.ctx, ast.Store | ast.Del)
                if is_private(node.attr) or (assigned and full.rpartition(".")[0] not in PUBLIC_SETTINGS):
                    yield node.lineno, full
            elif (
                is_private(node.attr)
                and not {*path[:1]} & {"self", "cls", *bound}
                and node.attr not in own_names
            ):
                yield node.lineno, ".".join(path) or f"?.{node.attr}"
        elif isinstance(node, ast.Call):
            path = dotted_names(node.func)
            if path and path[0] in names:
                for keyword in node.keywords:
                    if keyword.arg and is_private(keyword.arg):
                        yield node.lineno, f"{'.'.join([names[path[0]], *path[1:]])}({keyword.arg})"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            for match in re.finditer(r"\b(ray|torch|mlflow)(\.\w+)*\._(?!_)[\w.]+", node.value):
                yield node.lineno, match[0]


def found_in(text: str, own_names: set[str] | None = None) -> list[str]:
    return [name for _, name in used(ast.parse(text), own_names or set())]


@cache
def trees() -> dict[str, ast.AST]:
    return {module: ast.parse(text) for module, text in source().items()}


@pytest.mark.slow
def test_private_apis_are_used_only_in_the_modules_for_them() -> None:
    parsed = trees()
    own_names = own_private_names(parsed)
    lines = [
        f"{module}, line {line}: {name} is private to another package: use it in pipelines/private or models/private.py"
        for module, tree in parsed.items()
        if module not in PRIVATE_MODULES
        for line, name in used(tree, own_names)
    ]
    assert not lines, "\n".join(lines)


@pytest.mark.slow
def test_every_used_private_api_has_an_entry() -> None:
    parsed = trees()
    for module in PRIVATE_MODULES:
        for line, name in used(parsed[module], own_private_names(parsed)):
            if not name.startswith(("?", "operator.")):  # of an object: the table names its class
                assert any(known == name or known.startswith(f"{name}.") for known in PRIVATE_APIS), (
                    f"{module}, line {line}: {name} has no entry in PRIVATE_APIS"
                )
    for name, (reason, without) in PRIVATE_APIS.items():
        assert reason, name
        assert without, name


def test_private_members_inherited_from_other_packages_have_an_entry() -> None:
    """Methods and attributes with a leading underscore that a base class of another package has too."""
    lines = []
    for module in source():
        if module.endswith(".__main__"):
            continue
        for name, kind in inspect.getmembers(importlib.import_module(module), inspect.isclass):
            bases = [base for base in kind.__mro__ if is_foreign(base.__module__)]
            if kind.__module__ != module or not bases:
                continue
            (tree,) = [
                node
                for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module])))
                if isinstance(node, ast.ClassDef) and node.name == name
            ]
            names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            for each in filter(is_private, names):
                owners = [base for base in bases if each in vars(base)]
                known = (f".{base.__name__}.{each}" for base in bases)
                if owners and not any(entry.endswith(end) for end in known for entry in PRIVATE_APIS):
                    lines.append(
                        f"{module}.{name} uses {owners[-1]}'s {each}, which has no entry in PRIVATE_APIS"
                    )
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from ray._private import services", "ray._private.services"),
        ("from ray.train.torch.config import _shutdown_torch", "ray.train.torch.config._shutdown_torch"),
        ("def f():\n    import torch._dynamo", "torch._dynamo"),
        ("import torch\ntorch._C._cuda_init()", "torch._C._cuda_init"),
        ("import mlflow as m\nm.store._unity.x()", "mlflow.store._unity"),
        ("import ray\nray.init(_temp_dir='x')", "ray.init(_temp_dir)"),
        ("import ray\nray.util.x = 3", "ray.util.x"),
        ("from torch import nn\nnn.Linear.forward = None", "torch.nn.Linear.forward"),
        ("logger('ray._private.worker')", "ray._private.worker"),
        ("def f(operator): return operator._overloadpacket", "operator._overloadpacket"),
        ("def f(x): return x()._client", "?._client"),
    ],
)
def test_the_search_finds_private_names(text: str, name: str) -> None:
    assert name in found_in(text)


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos._exit(1)",
        "from __future__ import annotations",
        "'''Not ray._private, by the way.'''",
        "import torch\ntorch.compiler.config.recompile_limit = 64",
        "import ray\nray.__version__",
        "class A:\n    def f(self): return self._x",
    ],
)
def test_the_search_ignores_public_names(text: str) -> None:
    assert found_in(text) == []


def resolve(name: str) -> Any:
    """The object of a dotted name, or of NAME(keyword) for a function. Raises ImportError or AttributeError."""
    path, _, keyword = name.rstrip(")").partition("(")
    parts = path.split(".")
    target: Any = None
    for count in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not ".".join(parts).startswith(error.name or "?"):
                raise  # of another package
            continue
        for part in parts[count:]:
            target = getattr(target, part)
        break
    else:
        raise ImportError(path)
    if keyword and f'"{keyword}"' not in inspect.getsource(target):
        raise AttributeError(keyword)
    return target


def missing(name: str) -> str:
    """Why a private API is missing, in a sentence for those who raise a version cap; '' if it exists."""
    package = name.partition(".")[0]
    try:
        resolve(name)
    except (ImportError, AttributeError) as error:
        reason, without = PRIVATE_APIS.get(name, ("", ""))
        return (
            f"{package} {version(package)} (tested with {TESTED_VERSIONS.get(package)}) has no {name} any more "
            f"({error}). It is for: {reason}. Without it: {without}."
        )
    return ""


@pytest.mark.parametrize("name", sorted(PRIVATE_APIS))
def test_every_private_api_exists(name: str) -> None:
    assert not missing(name), missing(name)


def test_the_error_names_the_package_and_the_effect_of_a_missing_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRIVATE_APIS, "ray._private.services.find_nothing", ("looking", "nothing is found"))
    for name in ("ray._private.services.find_nothing", "ray._private.nowhere.x", "ray.init(_nowhere)"):
        message = missing(name)
        assert message.startswith(
            f"ray {version('ray')} (tested with {TESTED_VERSIONS['ray']}) has no {name} any more"
        )
    assert "It is for: looking. Without it: nothing is found." in missing(
        "ray._private.services.find_nothing"
    )


@pytest.mark.parametrize(
    "module",
    [name for name in PRIVATE_MODULES if name.rpartition(".")[2] in ("ray", "mlflow", "mlflow_tables")],
)
def test_the_modules_import_private_apis_lazily(module: str) -> None:
    """Importing the module imports neither Ray nor MLflow nor torch."""
    tops = {each.partition(".")[0] for each in imported_at_once(importlib.import_module(module))}
    assert not tops & {"ray", "torch", "mlflow", "sqlalchemy"}


def imported_at_once(module: ModuleType) -> set[str]:
    body = ast.parse(inspect.getsource(module)).body
    return {
        each.name if isinstance(node, ast.Import) else str(node.module)
        for node in body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for each in node.names
    }


def test_spectral_norm_names_its_vectors_as_stored_weights_do() -> None:
    """pipelines/importing/matching.py and every stored state dict have these keys."""
    keys = set(spectral_norm(torch.nn.Linear(2, 2)).state_dict())
    assert {f"parametrizations.weight.{name}" for name in ("original", "0._u", "0._v")} <= keys


def test_sql_is_in_one_module() -> None:
    for module, tree in trees().items():
        if module == mlflow_tables.__name__:
            continue
        for node in ast.walk(tree):
            message = f"{module}, line {getattr(node, 'lineno', 0)}: only pipelines/private/mlflow_tables.py may use SQL"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not SQL.match(node.value), message
            if isinstance(node, ast.Import):
                assert not any(each.name.startswith("sqlite3") for each in node.names), message
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] != "sqlite3", message
                assert not (node.module or "").startswith("sqlalchemy.") or node.module == "sqlalchemy.exc", (
                    message
                )


def columns(path: Path) -> dict[str, set[str]]:
    with closing(sqlite3.connect(path)) as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        return {
            table: {row[1] for row in database.execute(f'pragma table_info("{table}")')} for table in tables
        }


def missing_columns(path: Path, required: dict[str, tuple[str, ...]]) -> list[str]:
    existing = columns(path)
    return [
        f"mlflow {version('mlflow')} (tested with {TESTED_VERSIONS['mlflow']}) has no column {column} in its table {table}: "
        "pipelines/private/mlflow_tables.py cannot read it, and a storage cannot be moved"
        for table, names in required.items()
        for column in names
        if column not in existing.get(table, set())
    ]


@pytest.mark.slow
def test_mlflows_database_has_the_required_columns(tmp_path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"sqlite:///{tmp_path / 'mlflow.db'}", str(tmp_path / "artifacts"))
    assert missing_columns(tmp_path / "mlflow.db", mlflow_tables.REQUIRED_COLUMNS) == []
    assert "no column x in its table runs" in missing_columns(tmp_path / "mlflow.db", {"runs": ("x",)})[0]


def test_the_database_of_a_server_with_users_has_the_required_columns(tmp_path: Path) -> None:
    from mlflow.server.auth.db.utils import migrate_if_needed
    from sqlalchemy import create_engine

    engine = create_engine(f"sqlite:///{tmp_path / 'users.db'}")
    migrate_if_needed(engine, "head")
    engine.dispose()
    assert missing_columns(tmp_path / "users.db", mlflow_tables.REQUIRED_USER_COLUMNS) == []


@pytest.mark.parametrize("package", ["ray", "torch", "mlflow"])
def test_the_version_cap_is_the_tested_minor_version(package: str) -> None:
    """Private APIs are known for one minor version only: pip must refuse the next."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [each for text in project["dependencies"] if (each := Requirement(text)).name == package]
    major, minor, *_ = map(int, TESTED_VERSIONS[package].split("."))
    assert requirement.specifier.contains(TESTED_VERSIONS[package])
    assert not requirement.specifier.contains(f"{major}.{minor + 1}.0")
    assert not requirement.specifier.contains(f"{major}.{minor - 1}.0")
