"""Explanations of out-of-memory errors: messages of Ray 2.60 and older releases, CUDA's, and other texts."""

from __future__ import annotations

import re
from types import SimpleNamespace

import psutil
import pytest
from ray.exceptions import OutOfMemoryError

from pipelines.durable.memory import explain_out_of_memory, program_name, strip_arguments
from pipelines.durable.task import to_attempt_error

ADVICE = "a worker ran out of memory: set scaling.micro_batch_size = 4"
IDS = "lease ID=0100000001000000ffffffffffff"
DOCS = "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io. Consider more memory"


def ray_message(used: float, killed: list[str], rows: list[tuple[int, float, str]]) -> str:
    """A message of Ray 2.60's raylet with these numbers and processes."""
    table = "\n".join(f"{pid}\t{gigabytes:.2f}\t{command}" for pid, gigabytes, command in rows)
    selected = "\n".join(f"Selected to kill: {worker}" for worker in killed)
    return f"""{len(killed)} worker(s) were killed due to the node running low on memory. \
Memory on the node (IP: 127.0.0.1, ID: 5c5e8d7a93c5) was {used:.2f}GB used / 23.54GB limit (0.905693)
OOM kill reason: Memory usage 2719596544B exceeded threshold of 2717225216B (10.7% of 25276514304B limit)
Object store memory usage: [- objects spillable: 0
- bytes spillable: 0

Eviction Stats:
(global lru) capacity: 7131213004
(global lru) used: 0%]
Ray killed {len(killed)} worker(s) based on the killing policy
Considered workers: [
{selected}
]
Total non-selected idle workers: 1
Total non-selected idle workers USS bytes: 0.04GB
To see more information about memory usage on this node, use `ray logs raylet.out -ip 127.0.0.1`
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
{table}
{DOCS}"""


def actor(pid: int, gigabytes: float, name: str = "RayTrainWorker.__init__", job: str = "01000000") -> str:
    return (
        f"(Actor(b635c67e0e22d803f06b): job ID={job}, {IDS}, task name={name}, required resources={{}}, "
        f"pid={pid}, actual memory used={gigabytes:.2f}GB, worker ID=75f6a7533e00)"
    )


def task(pid: int, gigabytes: float, name: str = "train-context_encoder", job: str = "01000000") -> str:
    return (
        f"(Task: job ID={job}, {IDS}, task name={name}, required resources={{CPU: 1}}, pid={pid}, "
        f"actual memory used={gigabytes:.2f}GB, worker ID=2772563afeb5)"
    )


OLD_MESSAGE = """Task was killed due to the node running low on memory.
Memory on the node (IP: 172.17.0.2, ID: 8c5a1410) where the task (task ID: 41617bc740ae, \
name=allocate_memory, pid=548, memory used={gigabytes}GB) was running was 21.91GB / 33.28GB (0.658192), which exceeds \
the memory usage threshold of 0.65. Ray killed this worker (ID: 0f7695fa) because it was the most recently scheduled \
task; to see more information use `ray logs raylet.out -ip 172.17.0.2`. Top 10 memory users:
PID\tMEM(GB)\tCOMMAND
548\t{gigabytes}\tray::allocate_memory
99\t{other}\t/usr/lib/firefox/firefox -contentproc https://a.b/?token=secret
Refer to the documentation"""

PROCESSES = [
    (12295, 7.34, "/home/somebody/venv/bin/python df2.py --password=hunter2"),
    (12299, 6.36, "/home/somebody/venv/bin/python df1.py"),
    (13610, 0.33, "ray::train-context_encoder"),
]


def test_memory_of_other_programs_is_attributed_to_them() -> None:
    message = ray_message(21.32, [task(13610, 0.33), actor(13533, 0.06, "ProgressActor.__init__")], PROCESSES)
    text, retryable = explain_out_of_memory(message, ADVICE)
    assert text.startswith(
        "the machine ran out of memory; this training held 0.3 GB of 23.5, others most of the rest (python df2.py 7.3 GB)"
    )
    assert retryable
    assert "at_once" not in text
    assert "hunter2" not in text
    assert "\n" not in text


def test_workers_that_hold_most_of_the_memory_get_the_advice() -> None:
    rows = [(pid, 3.1, "ray::RayTrainWorker.execute") for pid in (1, 2, 3, 4)]
    message = ray_message(21.32, [actor(1, 3.1)], [*rows, (9, 4.0, "firefox")])
    assert explain_out_of_memory(message, ADVICE) == (ADVICE, False)


def test_workers_of_another_job_count_as_others() -> None:
    killed = [actor(1, 0.5), task(2, 15.0, "their_task", job="02000000")]
    message = ray_message(21.32, killed, [(2, 15.0, "ray::their_task"), (1, 0.5, "ray::RayTrainWorker")])
    text, _ = explain_out_of_memory(message, ADVICE, job_id="01000000")
    assert "held 0.5 GB of 23.5, others most of the rest (ray::their_task 15.0 GB)" in text


def test_memory_outside_the_listed_programs_gets_a_hint() -> None:
    text, retryable = explain_out_of_memory(
        ray_message(21.32, [task(1, 0.4)], [(7, 0.5, "gnome-shell")]), ADVICE
    )
    assert retryable
    assert "no other program most of the rest (the largest: gnome-shell 0.5 GB)" in text
    assert "/dev/shm" in text


@pytest.mark.parametrize(("gigabytes", "other", "ours"), [("12.18", "4.05", True), ("0.24", "20.31", False)])
def test_messages_of_older_releases(gigabytes: str, other: str, ours: bool) -> None:
    text, _ = explain_out_of_memory(OLD_MESSAGE.format(gigabytes=gigabytes, other=other), ADVICE)
    assert (text == ADVICE) == ours
    assert ours or "held 0.2 GB of 33.3, others most of the rest (firefox 20.3 GB)" in text.replace(
        "0.3 GB of", "0.2 GB of"
    )
    assert "secret" not in text


@pytest.mark.parametrize(
    "message",
    [
        "",
        "3 worker(s) were killed due to the node running low on memory",
        "Memory on the node was 2.58GB used / 23.54GB limit (0.1)",
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        ray_message(21.32, [], PROCESSES),
    ],
)
def test_unknown_messages_get_the_advice(message: str) -> None:
    assert explain_out_of_memory(message, ADVICE) == (ADVICE, False)


def test_gpu_memory_of_another_process() -> None:
    message = (
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 10.75 MiB is "
        "free. Process 4242 has 70.00 GiB memory in use. Including non-PyTorch memory, this process has {} memory in use. "
        "Of the allocated memory 8.60 GiB is allocated by PyTorch, and 30.00 MiB is reserved by PyTorch"
    )
    text, retryable = explain_out_of_memory(message.format("512.00 MiB"), ADVICE)
    assert retryable
    assert "the GPU ran out of memory; this training held 0.5 GB of 79.2" in text
    assert "(process 4242 70.0 GB)" in text
    assert explain_out_of_memory(message.format("78.00 GiB"), ADVICE) == (ADVICE, False)


def test_an_error_of_this_process_measures_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full memory is simulated; the processes are real."""
    message = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
    assert explain_out_of_memory(message, ADVICE, inspect_machine=True) == (
        ADVICE,
        False,
    )  # much is free: this process ran into its own limit
    total = 24 * 2**30
    full = SimpleNamespace(total=total, available=total // 20, percent=95.0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: full)
    text, retryable = explain_out_of_memory(message, ADVICE, inspect_machine=True)
    assert retryable
    assert re.match(
        r"the machine ran out of memory; this training held [0-9.]+ GB of 24\.0, .* most of the rest", text
    )
    full.available = total - psutil.Process().memory_info().rss
    assert explain_out_of_memory(message, ADVICE, inspect_machine=True) == (ADVICE, False)


def test_a_steps_error_explains_the_memory_and_hides_arguments() -> None:
    error = to_attempt_error(OutOfMemoryError(ray_message(21.32, [task(13610, 0.33)], PROCESSES)))
    assert "this step held 0.3 GB of 23.5" in error.message
    assert error.retryable
    assert "12295\t7.34\tpython df2.py\n" in error.traceback
    assert "hunter2" not in error.traceback
    assert "somebody" not in error.traceback


def test_texts_without_a_process_table_are_unchanged() -> None:
    text = "1\t0.5\tpython x.py --password=1"
    assert strip_arguments(text) == text


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("/usr/bin/python3 -u -W ignore /srv/df2.py --password=secret", "python3 df2.py"),
        ("python -c import secret", "python"),
        ("python -m secretless --token secret", "python secretless"),
        ("java -Dpassword=secret -cp secret.jar Main", "java"),
        ("java -jar /opt/x/app.jar secret", "java app.jar"),
        ("node --inspect server.js --key secret", "node server.js"),
        ("bash -c curl https://user:secret@host/x.sh", "bash"),
        ("postgres: secret database 10.0.0.1(5432)", "postgres"),
        ("/opt/google/chrome/chrome --type=renderer secret", "chrome"),
        ("/venv/bin/python -u /venv/lib/python3.11/site-packages/secret...", "python"),
        ("ray::train(secret=3)", "ray::train"),
        ("KEY=secret program", "KEY"),
        ("", "a program"),
    ],
)
def test_program_name_has_no_folders_and_arguments(command: str, name: str) -> None:
    assert program_name(command) == name
