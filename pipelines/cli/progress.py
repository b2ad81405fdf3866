"""Progress display: bars in a terminal, occasional lines in a log, both with an ETA."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from pipelines import notices
from pipelines.durations import format_eta

if TYPE_CHECKING:
    from pipelines.contracts import ProgressCallback

MIN_LINE_INTERVAL_S = 5.0  # minimum between two log lines of a step; grows to 1/20 of its time so far
MASK_DISPLAY_DELAY_S = 2.0  # reading of masks is displayed only if it takes longer
STATE_MARKS = {"finished": "✓", "cached": "✓", "failed": "✗", "retry": "↻", "stopped": "■"}


class _EtaColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        eta = format_eta(task.fields["done"], task.fields["remaining"], task.fields["elapsed"]())
        return Text(f"ETA {eta}" if eta else "", style="cyan")


class ProgressDisplay:
    """Context manager; call it as `display(name, state, done, total, note)`. Steps appear in the order of their start.

    States: running, cached, finished, retry, failed, stopped; "note" prints a separate line. A name `step/part` is a
    part of a step, such as a trial of a sweep: it is displayed while it runs, and its fraction counts for the step.
    The ETA is based on this run's reports only: it ignores what an earlier run did of a resumed training.
    """

    def __init__(self, stream: Console | None = None) -> None:
        self.console = stream or Console(stderr=False, highlight=False)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._first_report: dict[str, tuple[float, float]] = {}
        self._last_line: dict[str, tuple[float, str]] = {}
        self._started_at: dict[str, float] = {}
        self._part_fractions: dict[str, dict[str, float]] = {}
        self._step_progress: dict[str, tuple[float, float, str]] = {}

    def __enter__(self) -> ProgressDisplay:
        notices.discard_pending()
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.fields[mark]} {task.description:<24}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]:>11}"),
                TimeElapsedColumn(),
                _EtaColumn(),
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
        if state == "note":
            self.console.print(f"  {name.replace('/', ': ')}: {note}", markup=False, soft_wrap=True)
            return
        step, _, part = name.partition("/")
        parts = self._part_fractions.setdefault(step, {})
        if part:
            parts[part] = done / total if state == "running" and total else 0.0
        elif total:
            self._step_progress[name] = done, total, note
            done = min(done + sum(parts.values()), total)
        now = time.monotonic()
        started = self._started_at.setdefault(name, now)
        if state == "running" and total and name not in self._first_report:
            self._first_report[name] = (now, done)
        base_time, base_done = self._first_report.get(name, (started, 0.0))
        if self._bars:
            self._update_bar(name, state, done, total, note, base_time, base_done)
        else:
            self._print_line(name, state, done, total, note, now, base_time, base_done)
        if part and step in self._step_progress:
            self(step, "running", *self._step_progress[step])

    def _update_bar(
        self, name: str, state: str, done: float, total: float, note: str, base_time: float, base_done: float
    ) -> None:
        assert self._bars is not None
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(
                f"  {name.partition('/')[2]}" if "/" in name else name,
                total=None,
                mark=" ",
                count="",
                note="",
                done=0,
                remaining=0,
                elapsed=lambda: 0.0,
            )
        is_done = state in ("finished", "cached")
        if "/" in name and state not in ("running", "retry"):
            self._bars.remove_task(self._tasks.pop(name))
            elapsed_s = time.monotonic() - self._started_at.pop(name)
            self.console.print(
                f"{STATE_MARKS[state]} {name.partition('/')[2]}: {note} ({elapsed_s:.0f} s)", markup=False
            )
            return
        self._bars.update(
            self._tasks[name],
            total=1 if is_done else (total or None),
            completed=1 if is_done else done,
            mark=STATE_MARKS.get(state, " "),
            count="" if is_done or not total else f"{int(done)}/{int(total)}",
            note="cached" if state == "cached" else note,
            done=0 if is_done else done - base_done,
            remaining=total - base_done,
            elapsed=lambda: time.monotonic() - base_time,
        )
        if is_done:
            self._bars.stop_task(self._tasks[name])

    def _print_line(
        self,
        name: str,
        state: str,
        done: float,
        total: float,
        note: str,
        now: float,
        base_time: float,
        base_done: float,
    ) -> None:
        last_time, last_state = self._last_line.get(name, (-MIN_LINE_INTERVAL_S, ""))
        interval_s = max(MIN_LINE_INTERVAL_S, (now - self._started_at[name]) / 20)
        if state == last_state and now - last_time < interval_s:
            return
        self._last_line[name] = (now, state)
        if state == "running" and total:
            eta = format_eta(done - base_done, total - base_done, now - base_time)
            counts = f"{int(done)}/{int(total)} ({100 * done / total:.0f} %)"
            text = ", ".join(filter(None, [counts, f"ETA {eta}" if eta else "", note]))
        elif state == "finished":
            text = f"finished in {now - self._started_at[name]:.1f} s" + (f", {note}" if note else "")
        elif state == "cached":
            text = "cached"
        else:
            text = f"{state}: {note}" if note else state
        self.console.print(
            f"{STATE_MARKS.get(state, ' ')} {name.replace('/', ': '):<24} {text}",
            markup=False,
            soft_wrap=True,
        )


def progress_callback(display: ProgressDisplay, name: str) -> Callable[..., None]:
    """A callback (done, total, note) that displays the progress of `name`."""
    return lambda done, total, note="": display(name, "running", done, total, note)


@contextmanager
def mask_reading_display(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Displays the reading of mask folders that takes long; yields the callback (uri, done, total). `quiet`: on stderr."""
    with ExitStack() as stack:
        display: ProgressDisplay | None = None
        started_at: float | None = None

        def on_masks(uri: str, done: int, total: int) -> None:
            nonlocal display, started_at
            started_at = time.monotonic() if started_at is None else started_at
            if display is None and time.monotonic() - started_at > MASK_DISPLAY_DELAY_S:
                console = Console(stderr=True, highlight=False) if quiet else None
                display = stack.enter_context(ProgressDisplay(console))
            if display is not None:
                display("masks", "finished" if done == total else "running", done, total, f"read in {uri}")
            if done == total:
                stack.close()  # rich allows one live display at a time, and the evaluation's may follow
                display = started_at = None

        yield on_masks


@contextmanager
def scoring_display(quiet: bool = False) -> Iterator[ProgressCallback]:
    """Displays the progress of an evaluation; yields its callback. `quiet`: displays nothing."""
    with ExitStack() as stack:
        display: ProgressDisplay | None = None
        scored = 0.0

        def on_progress(done: float, total: float, note: str = "") -> None:
            nonlocal display, scored
            if quiet:
                return
            if display is None:
                display = stack.enter_context(ProgressDisplay())
            scored = done
            display("evaluate", "running", done, total, note)

        yield on_progress
        if display is not None:
            display("evaluate", "finished", note=f"{scored:.0f} photographs")
