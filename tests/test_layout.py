"""The layers of the packages, checked in the source: which package may import which, and the length of files.

Every import counts: those inside functions, those for type checkers only, and the strings of the form
``module:object`` by which steps, commands and models are named.
"""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_prep", "models", "pipelines")
MAX_LINES = 350  # of a file in data_prep and pipelines; each paper's model is one file of any length
REFERENCE = re.compile(r"((?:data_prep|models|pipelines)(?:\.\w+)*):(\w+(?:\.\w+)*)")

# From the lowest layer up. A unit (a package of pipelines, or a module beside the packages) may import itself and units
# of lower layers, but not those of its own layer.
LAYERS = (
    # data and models: without Ray and MLflow
    (
        "data_prep",
        "models",
        "pipelines.durations",
        "pipelines.environment",
        "pipelines.names",
        "pipelines.notices",
        "pipelines.renamed",
        "pipelines.shipped_recipes",
    ),
    ("pipelines.plots", "pipelines.provenance", "pipelines.ray_tasks", "pipelines.report_files"),
    (
        "pipelines.path_checks",
        "pipelines.errors",
        "pipelines.private",
        "pipelines.tracking_address",
        "pipelines.weights",
    ),
    ("pipelines.downloads", "pipelines.recipe"),
    # one task each
    ("pipelines.cluster", "pipelines.contracts", "pipelines.estimate", "pipelines.check_masks"),
    ("pipelines.tracking",),
    # durable execution, and the implementations of the steps
    ("pipelines.durable",),
    ("pipelines.data", "pipelines.evaluation", "pipelines.training"),
    # users of evaluations
    ("pipelines.check_data", "pipelines.check_recipe", "pipelines.registry", "pipelines.run_report"),
    ("pipelines.importing", "pipelines.inference", "pipelines.parent_run", "pipelines.pipeline"),
    ("pipelines.sweeps",),
    ("pipelines.studio",),
    ("pipelines.cli",),
    ("pipelines", "pipelines.__main__"),
)


@cache
def modules() -> dict[str, Path]:
    """Module -> file, of all packages."""
    files = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


def module_of(name: str) -> str | None:
    """The module of this project that contains a dotted name; None: another project's."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or None


def references(module: str) -> Iterator[tuple[str, int]]:
    """The strings ``module:object`` of a module, with their lines."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and REFERENCE.fullmatch(node.value):
            yield node.value, node.lineno


def imported_names(module: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}, line {node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
    yield from ((reference.partition(":")[0], line) for reference, line in references(module))


@cache
def imports(module: str) -> dict[str, int]:
    """Module of this project that `module` imports -> line of its first import."""
    lines: dict[str, int] = {}
    for name, line in imported_names(module):
        target = module_of(name)
        if target and target != module:
            lines.setdefault(target, line)
    return lines


def unit(module: str) -> str:
    """The unit of a module: data_prep, models, a package of pipelines, or a module beside those packages."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "pipelines" else 1])


RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def test_every_unit_has_a_layer() -> None:
    assert {unit(module) for module in modules()} == set(RANK)


def test_imports_go_to_lower_layers() -> None:
    """So no two packages import each other."""
    upward = [
        f"{modules()[module].relative_to(ROOT)}:{line} imports {target}"
        for module in modules()
        for target, line in imports(module).items()
        if unit(target) != unit(module) and RANK[unit(target)] >= RANK[unit(module)]
    ]
    assert not upward, "\n".join(upward)


def test_no_circular_imports() -> None:
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in imports(module):
                visit(target, [*path, module])
            done.add(module)

    for module in modules():
        visit(module, [])


@pytest.mark.slow
def test_every_reference_resolves() -> None:
    """Imports torch, Ray and MLflow."""
    names = sorted({reference for module in modules() for reference, _ in references(module)})
    assert names
    for reference in names:
        assert callable(pkgutil.resolve_name(reference)), reference


def test_files_are_short() -> None:
    lines = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for module, file in modules().items()
        if not module.startswith("models")
    }
    assert {file: count for file, count in lines.items() if count >= MAX_LINES} == {}
