"""The first line of a command on stderr: before slow imports, after a delay, or not at all."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipelines import notices
from pipelines.cli.main import build_parser, startup_notice

# Ends at the first slow import and prints its name; the notice has to be printed before.
PROGRAM = """
import sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("ray", "mlflow", "torch"):
            print(f"imports {name}", file=sys.stderr, flush=True)
            raise SystemExit(7)

sys.meta_path.insert(0, Watch())
sys.argv[0] = "inpaint"
from pipelines import notices
from pipelines.cli.main import main
notices.DELAY_SECONDS = 600  # so that only imports trigger the notice
main()
"""


def inpaint(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, cwd=cwd, timeout=60
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run demo", "reading the recipe demo ..."),
        ("sweep edge_connect-sigma", "reading the recipe edge_connect-sigma ..."),
        ("shard bundled out", "looking for photographs in bundled ..."),
        ("edges shards --sigma 2", "reading the shards in shards ..."),
        ("evaluate models:/a@b --images bundled --masks center --out o", "loading models:/a@b ..."),
        ("fill models:/a@b photo.png mask.png --out o.png", "reading photo.png ..."),
        ("models list", "reading the models from the registry ..."),
    ],
)
def test_a_notice_is_printed_before_slow_imports(command: str, words: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "gray").save(tmp_path / "photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save(tmp_path / "mask.png")
    done = inpaint(*command.split(), cwd=tmp_path)
    first, *more, last = done.stderr.splitlines()
    assert (first, last.split()[0], done.stdout) == (words, "imports", "")
    assert more == (["loading models:/a@b ..."] if "fill" in command else [])


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of commands without subcommands."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not actions:
        yield parser
    for action in actions:
        for child in action.choices.values():
            yield from leaves(child)


def test_every_command_has_a_first_notice() -> None:
    found = [re.findall(r"inpaint ((?:.*\\\n)*.*)", str(leaf.epilog)) for leaf in leaves(build_parser())]
    assert all(found)
    examples = [example for examples in found for example in examples]
    assert len(examples) >= 25
    for example in examples:
        assert startup_notice(build_parser().parse_args(shlex.split(example.replace("\\\n", " ")))), example


def test_json_output_has_no_notice(tmp_path: Path) -> None:
    done = inpaint("models", "list", "--json", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert (line.split()[0], done.stdout) == ("imports", "")


def test_a_command_that_ends_at_once_prints_no_notice(tmp_path: Path) -> None:
    done = inpaint("run", "dema", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert line.startswith("inpaint run: ")
    assert "did you mean demo" in line


def test_a_notice_is_printed_once_after_the_delay(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = threading.Event()
    print_line = notices._print

    def print_and_notify(line: str) -> None:
        print_line(line)
        printed.set()

    monkeypatch.setattr(notices, "_print", print_and_notify)
    monkeypatch.setattr(notices, "DELAY_SECONDS", 0.01)
    with notices.command("counting the stars"):
        assert printed.wait(30)
        notices.announce("weighing them")
        notices.announce("and the planets")
    assert capsys.readouterr().err.splitlines() == [
        "counting the stars ...",
        "weighing them ...",
        "and the planets ...",
    ]


def test_the_next_notice_comes_after_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    with notices.command("counting the stars"):
        notices.announce("weighing them")
    assert capsys.readouterr().err.splitlines() == ["counting the stars ...", "weighing them ..."]


def test_a_discarded_notice_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with notices.command("counting the stars"):
        notices.discard_pending()
        notices._notices.flush()
    assert capsys.readouterr().err == ""


def test_a_quiet_command_prints_nothing_and_a_library_only_notes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = list(sys.meta_path)
    with notices.command("counting the stars", quiet=True):
        notices.announce("weighing them")
        notices.note("one is missing")
    notices.announce("nobody asked")
    notices.note("TMPDIR is too long")
    assert capsys.readouterr().err == "note: TMPDIR is too long\n"
    assert sys.meta_path == before


def test_a_closed_stderr_is_not_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with notices.command("counting the stars"):
        notices.announce("weighing them")
    assert capsys.readouterr().out == ""
