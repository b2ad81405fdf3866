"""Progress of a run as a person wants it: bars in a terminal, a line now and then in a log, always with an ETA."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

EVERY = 5.0  # seconds between two lines of one step in a log at least; more of them as it takes longer
MARKS = {"finished": "✓", "cached": "✓", "failed": "✗", "retry": "↻", "stopped": "■"}


def eta(done: float, total: float, seconds: float) -> str:
    """What is left at the mean rate so far, as m:ss; empty until there is a rate."""
    if not done or not total or done >= total:
        return ""
    left = round(seconds * (total - done) / done)
    return (
        f"{left // 60}:{left % 60:02d}"
        if left < 3600
        else f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    )


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        left = eta(task.fields["worked"], task.fields["todo"], task.fields["since"]())
        return Text(f"ETA {left}" if left else "", style="cyan")


class Show:
    """A context in which `show(name, state, done, total, note)` draws. Steps appear in the order they start.

    States: running, cached (found finished), finished, retry, failed, stopped. `step/part` is a part of a step, such as
    a trial of a sweep: it is shown while it runs, and counts for its step as far as it has come. The ETA counts from
    the first report of this run, so that a resumed training is not credited with what an earlier run did.
    """

    def __init__(self, stream: Console | None = None) -> None:
        self.console = stream or Console(stderr=False, highlight=False)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._first: dict[str, tuple[float, float]] = {}
        self._said: dict[str, tuple[float, str]] = {}
        self._started: dict[str, float] = {}
        self._parts: dict[str, dict[str, float]] = {}
        self._whole: dict[str, tuple[float, float, str]] = {}

    def __enter__(self) -> Show:
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.fields[mark]} {task.description:<24}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]:>11}"),
                TimeElapsedColumn(),
                _Left(),
                TextColumn("[dim]{task.fields[note]}"),
                console=self.console,
                refresh_per_second=4,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()
        sys.stdout.flush()

    def __call__(self, name: str, state: str, done: float = 0, total: float = 0, note: str = "") -> None:
        step, _, part = name.partition("/")
        parts = self._parts.setdefault(step, {})
        if part:
            parts[part] = done / total if state == "running" and total else 0.0
        elif total:
            self._whole[name] = done, total, note
            done = min(done + sum(parts.values()), total)
        now = time.monotonic()
        started = self._started.setdefault(name, now)
        if state == "running" and total and name not in self._first:
            self._first[name] = (now, done)
        since, base = self._first.get(name, (started, 0.0))
        if self._bars:
            self._draw(name, state, done, total, note, since, base)
        else:
            self._say(name, state, done, total, note, now, since, base)
        if part and step in self._whole:
            self(step, "running", *self._whole[step])

    def _draw(
        self, name: str, state: str, done: float, total: float, note: str, since: float, base: float
    ) -> None:
        assert self._bars is not None
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(
                f"  {name.partition('/')[2]}" if "/" in name else name,
                total=None,
                mark=" ",
                count="",
                note="",
                worked=0,
                todo=0,
                since=lambda: 0.0,
            )
        over = state in ("finished", "cached")
        if "/" in name and state not in ("running", "retry"):
            self._bars.remove_task(self._tasks.pop(name))
            took = time.monotonic() - self._started.pop(name)
            self.console.print(
                f"{MARKS[state]} {name.partition('/')[2]}: {note} ({took:.0f} s)", markup=False
            )
            return
        self._bars.update(
            self._tasks[name],
            total=1 if over else (total or None),
            completed=1 if over else done,
            mark=MARKS.get(state, " "),
            count="" if over or not total else f"{int(done)}/{int(total)}",
            note="found finished" if state == "cached" else note,
            worked=0 if over else done - base,
            todo=total - base,
            since=lambda: time.monotonic() - since,
        )
        if over:
            self._bars.stop_task(self._tasks[name])

    def _say(
        self,
        name: str,
        state: str,
        done: float,
        total: float,
        note: str,
        now: float,
        since: float,
        base: float,
    ) -> None:
        last, last_state = self._said.get(name, (-EVERY, ""))
        if state == last_state and now - last < max(EVERY, (now - self._started[name]) / 20):
            return
        self._said[name] = (now, state)
        if state == "running" and total:
            left = eta(done - base, total - base, now - since)
            share = f"{int(done)}/{int(total)} ({100 * done / total:.0f} %)"
            text = ", ".join(filter(None, [share, f"ETA {left}" if left else "", note]))
        elif state == "finished":
            text = f"finished in {now - self._started[name]:.1f} s" + (f", {note}" if note else "")
        elif state == "cached":
            text = "found finished"
        else:
            text = f"{state}: {note}" if note else state
        self.console.print(
            f"{MARKS.get(state, ' ')} {name.replace('/', ': '):<24} {text}", markup=False, soft_wrap=True
        )
