"""A disk that is full: real ones, of a few hundred kilobytes, in a mount namespace of the test's own."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from harness import clean_environment

ALONE = ["unshare", "--user", "--map-root-user", "--mount"]


def on_a_disk_of(size: str, folder: Path, *arguments: str) -> list[str]:
    """What the command said on a file system of that size mounted at `folder`, and what it left there."""
    folder.mkdir()
    command = shlex.join([sys.executable, "-m", "pipelines", *arguments])
    script = (
        f"mount -t tmpfs -o size={size} tmpfs {folder} && {{ {command}; echo status $?; find {folder}; }}"
    )
    done = subprocess.run(
        [*ALONE, "sh", "-c", script], capture_output=True, text=True, env=clean_environment(), check=False
    )
    return (done.stdout + done.stderr).splitlines()


@pytest.mark.parametrize(
    ("size", "arguments", "culprit"),
    [
        ("400k", ("shard", "bundled", "{}/shards", "--size", "64"), "-00000.tar"),
        ("400k", ("run", "demo", "--storage", "{}"), "mlflow.db"),
        ("3m", ("run", "demo", "--storage", "{}"), "/disk"),  # in a step: its tars, or MLflow's database
    ],
)
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing_half_written(
    tmp_path: Path, size: str, arguments: tuple[str, ...], culprit: str
) -> None:
    if subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no process have a mount namespace of its own")
    disk = tmp_path / "disk"
    said = on_a_disk_of(size, disk, *(argument.format(disk) for argument in arguments))
    (line,) = [line for line in said if line.startswith("inpaint ")]
    assert culprit in line
    assert "the disk is full; free some space" in line
    assert "status 1" in said
    assert not any("Traceback" in line or "/.tmp-" in line for line in said)
