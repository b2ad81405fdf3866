"""The JuiceFS gateway as the product starts it, on a free port of loopback."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ports import free_port

from pipelines.cluster.services import write_environment

START = """
import sys
from pathlib import Path
from pipelines.cluster.services import s3
s3(Path(sys.argv[1]), int(sys.argv[2]))
"""
SECONDS = 60  # until it must answer: the machine may be busy


@contextmanager
def running_gateway(folder: Path, user: str, secret: str) -> Iterator[str]:
    """The address of a gateway over `folder`; it ends with the block."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    write_environment(folder / "s3.env", {"AWS_ACCESS_KEY_ID": user, "AWS_SECRET_ACCESS_KEY": secret})
    with open(folder / "gateway.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(folder), str(port)], stdout=log, stderr=log
        )
    try:
        _wait_for(uri, process, folder / "gateway.log")
        yield uri
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def _wait_for(uri: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{uri}/minio/health/live", timeout=5):
            return
        time.sleep(0.05)
    raise RuntimeError(f"the gateway does not answer: {log.read_text()[-2000:]}")
