"""The tools around the code: CI and hooks run what `make` runs, forms parse, and every dependency is pinned."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
}


def load_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_ci_runs_targets_of_the_makefile() -> None:
    steps = load_yaml(".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    targets = [step["run"].removeprefix("make ") for step in steps if step.get("run", "").startswith("make ")]
    assert targets[:3] == ["lint", "check", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.M), target


def test_hooks_run_what_lint_runs() -> None:
    (repository,) = load_yaml(".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"].removeprefix(".venv/bin/").split(" --")[0] for hook in repository["hooks"]]
    recipe = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0]
    assert hooks == re.findall(r"\$\(BIN\)/(\w+(?: (?:check|format))?)", recipe)


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms_have_what_a_form_needs(form: str) -> None:
    content = load_yaml(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert {"name", "description", "body"} <= content.keys()
    fields = [part for part in content["body"] if part["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_every_dependency_is_pinned_at_a_version_that_it_allows() -> None:
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]:
        requirement = Requirement(line)
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin, f"constraints.txt has no version of {requirement.name}"
        assert requirement.specifier.contains(pin), f"{line}: constraints.txt has {pin}"


def test_make_installs_the_extras_that_its_targets_need() -> None:
    (extras,) = re.findall(r"-e '\.\[(.*)\]'", MAKEFILE)
    assert set(extras.split(",")) == {"weights", "dev", "docs"}


def test_the_head_of_the_makefile_names_every_target() -> None:
    (targets,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    head = MAKEFILE.partition("PYTHON ?=")[0]
    assert {target for target in targets.split() if f"make {target} " not in head} <= {"validate-infra"}
