"""docs/reliability.md: the tests that it names exist in the files that it links."""

from __future__ import annotations

import re

import pytest

from support.pages import DOCS

CLAIMS = re.findall(r"\[(test_\w+)\]\(([^)]+)\)", (DOCS / "reliability.md").read_text(encoding="utf-8"))


def test_every_row_names_a_test() -> None:
    rows = re.search(r"(?m)^\| failure \|.*\n\|.*\n((?:\|.*\n)+)", (DOCS / "reliability.md").read_text())
    assert rows
    assert len(CLAIMS) == len(rows[1].splitlines()) >= 20


@pytest.mark.parametrize(("name", "file"), CLAIMS, ids=lambda value: value.rpartition("/")[2])
def test_the_named_test_exists(name: str, file: str) -> None:
    assert f"def {name}(" in (DOCS / file).read_text(encoding="utf-8")
