"""The command line's parser: every command names the function that runs it."""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
from collections.abc import Iterator
from pkgutil import resolve_name

import pytest

from pipelines.cli.main import build_parser, main


def commands(
    of: argparse.ArgumentParser, run: str | None = None
) -> Iterator[tuple[argparse.ArgumentParser, str | None]]:
    """(parser, name of its function) of every command without subcommands."""
    run = of.get_default("run") or run
    below = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield of, run
    for action in below:
        for command in action.choices.values():
            yield from commands(command, run)


COMMANDS = [pytest.param(*command, id=command[0].prog) for command in commands(build_parser())]


@pytest.mark.parametrize(("command", "run"), COMMANDS)
def test_every_command_names_a_function_that_takes_its_arguments(
    command: argparse.ArgumentParser, run: str | None
) -> None:
    assert run, f"{command.prog} names no function"
    assert list(inspect.signature(resolve_name(run)).parameters) == ["args"]
    assert {"help", "debug"} <= {action.dest for action in command._actions}


@pytest.mark.parametrize(("command", "run"), COMMANDS)
def test_errors_name_the_whole_command(
    command: argparse.ArgumentParser,
    run: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Errors of the parser, and of the function that runs the command."""
    example = re.search(r"inpaint ((?:.*\\\n)*.*)", str(command.epilog))
    assert example
    words = shlex.split(example[1].replace("\\\n", " "))
    with pytest.raises(SystemExit) as end:
        main([*words, "--no-such-option"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"{command.prog}: there is no option --no-such-option")

    def fail(args: argparse.Namespace) -> int:
        raise ValueError("this does not work")

    monkeypatch.setattr("pipelines.cli.main.resolve_name", lambda name: fail)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith(f"{command.prog}: ValueError: this does not work")
