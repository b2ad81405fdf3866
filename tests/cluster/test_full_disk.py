"""A full disk: real file systems of a few hundred kilobytes, mounted in a private mount namespace."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.cluster_harness import clean_environment

ALONE = ["unshare", "--user", "--map-root-user", "--mount"]


def run_on_disk(size: str, folder: Path, *arguments: str) -> list[str]:
    """Run a command on a file system of `size` mounted at `folder`; return its output and the files that remain."""
    folder.mkdir()
    command = shlex.join([sys.executable, "-m", "pipelines", *arguments])
    script = (
        f"mount -t tmpfs -o size={size} tmpfs {folder} && {{ {command}; echo status $?; find {folder}; }}"
    )
    process = subprocess.run(
        [*ALONE, "sh", "-c", script], capture_output=True, text=True, env=clean_environment(), check=False
    )
    return (process.stdout + process.stderr).splitlines()


@pytest.mark.parametrize(
    ("size", "arguments", "culprit"),
    [
        ("400k", ("shard", "bundled", "{}/shards", "--size", "64"), "-00000.tar"),
        ("400k", ("run", "demo", "--storage", "{}"), "mlflow.db"),
        ("3m", ("run", "demo", "--storage", "{}"), "/disk"),  # in a step: its tars or MLflow's database
    ],
)
def test_a_full_disk_fails_in_one_line_and_leaves_no_partial_file(
    tmp_path: Path, size: str, arguments: tuple[str, ...], culprit: str
) -> None:
    if subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow private mount namespaces")
    disk = tmp_path / "disk"
    output = run_on_disk(size, disk, *(argument.format(disk) for argument in arguments))
    (line,) = [line for line in output if line.startswith("inpaint ")]
    assert culprit in line
    assert "the disk is full; free some space" in line
    assert "status 1" in output
    assert not any("Traceback" in line or "/.tmp-" in line for line in output)
