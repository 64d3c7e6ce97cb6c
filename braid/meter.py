"""Progress of a known number of requests, on standard error."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

EVERY_S = 10.0
"""Where there is no terminal, a line so often."""


class Meter:
    """A bar on a terminal, a line now and then elsewhere. A context manager.

    Args:
        console: where to.
        title: what is counted.
        total: how many there are; ``done`` of them before this run.
    """

    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._before = done
        self._ended = self._failed = self._tokens = 0
        self._start = self._told = time.monotonic()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[pace]}"), console=console, transient=True)
        self._task = self._bar.add_task(title, total=total, completed=done, pace="")

    @property
    def done(self) -> int:
        """Of all, also those before this run."""
        return self._before + self._ended

    def advance(self, tokens: int, failed: bool) -> None:
        """One more has ended."""
        self._ended += 1
        self._failed += failed
        self._tokens += tokens
        self._bar.update(self._task, advance=1, pace=self.pace())
        now = time.monotonic()
        if not self._console.is_terminal and now - self._told >= EVERY_S:
            self._told = now
            self._console.print(f"{self._title}: {self.done} of {self._total}, {self.pace()}", markup=False)

    def pace(self) -> str:
        """Rate and time to the end, from this run alone."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = self._ended / elapsed
        left = (self._total - self.done) / rate if rate else 0.0
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{rate:.1f}/s, {self._tokens / elapsed:.0f} tokens/s, {span(left)} left{failed}"

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()


def span(seconds: float) -> str:
    """``42 s``, ``3 min`` or ``1 h 20 min``."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
