"""``braid up``: a cluster in the foreground, with live progress, supervised until Ctrl-C."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from deploy.local import POLL_S, Cluster, ClusterError, UpSettings
from deploy.progress import Progress


def main(settings: UpSettings, engine_args: Sequence[str]) -> int:
    """Run a cluster in the foreground until Ctrl-C or SIGTERM; returns the exit code."""
    cluster = Cluster(settings, engine_args)
    stopping = StopFlag()
    stopping.install()
    grace_s = 0.0  # an engine that still loads has nothing to drain
    try:
        cluster.start()
        show_start(cluster, stopping)
        grace_s = settings.drain_s
        print(banner(cluster), flush=True)
        watch(cluster, stopping)
    except ClusterError as error:
        print(f"braid up: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("Stopping (Ctrl-C again to kill) ...", flush=True)
        return 0
    finally:
        stopping.uninstall()
        stop_or_kill(cluster, grace_s)


def show_start(cluster: Cluster, stopping: StopFlag) -> None:
    """Wait until the cluster is ready, with live progress."""
    with Progress(cluster) as progress:

        def on_poll(_: Cluster) -> None:
            stopping.raise_if_set()
            progress.update()

        cluster.wait_ready(on_poll=on_poll)
        progress.update()


def watch(cluster: Cluster, stopping: StopFlag) -> NoReturn:
    """Supervise: a worker that ends is started again, with backoff; the router's end is the end.

    Raises:
        KeyboardInterrupt: the user wants to stop.
        ClusterError: the router has ended.
    """
    supervisor = Supervisor(cluster)
    while True:
        stopping.raise_if_set()
        supervisor.step(time.monotonic())
        time.sleep(POLL_S)


class Supervisor:
    """Starts workers again that have ended: after 1 s, then after twice as long each time, up to a
    minute; a worker that has lived for a minute starts afresh."""

    FIRST_S, MOST_S = 1.0, 60.0

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._due: dict[str, float] = {}
        self._delay: dict[str, float] = {}
        self._started: dict[str, float] = {}

    def step(self, now: float) -> None:
        """Look once.

        Raises:
            ClusterError: the router has ended.
        """
        for name, code in self._cluster.ended().items():
            if name == "router":
                raise ClusterError(self._cluster.describe_end(name, code))
            if name not in self._due:
                self._plan(name, code, now)
            elif now >= self._due[name]:
                del self._due[name]
                self._started[name] = now
                self._cluster.respawn(name)

    def _plan(self, name: str, code: int, now: float) -> None:
        lived = now - self._started.get(name, float("-inf"))
        delay = self.FIRST_S if lived > self.MOST_S else min(2 * self._delay[name], self.MOST_S)
        self._delay[name] = delay
        self._due[name] = now + delay
        print(self._cluster.describe_end(name, code), file=sys.stderr)
        print(f"It starts again in {delay:.0f} s; the others go on serving.", file=sys.stderr, flush=True)


class StopFlag:
    """Turns the first SIGINT or SIGTERM into a ``KeyboardInterrupt`` at a place of our choosing."""

    def __init__(self) -> None:
        self._set = False
        self._previous: dict[
            int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None
        ] = {}

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)

    def uninstall(self) -> None:
        """From here on a signal interrupts at once, as Python does by itself."""
        for number in self._previous:
            signal.signal(number, signal.default_int_handler)

    def raise_if_set(self) -> None:
        if self._set:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._set = True


def stop_or_kill(cluster: Cluster, grace_s: float) -> None:
    """Stop; a Ctrl-C meanwhile kills."""
    try:
        cluster.stop(grace_s)
    except KeyboardInterrupt:
        cluster.stop(grace_s=0)


def banner(cluster: Cluster) -> str:
    """What a user can do now."""
    question = "Ines has 4 boxes with 22 eggs each. Ines loses 55 eggs. How many eggs are there now?"
    body = json.dumps({"model": cluster.model, "messages": [{"role": "user", "content": question}]})
    models = ", ".join(model.name for model in cluster.models)
    url = "" if cluster.port == 8000 else f" --url {cluster.url}"
    return f"""
Ready at {cluster.url} (model {models}; logs in {cluster.run_dir}; Ctrl-C stops). Try:

  curl {cluster.url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d {shlex.quote(body)}

  {Path(sys.executable).with_name("braid")} ask{url} "{question}" --strategy self_consistency -n 16
"""
