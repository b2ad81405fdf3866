"""Imports in the threads of requests, one at a time.

The modules of MLflow and torch import each other in circles. When two threads import them at once, Python breaks the
deadlock by giving one of them an incomplete module, whose import then fails.
"""

from __future__ import annotations

import importlib
import threading
from types import ModuleType

_lock = threading.RLock()


def import_alone(name: str) -> ModuleType:
    """The module, imported while no other thread imports by this function."""
    with _lock:
        return importlib.import_module(name)
