"""Leases in folders and buckets: at most one holder, whichever process dies."""

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

from data_prep.storage import Storage, StorageError, open_storage
from data_prep.storage import s3 as s3_module
from pipelines.durable import lease
from pipelines.durable.lease import LeaseHeld, LeaseHolder

HOLDER_SCRIPT = """
import sys, time
from data_prep.storage import open_storage
from pipelines.durable import lease
held = lease.acquire(open_storage(sys.argv[1]), "step")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def s3(s3):
    return open_storage(f"{s3}/runs")


@pytest.fixture(params=["conditional", "unconditional"])
def any_s3(request, s3, monkeypatch):
    """A server that supports If-Match and If-None-Match, and one that does not."""
    if request.param == "unconditional":
        monkeypatch.setattr(s3_module, "_probe_conditional_put", lambda *_: False)
        monkeypatch.setattr(s3_module, "CLAIM_SECONDS", 0.3)
    return s3


@pytest.fixture(params=["folder", "bucket"])
def storage(request, tmp_path) -> Storage:
    return open_storage(tmp_path) if request.param == "folder" else request.getfixturevalue("s3")


def files(storage: Storage) -> list[str]:
    return [key for key, _ in storage.list() if not key.startswith(".tmp-")]


def write_foreign_lease(storage: Storage, name: str = "step") -> None:
    """A lease of another machine's process, which does not renew it."""
    record = {
        "host": "far",
        "pid": 7,
        "since": "2026-01-02T03:04:05+00:00",
        "pids": "far away",
        "token": "other",
    }
    storage.write(f"leases/{name}.lock", json.dumps(record).encode())


def advance_server_clock(monkeypatch, storage: Storage, seconds: float) -> None:
    """Make the server's clock `seconds` fast from now on."""
    read = type(storage).read_with_etag

    def shifted(self, key):
        stored = read(self, key)
        return stored._replace(server_time=stored.server_time + seconds)

    monkeypatch.setattr(type(storage), "read_with_etag", shifted)


def test_the_error_names_the_holder_in_one_line(storage):
    with lease.acquire(storage, "step"):
        assert lease.current_holder(storage, "step").pid == os.getpid()
        with pytest.raises(LeaseHeld) as held:
            lease.acquire(storage, "step")
        lease.acquire(storage, "another").release()
    text = str(held.value)
    assert "\n" not in text
    assert re.search(
        rf"process {os.getpid()} on {re.escape(socket.gethostname())} .*'step' since \d{{4}}-", text
    )
    assert storage.uri in text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "7"}', '{"host": "far", "more": 1}'])
def test_an_unreadable_lease_is_held_until_it_expires(s3, monkeypatch, text):
    s3.write("leases/step.lock", text.encode())
    assert lease.current_holder(s3, "step") == LeaseHolder()
    with pytest.raises(LeaseHeld, match=r"process \? on \? has been running 'step' since just now"):
        lease.acquire(s3, "step")
    advance_server_clock(monkeypatch, s3, 70)
    with lease.acquire(s3, "step") as held:
        assert held.renew()


def test_the_keys_of_a_stored_lease_do_not_change(storage):
    with lease.acquire(storage, "step"):
        record = json.loads(storage.read("leases/step.lock"))
        assert list(record) == ["host", "pid", "since", "pids", "token", "renewed"]
        assert lease.current_holder(storage, "step").token == record["token"]
    assert LeaseHolder.parse(json.dumps(record | {"renewed": 3})).renewals == 3


def test_a_released_lease_is_deleted_and_can_be_acquired(storage):
    for _ in range(3):
        held = lease.acquire(storage, "step")
        held.release()
        held.release()
    assert files(storage) == []
    assert lease.current_holder(storage, "step") is None


def test_the_lease_of_a_killed_holder_can_be_acquired(storage):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER_SCRIPT, storage.uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        assert lease.current_holder(storage, "step").pid == process.pid
        with pytest.raises(LeaseHeld, match=f"process {process.pid} "):
            lease.acquire(storage, "step")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert files(storage) == ["leases/step.lock"]  # left behind
    assert lease.current_holder(storage, "step") is None
    with lease.acquire(storage, "step") as held:
        assert held.renew()
    assert files(storage) == []


def test_a_folder_has_one_holder_at_a_time_although_holders_delete_the_file(tmp_path):
    storage, holders, max_holders, acquired = open_storage(tmp_path), 0, 0, 0

    def worker() -> None:
        nonlocal holders, max_holders, acquired
        while acquired < 200:
            try:
                with lease.acquire(storage, "step"):
                    holders += 1
                    max_holders = max(max_holders, holders)
                    acquired += 1
                    holders -= 1
            except LeaseHeld:
                pass

    threads = [threading.Thread(target=worker) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert acquired >= 200
    assert max_holders == 1


def test_reading_the_holder_does_not_block_acquire(tmp_path):
    """`inpaint status` locks the file for an instant; a driver that acquires it then must not fail."""
    storage, stop = open_storage(tmp_path), threading.Event()
    storage.write("leases/step.lock", b"")  # left by a killed driver

    def read_holder() -> None:
        while not stop.is_set():
            lease.current_holder(storage, "step")

    reader = threading.Thread(target=read_holder)
    reader.start()
    try:
        for _ in range(200):
            lease.acquire(storage, "step").release()
    finally:
        stop.set()
        reader.join()


def test_a_folder_that_cannot_be_written_gives_a_one_line_error(tmp_path):
    (tmp_path / "leases").write_text("in the way")
    with pytest.raises(StorageError) as error:
        lease.acquire(open_storage(tmp_path), "step")
    assert "'step'" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_machines_lease_in_a_bucket_can_be_acquired_once_expired(any_s3, monkeypatch):
    write_foreign_lease(any_s3)
    with pytest.raises(LeaseHeld, match=r"process 7 on far .*since 2026-01-02T03:04:05"):
        lease.acquire(any_s3, "step")
    advance_server_clock(monkeypatch, any_s3, 50)
    with pytest.raises(LeaseHeld):
        lease.acquire(any_s3, "step")
    advance_server_clock(monkeypatch, any_s3, 20)
    assert lease.current_holder(any_s3, "step") is None
    with lease.acquire(any_s3, "step") as held:
        assert held.renew()
        assert json.loads(any_s3.read("leases/step.lock"))["pid"] == os.getpid()
    assert files(any_s3) == []


def test_acquire_or_wait_waits_for_a_dead_clusters_lease_and_reports_it(s3):
    write_foreign_lease(s3)
    reports: list[str] = []
    start = time.monotonic()
    with lease.acquire_or_wait(s3, "step", reports.append, expire_seconds=3.0, poll_seconds=0.1) as held:
        assert held.renew()
    assert 1.0 < time.monotonic() - start < 20  # the server's clock has whole seconds
    (line,) = reports
    assert line.startswith("process 7 on far held 'step' and last renewed its lease ")


def test_acquire_or_wait_fails_once_the_holder_renews(s3):
    held = lease.acquire(s3, "step", renew_seconds=0.5)
    record = json.loads(s3.read("leases/step.lock"))
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "_machine_id", lambda: "another machine")
        assert record["pids"] != "another machine"
        with pytest.raises(LeaseHeld):
            lease.acquire_or_wait(s3, "step", expire_seconds=60.0, poll_seconds=0.1)
    assert time.monotonic() - start < 30
    held.release()


def test_acquire_or_wait_fails_at_once_for_a_live_process_of_this_machine(s3):
    reports: list[str] = []
    with lease.acquire(s3, "step", renew_seconds=3600), pytest.raises(LeaseHeld):
        lease.acquire_or_wait(s3, "step", reports.append)
    assert reports == []


def test_one_of_several_processes_acquires_an_expired_lease(any_s3, monkeypatch):
    write_foreign_lease(any_s3)
    read, all_have_read, challengers = type(any_s3).read_with_etag, threading.Barrier(6), set()

    def read_together(self, key):
        """All read the same expired lease before one of them replaces it."""
        stored = read(self, key)
        if threading.current_thread() in challengers:
            challengers.remove(threading.current_thread())
            all_have_read.wait(timeout=20)
        return stored

    def challenge(_: int) -> lease.Lease | None:
        challengers.add(threading.current_thread())
        try:
            return lease.acquire(any_s3, "step", expire_seconds=-1.0)  # every lease counts as expired
        except LeaseHeld:
            return None

    monkeypatch.setattr(type(any_s3), "read_with_etag", read_together)
    with ThreadPoolExecutor(6) as pool:
        winners = [won for won in pool.map(challenge, range(6)) if won]
    assert len(winners) == 1
    assert winners[0].renew()
    winners[0].release()


def test_a_renewed_lease_does_not_expire(s3):
    with lease.acquire(s3, "step", renew_seconds=0.2, expire_seconds=2.0):
        deadline = time.monotonic() + 4.0
        while time.monotonic() < deadline:  # twice the time after which it would expire
            with pytest.raises(LeaseHeld):
                lease.acquire(s3, "step", expire_seconds=2.0)
            assert lease.current_holder(s3, "step", expire_seconds=2.0)


def test_a_holder_notices_that_its_lease_was_taken_over(any_s3):
    held = lease.acquire(any_s3, "step", renew_seconds=3600)
    write_foreign_lease(any_s3)  # another process took it over
    assert not held.renew()
    assert held.lost
    held.release()
    assert json.loads(any_s3.read("leases/step.lock"))["host"] == "far"  # release leaves it


def test_a_deleted_lease_counts_as_lost(s3):
    held = lease.acquire(s3, "step", renew_seconds=3600)
    s3.delete("leases/step.lock")
    assert not held.renew()
    held.release()


def test_a_lost_response_does_not_lose_the_lease(s3, monkeypatch):
    """The server wrote the lease, its response was lost, and the client's retry was refused: it holds the lease."""
    kind = type(s3)
    for name in ("put_if_absent", "put_if_match"):
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, original=original: original(*args) and False)
    with lease.acquire(s3, "step", renew_seconds=3600) as held:
        assert held.renew()
        assert held.renew()
    write_foreign_lease(s3)
    with lease.acquire(s3, "step", expire_seconds=-1.0, renew_seconds=3600) as held:
        assert held.renew()


def test_a_temporary_outage_of_the_server_does_not_lose_the_lease(s3, monkeypatch):
    is_down, was_asked = threading.Event(), threading.Event()
    read = type(s3).read_with_etag

    def read_or_fail(self, key):
        if is_down.is_set():
            was_asked.set()
            raise StorageError("the server does not answer")
        return read(self, key)

    monkeypatch.setattr(type(s3), "read_with_etag", read_or_fail)
    with lease.acquire(s3, "step", renew_seconds=0.05) as held:
        is_down.set()
        assert was_asked.wait(20)
        is_down.clear()
        assert held.renew()
        before = read(s3, "leases/step.lock").etag
        deadline = time.monotonic() + 20
        while read(s3, "leases/step.lock").etag == before:  # until the next renewal
            assert time.monotonic() < deadline
        assert not held.lost


def test_a_pid_of_another_machine_does_not_count_as_dead(s3):
    """Whether a process with this pid exists here says nothing about the other machine."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    held = lease.acquire(s3, "step", renew_seconds=3600)
    record = json.loads(s3.read("leases/step.lock"))
    s3.write("leases/step.lock", json.dumps(record | {"pid": child.pid, "pids": "elsewhere"}).encode())
    with pytest.raises(LeaseHeld):
        lease.acquire(s3, "step")
    s3.write("leases/step.lock", json.dumps(record | {"pid": child.pid, "token": "other"}).encode())
    lease.acquire(s3, "step").release()
    held.release()
