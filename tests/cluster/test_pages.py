"""The command and Python blocks of the README and of docs/, run in page order on one finished demo."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cli.main import main
from support.cluster_harness import DEMO, ROOT, CliRun, ListenerWatch, clean_environment
from support.pages import Block, blocks, inpaint_arguments, pages

PAGES = [
    page for page in pages() if any(b.language in ("sh", "python") and not b.no_run for b in blocks(page))
]
SHOWN = 3000  # characters of a failed block's output
PYTHON = """
import json, sys, traceback
namespace = {"__name__": "__main__"}
for line in sys.stdin:
    try:
        exec(compile(json.loads(line), "<block>", "exec"), namespace)
        error = ""
    except BaseException:
        error = traceback.format_exc()
    sys.stdout.flush()
    print("\\x00" + json.dumps(error), flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def watch() -> Iterator[ListenerWatch]:
    """Watches the processes started by the commands: all listen on loopback only."""
    with ListenerWatch(os.getpid()) as watch:
        yield watch
    assert watch.exposed == set()
    assert {"gcs_server", "raylet"} <= {name for name, _ in watch.listeners}


class PythonPage:
    """The Python blocks of one page, run in one process."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PYTHON],
            cwd=folder,
            env=clean_environment() | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, block: Block) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(block.text) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("\0"):
                error = json.loads(line[1:])
                assert not error, f"{block}:\n{error}"
                return
        pytest.fail(f"{block}: Python ended with status {self.process.wait()}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def python(place: CliRun) -> Iterator[PythonPage]:
    page = PythonPage(place.folder)
    yield page
    page.close()


def shortened(arguments: list[str]) -> list[str]:
    """The demo with the steps and sizes of the finished run, and few photographs to compare models on."""
    if len(arguments) > 1 and arguments[1] == "demo":
        position = arguments.index("data.source=photos") if "data.source=photos" in arguments else 0
        others = arguments[2:] if not position else arguments[2 : position - 1] + arguments[position + 1 :]
        arguments = [arguments[0], *DEMO, *others]
    pairs = zip(["", *arguments], arguments)
    return ["few" if (before, word) == ("--images", "photos") else word for before, word in pairs]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(
    page: Path,
    place: CliRun,
    python: PythonPage,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for block in blocks(page):
        if block.no_run:
            continue
        if block.language == "python":
            python.run(block)
        for command in block.commands() if block.language == "sh" else ():
            run_command(block, command, capfd)


def run_command(block: Block, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = inpaint_arguments(command)
    if arguments is None or not command.startswith("inpaint "):
        done = subprocess.run(
            ["bash", "-ec", command], env=clean_environment() | {"PATH": _path()}, text=True
        )
        status = done.returncode
    else:
        with pytest.raises(SystemExit) as end:
            main(shortened(shlex.split(command)[1:]))
        status = int(end.value.code or 0)
    captured = capfd.readouterr()
    output = captured.out + captured.err
    assert status == 0, f"{block}: {command}\n{output[-SHOWN:]}"
    assert "Traceback" not in output, f"{block}: {command}"


def _path() -> str:
    """With the environment's own commands first, as after its activation."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
