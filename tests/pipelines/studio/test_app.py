"""The application's start, while requests come."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
REQUESTS = """
import tempfile, threading
from pathlib import Path
from support.studio_client import reader, running_app, studio_settings

paths = ("/api/versions", "/runs", "/models", "/api/snapshot?section=runs") * 2
with tempfile.TemporaryDirectory() as folder, running_app(studio_settings(Path(folder))) as app:
    answers = []
    threads = [threading.Thread(target=lambda path=path: answers.append(reader(app).get(path))) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(sorted(answer.status_code for answer in answers))
"""


@pytest.mark.slow  # imports MLflow in a process
def test_requests_while_the_studio_imports_its_libraries() -> None:
    """Two threads that import MLflow at once fail, most times."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))}
    command = [sys.executable, "-c", REQUESTS]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert answer.stdout == f"{[200] * 8}\n", answer.stderr[-2000:]
    assert "Traceback" not in answer.stderr
