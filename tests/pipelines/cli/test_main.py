"""The command line's parser: every command names the function that runs it."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from pkgutil import resolve_name

import pytest

from pipelines.cli.main import build_parser


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


@pytest.mark.parametrize(
    ("command", "run"), [pytest.param(*c, id=c[0].prog) for c in commands(build_parser())]
)
def test_every_command_names_a_function_that_takes_its_arguments(
    command: argparse.ArgumentParser, run: str | None
) -> None:
    assert run, f"{command.prog} names no function"
    assert list(inspect.signature(resolve_name(run)).parameters) == ["args"]
    assert {"help", "debug"} <= {action.dest for action in command._actions}
