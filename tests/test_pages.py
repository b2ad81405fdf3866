"""The README and docs/: every code block parses, its options and names exist, and every link leads somewhere."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest

from pipelines.cli.main import build_parser
from pipelines.recipe.load import load_recipe, read_yaml, recipe_path
from pipelines.renamed import renamed_field
from support.pages import DOCS, ROOT, Block, blocks, inpaint_arguments, pages

PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"sh", "python", "yaml", "text", "json", "mermaid", "toctree", ""}
OURS = ("data_prep", "models", "pipelines")


def ids(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def test_the_pages_are_found() -> None:
    assert len(PAGES) >= 3
    assert {block.language for block in BLOCKS} <= LANGUAGES


def test_blocks_that_are_not_run_are_counted() -> None:
    """pytest's summary of warnings shows the figures."""
    executable = [block for block in BLOCKS if block.language in ("sh", "python")]
    reasons = Counter(block.no_run for block in executable if block.no_run)
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    run = len(executable) - reasons.total()
    warnings.warn(f"{run} blocks of the pages run, {reasons.total()} are only parsed: {listed}", stacklevel=1)
    assert reasons.total() < len(executable)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=ids)
def test_shell_blocks_have_known_commands_and_options(block: Block) -> None:
    commands = block.commands()
    assert commands
    for command in commands:
        shlex.split(command)
        arguments = inpaint_arguments(command)
        if arguments is None:
            continue
        args = build_parser().parse_args(arguments)
        recipe = getattr(args, "recipe", None)
        if recipe and recipe_path(recipe):
            load_recipe(recipe, args.set)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=ids)
def test_python_blocks_import_what_exists(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=ids)
def test_yaml_blocks_have_the_names_of_today(block: Block) -> None:
    recipe = read_yaml(block.text)
    assert recipe is not None
    assert not isinstance(recipe, dict) or renamed_field(recipe) is None


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor and file.suffix == ".md":
            assert anchor in headings(file), target


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    plain = (re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


def test_what_the_pages_take_from_the_code_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_page_says_what_one_can_do_after_it() -> None:
    for page in DOCS.glob("*.md"):
        if page.stem in ("index", "papers", "glossary", "security", "release-notes"):
            continue
        start = page.read_text().split("\n\n", 2)
        assert start[0].startswith("# "), page.name
        assert re.match(r"After (reading )?this page,? you can", start[1]), page.name


def test_the_page_on_adding_a_model_has_the_model_of_the_tests() -> None:
    """Followed to the letter, the page leads to the model that the contract tests and the whole pipeline are run with."""
    python = [block.text for block in blocks(DOCS / "adding-a-model.md") if block.language == "python"]
    assert python[0] == (ROOT / "tests/support/tiny_model.py").read_text()
