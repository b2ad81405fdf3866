"""Runs Ray tasks over a list of items, with few enough in flight to follow a cluster that grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

ProgressCallback = Callable[..., None]  # (done, total, note)


def run_tasks(
    task: Any,
    shared: Any,
    items: Sequence[Any],
    sizes: Sequence[int],
    progress: ProgressCallback,
    unit: str,
    total: int | None = None,
    max_running: int | None = None,
    on_error: Callable[[int, Exception], Any] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run the remote function `task(shared, item)` for each item and yield (index, result) as tasks finish.

    `sizes` are the items' numbers of photographs; `total` (None: their sum) also counts photographs finished earlier.
    `progress` gets both and the rate. At most `max_running` tasks are submitted at a time (None: about twice as many as
    the cluster has CPUs). The first failure cancels the rest, unless `on_error(index, error)` returns a result instead
    of it.
    """
    total = sum(sizes) if total is None else total
    done, shared_ref = total - sum(sizes), ray.put(shared)
    done_before, start = done, time.monotonic()
    progress(done, total, unit)
    running: dict[ray.ObjectRef, int] = {}
    remaining = iter(range(len(items)))
    try:
        while True:
            # read again: the cluster may grow
            limit = max_running or 2 + int(2 * ray.cluster_resources().get("CPU", 1))
            while len(running) < limit and (index := next(remaining, None)) is not None:
                running[task.remote(shared_ref, items[index])] = index
            if not running:
                return
            (ready, *_), _ = ray.wait(list(running))
            index = running.pop(ready)
            try:
                result = ray.get(ready)
            except Exception as error:
                if on_error is None:
                    raise
                result = on_error(index, error)
            done += sizes[index]
            rate = (done - done_before) / (time.monotonic() - start)
            progress(done, total, f"{unit}, {rate:.0f}/s")
            yield index, result
    finally:
        for ref in running:
            ray.cancel(ref)
