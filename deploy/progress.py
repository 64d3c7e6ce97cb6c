"""Live progress of a starting cluster: a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Self

import httpx
from rich.console import Console
from rich.live import Live
from rich.table import Table

from deploy.local import Cluster, registered
from deploy.logs import last_lines

QUIET_S = 10.0
"""Longest silence where there is no terminal."""


class Progress:
    """Shows for each process whether it is up and the last thing it logged."""

    def __init__(self, cluster: Cluster, console: Console | None = None) -> None:
        self._cluster = cluster
        self._console = console or Console(file=sys.stdout)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._client = httpx.Client(timeout=1, trust_env=False)
        self._begun = self._spoke = time.monotonic()
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        if self._console.is_terminal:
            self._live.stop()
        self._console.print(f"started in {time.monotonic() - self._begun:.0f} s")

    def update(self) -> None:
        """Show the state of now."""
        up = registered(self._client, self._cluster.url) or set()
        if self._console.is_terminal:
            self._live.update(self._table(up))
        else:
            self._speak(up)

    def _table(self, up: set[str]) -> Table:
        table = Table(
            box=None, title=f"starting, {time.monotonic() - self._begun:.0f} s", title_justify="left"
        )
        for column in ("process", "state", "last log line"):
            table.add_column(column, no_wrap=True)
        for name, child in self._cluster.children.items():
            state = "[green]up[/]" if name in up else "[yellow]loading[/]"
            table.add_row(name, state, last_event(Path(child.log)))
        return table

    def _speak(self, up: set[str]) -> None:
        now = time.monotonic()
        for name in sorted(up - self._said):
            self._console.print(f"{now - self._begun:4.0f} s  {name} is up")
            self._spoke = now
        self._said |= up
        if now - self._spoke > QUIET_S:
            waiting = [name for name in self._cluster.children if name not in up]
            self._console.print(
                f"{now - self._begun:4.0f} s  waiting for {', '.join(waiting) or 'the router'}"
            )
            self._spoke = now


def last_event(log: Path) -> str:
    """The last line of a log as a person wants it: the event of a JSON line, else the line itself."""
    lines = [line for line in last_lines(log, 5) if line.strip()]
    if not lines:
        return ""
    try:
        text = str(json.loads(lines[-1])["event"])
    except (ValueError, KeyError, TypeError):
        text = lines[-1].rpartition("] ")[2]
    return text[:70].replace("[", "(")
