"""Progress of long work: a bar in a terminal, and plain lines elsewhere, so that log files show it too."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from bdpo_pl.console import get_console
from bdpo_pl.reporting.format import general, seconds, size, whole

EVERY_SECONDS = 10.0
"""Minimum seconds between two lines."""
_TRIAL = 2
"""Number of batches after which the expected time is shown."""


class Reporter(Protocol):
    """The interface through which work reports its progress."""

    def add_task(self, description: str, *, total: float, completed: float = 0) -> Any:
        """Begin a task of `total` units, of which `completed` are already done."""

    def advance(self, task: TaskID, advance: float = 1) -> None:
        """Count `advance` units more."""

    def update(self, task: TaskID, *, description: str) -> None:
        """Change the description of the task."""


def shows_bars() -> bool:
    """Return true if the output goes to a terminal."""
    return get_console().is_terminal


@contextmanager
def progress(unit: str, *, enabled: bool = True) -> Iterator[Reporter]:
    """Yield a reporter of work counted in `unit`, such as `pairs`; silent unless `enabled` (on the first rank)."""
    if not enabled:
        yield _Silent()
    elif shows_bars():
        columns = (TextColumn("{task.description}"), BarColumn(20), _Counted(unit), _Left())
        with Progress(*columns, console=get_console()) as bar:
            yield bar  # type: ignore[misc]
    else:
        yield Lines(unit)


class Lines:
    """A reporter that prints a line at intervals.

    Args:
        unit: name of the counted things.
        write: function that prints a line.
        clock: function that returns the time in seconds.
    """

    def __init__(
        self, unit: str, write: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.unit = unit
        self.write = write or say
        self.clock = clock
        self._name = ""
        self._total = self._done = self._before = 0.0
        self._batches = 0
        self._start = self._last = 0.0

    def add_task(self, description: str, *, total: float, completed: float = 0) -> int:
        """Begin a task, as in `Reporter`."""
        self._name, self._total, self._done, self._before = description, total, completed, completed
        self._batches, self._start = 0, self.clock()
        self._last = self._start
        return 0

    def advance(self, task: TaskID, advance: float = 1) -> None:
        """Count units; print a line at intervals, after the second batch, and at the end."""
        self._done += advance
        if advance <= 0:
            return
        self._batches += 1
        now = self.clock()
        ended = self._done >= self._total - 1e-3
        if self._batches == _TRIAL and not ended:
            expected = (now - self._start) * (self._total - self._before) / (self._done - self._before)
            self.write(f"{self._named()}about {seconds(expected)} in all, from the first {_TRIAL} batches")
        elif not ended and now - self._last < EVERY_SECONDS:
            return
        self._last = now
        self.write(self._line(now))

    def update(self, task: TaskID, *, description: str) -> None:
        """Change the description of the task."""
        self._name = description

    def _named(self) -> str:
        return f"{self._name}: " if self._name else ""

    def _line(self, now: float) -> str:
        done, taken = self._done - self._before, max(now - self._start, 1e-9)
        rate = done / taken
        left = (self._total - self._done) / rate if rate else 0.0
        parts = [f"{self._named()}{whole(round(self._done))} of {whole(round(self._total))} {self.unit}"]
        parts.append(f"{general(rate, 3)} {self.unit}/s")
        if memory := memory_used():
            parts.append(size(memory))
        parts.append(f"{seconds(left)} left" if left > 0.5 else f"in {seconds(taken)}")
        return ", ".join(parts)


class _Silent:
    def add_task(self, description: str, *, total: float, completed: float = 0) -> int:
        return 0

    def advance(self, task: TaskID, advance: float = 1) -> None:
        pass

    def update(self, task: TaskID, *, description: str) -> None:
        pass


class _Counted(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(
            f"{whole(round(task.completed))}/{whole(round(task.total or 0))} {self.unit}", style="progress.download"
        )


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text("" if left is None else f"{seconds(left)} left", style="progress.remaining")


def say(line: str) -> None:
    """Print a plain line immediately, for logs that are watched."""
    print(line, flush=True)


def memory_used() -> int:
    """Return this process's peak memory in bytes: of the GPU if it uses one, else of main memory; 0 if unknown."""
    torch = sys.modules.get("torch")
    # A run on the CPU may have initialised the GPU without using it.
    if torch is not None and torch.cuda.is_initialized() and (peak := int(torch.cuda.max_memory_allocated())):
        return peak
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in kibibytes, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
