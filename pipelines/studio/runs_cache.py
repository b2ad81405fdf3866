"""The cached runs of a storage. Imports what reads them with the first use."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from typing import TYPE_CHECKING

from pipelines.studio.cached import Cached
from pipelines.studio.imports import import_alone

if TYPE_CHECKING:
    from pipelines.studio.run_views import RunsSnapshot
    from pipelines.studio.runs_snapshot import RunsReader


def cached_runs(storage_uri: str, seconds: float) -> Cached[RunsSnapshot]:
    """All runs of a storage, read again when they are older than `seconds` and have changed."""
    source = _Source(storage_uri)
    return Cached(source.load, seconds, source.check)


class _Source:
    def __init__(self, storage_uri: str) -> None:
        self.storage_uri = storage_uri

    @cached_property
    def reader(self) -> RunsReader:
        import_alone("pipelines.studio.runs_snapshot")
        from pipelines.studio.runs_snapshot import RunsReader

        return RunsReader(self.storage_uri)

    def check(self) -> Hashable:
        return self.reader.check()

    def load(self) -> RunsSnapshot:
        return self.reader.load()
