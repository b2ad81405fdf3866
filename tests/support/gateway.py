"""The JuiceFS gateway as `inpaint services` starts it, on a free port of loopback."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.cluster.services import write_env_file
from support.ports import free_port

START_SCRIPT = """
import sys
from pathlib import Path
from pipelines.cluster.service_process import exec_server, locked
from pipelines.cluster.services import prepare_s3
folder = Path(sys.argv[1])
with locked(folder, "s3") as lock:
    exec_server(prepare_s3(folder, int(sys.argv[2])), lock)
"""
START_SECONDS = 60  # time limit for its first answer on a busy machine


@contextmanager
def running_gateway(folder: Path, user: str, secret: str) -> Iterator[str]:
    """The URL of a gateway for `folder`; it stops when the block ends."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    write_env_file(folder / "s3.env", {"AWS_ACCESS_KEY_ID": user, "AWS_SECRET_ACCESS_KEY": secret})
    with open(folder / "gateway.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", START_SCRIPT, str(folder), str(port)], stdout=log, stderr=log
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
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{uri}/minio/health/live", timeout=5):
            return
        time.sleep(0.05)
    raise RuntimeError(f"the gateway does not answer: {log.read_text()[-2000:]}")
