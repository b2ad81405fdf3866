"""Leases in folders and buckets: one holder, whatever happens to it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_prep import bucket
from data_prep.storage import Storage, StorageError, open_storage
from pipelines.durable import lease
from pipelines.durable.lease import StorageBusy

HOLD = """
import sys, time
from data_prep.storage import open_storage
from pipelines.durable import lease
held = lease.take(open_storage(sys.argv[1]), "step")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def s3(s3):
    return open_storage(f"{s3}/runs")


@pytest.fixture(params=["conditional", "unconditional"])
def any_s3(request, s3, monkeypatch):
    """A server that obeys If-Match and If-None-Match, and one that does not."""
    if request.param == "unconditional":
        monkeypatch.setattr(bucket, "_probe_conditions", lambda *_: False)
        monkeypatch.setattr(bucket, "SETTLE", 0.3)
    return s3


@pytest.fixture(params=["folder", "bucket"])
def storage(request, tmp_path) -> Storage:
    return open_storage(tmp_path) if request.param == "folder" else request.getfixturevalue("s3")


def files(storage: Storage) -> list[str]:
    return [key for key, _ in storage.list() if not key.startswith(".tmp-")]


def elsewhere(storage: Storage, name: str = "step") -> None:
    """A lease of another machine's process, which will not be renewed."""
    card = {
        "host": "far",
        "pid": 7,
        "since": "2026-01-02T03:04:05+00:00",
        "pids": "far away",
        "token": "other",
    }
    storage.write(f"leases/{name}.lock", json.dumps(card).encode())


def later(monkeypatch, storage: Storage, seconds: float) -> None:
    """Let the server's clock show `seconds` more from now on."""
    read = type(storage).read_tagged

    def shifted(self, key):
        found = read(self, key)
        return found._replace(server_now=found.server_now + seconds)

    monkeypatch.setattr(type(storage), "read_tagged", shifted)


def test_the_second_is_told_who_holds_it_in_one_line(storage):
    with lease.take(storage, "step"):
        assert lease.holder(storage, "step")["pid"] == os.getpid()
        with pytest.raises(StorageBusy) as busy:
            lease.take(storage, "step")
        lease.take(storage, "another").release()
    text = str(busy.value)
    assert "\n" not in text
    assert re.search(
        rf"process {os.getpid()} on {re.escape(socket.gethostname())} .*'step' since \d{{4}}-", text
    )
    assert storage.uri in text


def test_a_released_lease_leaves_nothing_and_can_be_taken(storage):
    for _ in range(3):
        held = lease.take(storage, "step")
        held.release()
        held.release()
    assert files(storage) == []
    assert lease.holder(storage, "step") is None


def test_a_killed_holder_blocks_nobody(storage):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, storage.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        assert lease.holder(storage, "step")["pid"] == process.pid
        with pytest.raises(StorageBusy, match=f"process {process.pid} "):
            lease.take(storage, "step")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert files(storage) == ["leases/step.lock"]  # left behind, and of no consequence
    assert lease.holder(storage, "step") is None
    with lease.take(storage, "step") as held:
        assert held.renew()
    assert files(storage) == []


def test_one_at_a_time_in_a_folder_although_holders_delete_the_file(tmp_path):
    storage, inside, most, taken = open_storage(tmp_path), 0, 0, 0

    def worker() -> None:
        nonlocal inside, most, taken
        while taken < 200:
            try:
                with lease.take(storage, "step"):
                    inside += 1
                    most = max(most, inside)
                    taken += 1
                    inside -= 1
            except StorageBusy:
                pass

    threads = [threading.Thread(target=worker) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert taken >= 200
    assert most == 1


def test_looking_does_not_get_in_the_way(tmp_path):
    """A status command locks the file for an instant; a driver that comes just then must not call it busy."""
    storage, stop = open_storage(tmp_path), threading.Event()
    storage.write("leases/step.lock", b"")  # left by a killed driver

    def look() -> None:
        while not stop.is_set():
            lease.holder(storage, "step")

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(200):
            lease.take(storage, "step").release()
    finally:
        stop.set()
        looker.join()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "leases").write_text("in the way")
    with pytest.raises(StorageError) as error:
        lease.take(open_storage(tmp_path), "step")
    assert "'step'" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_machines_lease_in_a_bucket_is_taken_over_once_stale(any_s3, monkeypatch):
    elsewhere(any_s3)
    with pytest.raises(StorageBusy, match=r"process 7 on far .*since 2026-01-02T03:04:05"):
        lease.take(any_s3, "step")
    later(monkeypatch, any_s3, 50)
    with pytest.raises(StorageBusy):
        lease.take(any_s3, "step")
    later(monkeypatch, any_s3, 20)
    assert lease.holder(any_s3, "step") is None
    with lease.take(any_s3, "step") as held:
        assert held.renew()
        assert json.loads(any_s3.read("leases/step.lock"))["pid"] == os.getpid()
    assert files(any_s3) == []


def test_a_dead_clusters_lease_is_waited_for_and_told_of(s3):
    elsewhere(s3)
    told: list[str] = []
    began = time.monotonic()
    with lease.outwait(s3, "step", told.append, stale=3.0, look=0.1) as held:
        assert held.renew()
    assert 1.0 < time.monotonic() - began < 20  # the server's clock has whole seconds
    (line,) = told
    assert line.startswith("process 7 on far was at 'step', and last said so ")


def test_who_lives_elsewhere_is_not_waited_for(s3):
    """It renews its lease meanwhile."""
    held = lease.take(s3, "step", every=0.5)
    card = json.loads(s3.read("leases/step.lock"))
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "_pids", lambda: "another machine")
        assert card["pids"] != "another machine"
        with pytest.raises(StorageBusy):
            lease.outwait(s3, "step", stale=60.0, look=0.1)
    assert time.monotonic() - began < 30
    held.release()


def test_a_living_process_of_this_machine_is_busy_at_once(s3):
    told: list[str] = []
    with lease.take(s3, "step", every=3600), pytest.raises(StorageBusy):
        lease.outwait(s3, "step", told.append)
    assert told == []


def test_of_many_who_find_it_stale_one_wins(any_s3, monkeypatch):
    elsewhere(any_s3)
    read, all_have_read, challengers = type(any_s3).read_tagged, threading.Barrier(6), set()

    def read_together(self, key):
        """All see the same stale lease before any replaces it: the replacement itself decides."""
        found = read(self, key)
        if threading.current_thread() in challengers:
            challengers.remove(threading.current_thread())
            all_have_read.wait(timeout=20)
        return found

    def challenge(_: int) -> lease.Lease | None:
        challengers.add(threading.current_thread())
        try:
            return lease.take(any_s3, "step", stale=-1.0)  # everything is stale to these
        except StorageBusy:
            return None

    monkeypatch.setattr(type(any_s3), "read_tagged", read_together)
    with ThreadPoolExecutor(6) as pool:
        winners = [won for won in pool.map(challenge, range(6)) if won]
    assert len(winners) == 1
    assert winners[0].renew()
    winners[0].release()


def test_a_holder_that_lives_keeps_it_past_the_stale_time(s3):
    with lease.take(s3, "step", every=0.2, stale=2.0):
        deadline = time.monotonic() + 4.0
        while time.monotonic() < deadline:  # twice as long as a lease stands unrenewed
            with pytest.raises(StorageBusy):
                lease.take(s3, "step", stale=2.0)
            assert lease.holder(s3, "step", stale=2.0)


def test_a_holder_that_stood_still_learns_that_it_lost(any_s3):
    held = lease.take(any_s3, "step", every=3600)
    elsewhere(any_s3)  # somebody took it over
    assert not held.renew()
    assert held.lost
    held.release()
    assert json.loads(any_s3.read("leases/step.lock"))["host"] == "far"  # theirs stays


def test_a_deleted_lease_is_a_lost_one(s3):
    held = lease.take(s3, "step", every=3600)
    s3.delete("leases/step.lock")
    assert not held.renew()
    held.release()


def test_an_answer_lost_on_its_way_loses_no_lease(s3, monkeypatch):
    """The server did as asked, the answer got lost, the client asked again and was refused: it holds the lease."""
    kind = type(s3)
    for name in ("create", "replace_if"):
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, original=original: original(*args) and False)
    with lease.take(s3, "step", every=3600) as held:
        assert held.renew()
        assert held.renew()
    elsewhere(s3)
    with lease.take(s3, "step", stale=-1.0, every=3600) as held:
        assert held.renew()


def test_a_server_that_is_away_for_a_while_costs_no_lease(s3, monkeypatch):
    away, asked = threading.Event(), threading.Event()
    read = type(s3).read_tagged

    def sometimes(self, key):
        if away.is_set():
            asked.set()
            raise StorageError("the server does not answer")
        return read(self, key)

    monkeypatch.setattr(type(s3), "read_tagged", sometimes)
    with lease.take(s3, "step", every=0.05) as held:
        away.set()
        assert asked.wait(20)
        away.clear()
        assert held.renew()
        before = read(s3, "leases/step.lock").etag
        deadline = time.monotonic() + 20
        while read(s3, "leases/step.lock").etag == before:  # the renewer is at it again
            assert time.monotonic() < deadline
        assert not held.lost


def test_a_dead_process_of_another_machine_is_not_taken_for_dead(s3):
    """The same process number elsewhere says nothing about here."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    held = lease.take(s3, "step", every=3600)
    card = json.loads(s3.read("leases/step.lock"))
    s3.write("leases/step.lock", json.dumps(card | {"pid": child.pid, "pids": "elsewhere"}).encode())
    with pytest.raises(StorageBusy):
        lease.take(s3, "step")
    s3.write("leases/step.lock", json.dumps(card | {"pid": child.pid, "token": "other"}).encode())
    lease.take(s3, "step").release()
    held.release()
