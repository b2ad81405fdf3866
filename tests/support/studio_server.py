"""`inpaint studio` as a process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from support.cluster_harness import clean_environment, kill_processes, process_tree, wait_for
from support.mlflow_server import QUIET
from support.ports import free_port


class StudioServer:
    """Context manager: `inpaint studio` on a free port.

    `link` is the printed link, which carries the token; `url` the address without it.
    """

    def __init__(self, tracking_uri: str, storage: str | Path, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.url, self.link, self.log = f"http://127.0.0.1:{self.port}", "", folder / "studio.log"
        self.command = [sys.executable, "-m", "pipelines", "studio", "--port", str(self.port)]
        self.command += ["--tracking-uri", tracking_uri, "--storage", str(storage), *options]
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> StudioServer:
        environment = clean_environment() | QUIET | {"PYTHONUNBUFFERED": "1"}
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        process = self.process
        wait_for(lambda: process.poll() is not None or self._find_link(), "the studio's link")
        assert process.poll() is None, self.log.read_text()[-3000:]
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process:
            kill_processes(process_tree(self.process.pid))
            self.process.wait()
            self.process = None

    def _find_link(self) -> bool:
        """Whether the studio has printed its link, which it does when it answers."""
        found = re.search(rf"http://\S*:{self.port}/\S*token\S*", self.log.read_text())
        if found:
            self.link = found[0]
        return bool(found)

    @property
    def token(self) -> str:
        return urlsplit(self.link).query.rpartition("=")[2]
