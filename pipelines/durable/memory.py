"""Finds out which processes held the memory when a machine or a GPU ran out of it, from Ray's and CUDA's messages.

Ray kills workers when a machine's memory is nearly used up, whichever process uses it. Its message has the total, the
killed workers and the ten largest processes. Ours are the killed workers and the processes that run the same functions.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath

NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
NODE_MEMORY = re.compile(rf"\bwas {NUMBER}GB(?: used)? / {NUMBER}GB\b")
# Ray 2.60: (Task: job ID=..., task name=..., pid=..., actual memory used=...GB; before: name=..., pid=..., memory used=
KILLED_WORKER = re.compile(
    rf"\((?:[^()]|\([^()]*\))*?name=(?P<name>[^,()]*)[^()]*?, pid=(?P<pid>\d+), (?:actual )?memory used=(?P<gb>{NUMBER})GB"
)
JOB_ID = re.compile(r"\bjob ID=(\w+)")
PROCESS_ROW = re.compile(rf"^([ \t]*(\d+)\t{NUMBER}\t)(.+)$", re.MULTILINE)
GPU_CAPACITY = re.compile(rf"GPU \d+ has a total capacity of {NUMBER} (GiB|MiB)")
GPU_THIS_PROCESS = re.compile(rf"this process has {NUMBER} (GiB|MiB) memory in use")
GPU_OTHER_PROCESS = re.compile(rf"\bProcess (\d+) has {NUMBER} (GiB|MiB) memory in use")
INTERPRETERS = re.compile(r"(python|pypy|node|deno|bun|ruby|perl|php|java|julia|Rscript|bash|sh|zsh)[0-9.]*")
SCRIPT_FILE = re.compile(r"[\w.+-]+\.(py|pyz|js|mjs|ts|rb|pl|php|jar|jl|R|sh|ipynb)")
OPTIONS_WITH_VALUE = {"-W", "-X", "-cp", "-classpath", "--class-path"}  # the value is the next word
INLINE_CODE_OPTIONS = {"-c", "-e", "-r", "-E", "-p", "--eval", "--print"}  # code follows, not a file
FULL_PERCENT = 90.0  # of the machine's memory, above which it counts as full
TRAIN_WORKER = "RayTrainWorker"  # Ray Train's class
PROGRESS_ACTOR = "ProgressActor"  # task.ProgressActor, which uses little memory


@dataclass(frozen=True)
class MemoryUse:
    """Memory of a machine or a GPU in gigabytes, as Ray or CUDA counts them."""

    device: str  # "the machine" or "the GPU"
    ours_gb: float
    used_gb: float
    limit_gb: float
    others: tuple[tuple[str, float], ...]  # (program, gigabytes), largest first

    @property
    def mostly_others(self) -> bool:
        """Whether our processes together held less than all other memory in use."""
        return self.ours_gb < self.used_gb / 2


def explain_out_of_memory(
    message: str, advice: str, job_id: str = "", who: str = "this training", inspect_machine: bool = False
) -> tuple[str, bool]:
    """Explain in one line why memory ran out; returns it, and whether a retry may succeed without a change.

    `message`: Ray's or CUDA's. `advice`: returned if our processes held most of the memory, or if the message has
    another form. `job_id`: Ray's id of our job; killed workers of other jobs then count as others. `inspect_machine`:
    measure this machine's memory if the message has no numbers; for an error raised in this process.
    """
    use = (
        _parse_gpu(message)
        or _parse_node(message, job_id)
        or (_measure_machine() if inspect_machine else None)
    )
    if use is None or not use.mostly_others:
        return advice, False
    largest = "".join(f"{name} {gigabytes:.1f} GB" for name, gigabytes in use.others[:1])
    if sum(gigabytes for _, gigabytes in use.others) >= (use.used_gb - use.ours_gb) / 2:
        others, hint = f"others most of the rest ({largest})", "end them, or run again when they have ended"
    else:
        others = f"no other program most of the rest{f' (the largest: {largest})' if largest else ''}"
        hint = "files in /dev/shm, or many small programs, may hold it"
    return (
        f"{use.device} ran out of memory; {who} held {use.ours_gb:.1f} GB of {use.limit_gb:.1f}, {others}: {hint}",
        True,
    )


def strip_arguments(text: str) -> str:
    """Replace the command lines in Ray's table of processes by program names: arguments may hold secrets."""
    if "memory users" not in text:
        return text
    return PROCESS_ROW.sub(lambda row: row[1] + program_name(row[4]), text)


def program_name(command: str) -> str:
    """Program and script of a command line, without folders and arguments."""
    command = command.strip()
    if command.startswith("ray::"):
        return "ray::" + re.split(r"[^\w.]", command[5:], maxsplit=1)[0]
    words = command.split()
    truncated = words[-1].endswith("...") if words else False  # by Ray
    name = _file_name(words[0]) if words else ""
    if (len(words) == 1 and truncated) or not name:
        return name.rstrip(".") or "a program"
    if INTERPRETERS.fullmatch(name):
        arguments = words[1:-1] if truncated else words[1:]
        script = _script_name(arguments, is_python=name.startswith(("python", "pypy")))
        return f"{name} {script}".rstrip()
    return name


def _script_name(arguments: list[str], is_python: bool) -> str:
    words = iter(arguments)
    for word in words:
        if word in INLINE_CODE_OPTIONS:
            return ""
        if word in OPTIONS_WITH_VALUE:
            next(words, None)
        elif word == "-m" and is_python:
            return _file_name(next(words, ""))
        elif not word.startswith("-"):
            name = _file_name(word)
            return name if is_python or SCRIPT_FILE.fullmatch(name) else ""
    return ""


def _file_name(word: str) -> str:
    """The part of a path's last component that looks like a file name."""
    return (re.match(r"[\w.+-]{0,40}", PurePath(word).name) or [""])[0]


def _parse_node(message: str, job_id: str) -> MemoryUse | None:
    node = NODE_MEMORY.search(message)
    killed = [match for match in KILLED_WORKER.finditer(message) if match["name"] is not None]
    if job_id and any(jobs := [JOB_ID.search(match[0]) for match in killed]):
        killed = [match for match, job in zip(killed, jobs) if job is None or job[1] == job_id]
    if node is None or not killed:
        return None
    workers = [match for match in killed if _task_function(match["name"]) != PROGRESS_ACTOR] or killed
    ours = {int(match["pid"]): float(match["gb"]) for match in workers}
    functions = {_task_function(match["name"]) for match in workers}
    others: list[tuple[str, float]] = []
    for _, pid, gigabytes, command in PROCESS_ROW.findall(message):
        if int(pid) in ours:
            ours[int(pid)] = max(ours[int(pid)], float(gigabytes))
        elif command.startswith("ray::") and _task_function(command[5:]) in functions:
            ours[int(pid)] = float(gigabytes)
        else:
            others.append((program_name(command), float(gigabytes)))
    others.sort(key=lambda other: -other[1])
    return MemoryUse("the machine", sum(ours.values()), float(node[1]), float(node[2]), tuple(others))


def _task_function(name: str) -> str:
    """The function or class in a Ray task's name, name:Class.method."""
    return name.rpartition(":")[2].partition(".")[0].strip()


def _measure_machine() -> MemoryUse | None:
    """The machine's memory now. None if much of it is free: then this process ran into a limit of its own."""
    import psutil  # CUDA's messages are explained without it

    memory = psutil.virtual_memory()
    if memory.percent < FULL_PERCENT:
        return None
    ours, others = 0.0, []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            gigabytes, title = process.memory_info().rss / 2**30, process.cmdline() or [process.name()]
            if process.pid == os.getpid() or _task_function(title[0].removeprefix("ray::")) == TRAIN_WORKER:
                ours += gigabytes
            else:
                others.append((program_name(" ".join(title)), gigabytes))
    others.sort(key=lambda other: -other[1])
    used = (memory.total - memory.available) / 2**30
    return MemoryUse("the machine", ours, used, memory.total / 2**30, tuple(others[:10]))


def _parse_gpu(message: str) -> MemoryUse | None:
    capacity, this_process = GPU_CAPACITY.search(message), GPU_THIS_PROCESS.search(message)
    if capacity is None or this_process is None:
        return None
    others = [
        (f"process {pid}", _gigabytes(size, unit)) for pid, size, unit in GPU_OTHER_PROCESS.findall(message)
    ]
    others.sort(key=lambda other: -other[1])
    ours = _gigabytes(*this_process.groups())
    used = ours + sum(size for _, size in others)
    return MemoryUse("the GPU", ours, used, _gigabytes(*capacity.groups()), tuple(others))


def _gigabytes(size: str, unit: str) -> float:
    return float(size) / (1 if unit == "GiB" else 1024)
