"""The servers' secrets: where they come from, how they are kept, and what else of the user's environment goes in."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pipelines.cluster.services import ServiceError, read_environment, write_environment


@pytest.mark.parametrize(
    "value",
    [
        "plain-Value_1",
        "$(touch x)",
        "`touch x`",
        "a b  c",
        'it\'s "quoted"',
        "back\\slash\\",
        "#comment a #b",
        "~ $HOME ${HOME} !! * ?",
        ";touch x;&|<>(){}[]=%",
        "é 穴",
        "'",
        "",
    ],
)
def test_a_shell_and_our_reader_get_the_value_that_was_written(tmp_path: Path, value: str) -> None:
    file = tmp_path / "s.env"
    write_environment(file, {"FIRST": value, "LAST": "1"})
    script = '. ./s.env; printf "%s|%s" "$FIRST" "$LAST"; env | grep -c "^FIRST="'
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{value}|11\n"
    assert read_environment(file) == {"FIRST": value, "LAST": "1"}
    assert os.listdir(tmp_path) == ["s.env"]
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b", "a\u2028b"])
def test_a_value_that_is_not_of_one_line_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ServiceError, match=r"^X cannot be kept in .*s.env"):
        write_environment(tmp_path / "s.env", {"X": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line",
    ["X=$(touch x)", 'X="$HOME"', "X=a b", "X=`id`", "X='a", "X=a;id", "X=~", "echo", "1X=a", 'X="\\n"'],
)
def test_lines_that_a_shell_would_read_otherwise_are_refused_without_their_value(
    tmp_path: Path, line: str
) -> None:
    (tmp_path / "s.env").write_text(f"# a comment\n{line}\n")
    with pytest.raises(ServiceError, match=r"s\.env, line 2: ") as refused:
        read_environment(tmp_path / "s.env")
    assert line not in str(refused.value)


def test_a_secret_is_private_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    opened = os.fdopen
    monkeypatch.setattr(
        os,
        "fdopen",
        lambda file, *a, **k: modes.append(os.fstat(file).st_mode & 0o777) or opened(file, *a, **k),
    )
    before = os.umask(0)
    try:
        write_environment(tmp_path / "s.env", {"X": "1"})
    finally:
        os.umask(before)
    assert modes == [0o600]
