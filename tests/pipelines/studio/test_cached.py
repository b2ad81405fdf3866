"""The studio's cache: who waits, when it loads again, and what it keeps when loading fails."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_prep.uris import sqlite_url
from pipelines.studio.cached import Cached, NotLoaded, database_check


class Harness:
    """A source that is counted, a clock that is set, and refreshes that run when the test says so."""

    def __init__(self, seconds: float = 4.0, checks: bool = False) -> None:
        self.now, self.source, self.loads, self.took = 0.0, "a", 0, 0.0
        self.fails, self.state, self.check_took = "", 0, 0.0
        self.started: list[Callable[[], None]] = []
        self.cached = Cached(
            self.load,
            seconds,
            self.check if checks else None,
            clock=lambda: self.now,
            start=self.started.append,
        )

    def load(self) -> str:
        self.loads += 1
        self.now += self.took
        if self.fails:
            raise ValueError(self.fails)
        return self.source

    def check(self) -> int:
        self.now += self.check_took
        return self.state

    def run_refresh(self) -> None:
        self.started.pop()()


def test_the_first_get_loads_once_however_many_ask() -> None:
    loads, entered, go_on = [], threading.Event(), threading.Event()

    def load() -> str:
        loads.append(1)
        entered.set()
        assert go_on.wait(30)
        return "value"

    cached = Cached(load, 4.0)
    with ThreadPoolExecutor(8) as pool:
        values = [pool.submit(cached.get) for _ in range(8)]
        assert entered.wait(30)
        go_on.set()
        assert {value.result(30) for value in values} == {"value"}
    assert len(loads) == 1


def test_later_gets_do_not_wait_and_one_refresh_runs_at_a_time() -> None:
    harness = Harness()
    assert harness.cached.get() == "a"
    harness.source = "b"
    harness.now = 3.9
    assert harness.cached.get() == "a"
    assert not harness.started, "it is not old yet"
    harness.now = 4.0
    first = harness.cached.id
    assert [harness.cached.get() for _ in range(3)] == ["a"] * 3
    assert len(harness.started) == 1
    harness.run_refresh()
    assert harness.cached.get() == "b"
    assert harness.cached.id != first
    assert harness.loads == 2


def test_the_id_stays_while_the_value_does() -> None:
    harness = Harness()
    harness.cached.get()
    first = harness.cached.id
    harness.now = 5.0
    harness.cached.get()
    harness.run_refresh()
    assert harness.loads == 2
    assert harness.cached.id == first
    assert Harness().cached.id.split("-")[0] != first.split("-")[0], "another process has other ids"


def test_a_failed_refresh_keeps_the_value_and_a_good_one_clears_the_error() -> None:
    harness = Harness()
    harness.cached.get()
    first = harness.cached.id
    harness.fails, harness.now = "the server is\naway", 4.0
    harness.cached.get()
    harness.run_refresh()
    assert harness.cached.get() == "a"
    assert harness.cached.error == "ValueError: the server is away"  # in one line
    failed = harness.cached.id
    assert failed != first, "the page shows the error"
    harness.fails, harness.now = "", 8.0
    harness.cached.get()
    harness.run_refresh()
    assert harness.cached.error == ""
    assert harness.cached.id not in (first, failed)


def test_a_first_load_that_fails_is_raised_and_repeated_later() -> None:
    harness = Harness()
    harness.fails = "no such storage"
    for _ in range(3):
        with pytest.raises(NotLoaded, match="no such storage"):
            harness.cached.get()
    assert harness.loads == 1, "requests in a row do not wait for a dead server one after another"
    harness.fails, harness.now = "", 4.0
    assert harness.cached.get() == "a"
    assert harness.cached.error == ""


def test_nothing_is_loaded_while_the_cheap_check_is_the_same() -> None:
    harness = Harness(checks=True)
    harness.cached.get()
    for now in (4.0, 8.0):
        harness.now = now
        harness.cached.get()
        harness.run_refresh()
    assert harness.loads == 1
    harness.state, harness.source, harness.now = 1, "b", 12.0
    harness.cached.get()
    harness.run_refresh()
    assert harness.cached.get() == "b"


def test_a_failed_load_is_repeated_though_the_cheap_check_is_the_same() -> None:
    harness = Harness(checks=True)
    harness.cached.get()
    harness.state, harness.fails, harness.now = 1, "locked", 4.0
    harness.cached.get()
    harness.run_refresh()
    harness.fails, harness.source, harness.now = "", "b", 8.0
    harness.cached.get()
    harness.run_refresh()
    assert harness.cached.get() == "b"


def test_a_slow_load_takes_at_most_a_third_of_the_time() -> None:
    harness = Harness()
    harness.took = 5.0
    harness.cached.get()  # ends at 5
    harness.now = 14.9
    harness.cached.get()
    assert not harness.started
    harness.now = 15.0
    harness.cached.get()
    assert harness.started


def test_a_slow_check_takes_at_most_a_third_of_the_time() -> None:
    harness = Harness(checks=True)
    harness.check_took = 2.0
    harness.cached.get()
    harness.now = 10.0
    harness.cached.get()
    harness.run_refresh()  # from 10 to 12
    harness.now = 15.9
    harness.cached.get()
    assert not harness.started
    harness.now = 16.0
    harness.cached.get()
    assert harness.started


def test_refresh_loads_at_once_and_in_spite_of_the_check() -> None:
    harness = Harness(checks=True)
    harness.cached.get()
    harness.source = "b"
    assert harness.cached.refresh() == "b"
    assert not harness.started


def test_a_get_that_may_wait_returns_the_new_value() -> None:
    now = [0.0]
    values = iter("ab")
    cached = Cached(lambda: next(values), 4.0, clock=lambda: now[0])
    assert cached.get() == "a"
    now[0] = 4.0
    assert cached.get(wait_seconds=30) == "b"


def test_the_database_check_sees_commits_in_the_file_and_in_its_log(tmp_path: Path) -> None:
    path = tmp_path / "a b.db"  # sqlite_url quotes the space
    path.write_bytes(b"1")
    check = database_check(sqlite_url(path))
    assert check is not None
    first = check()
    assert check() == first
    (tmp_path / "a b.db-wal").write_bytes(b"frame")
    second = check()
    assert second != first
    os.utime(path, ns=(1, 1))
    assert check() != second
    assert database_check("http://127.0.0.1:5000") is None
