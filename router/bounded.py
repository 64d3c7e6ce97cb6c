"""Work that must not run away: caller's regular expressions and computer algebra, in a process of its own.

A thread cannot be stopped, and one big-integer power holds the GIL for minutes. A child process can be
killed, so that is where such work runs: one job at a time, a limit of processor time each, a cap on its
memory.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

_CHILD = Path(__file__).with_name("bounded_main.py")


class LimitExceeded(Exception):
    """The job ran into its time or memory limit; its process is gone."""


class BoundedProcess:
    """One child process, started with the first job and again after a job that had to be killed.

    Jobs queue for it. It ends when this process does, however that ends: its standard input closes.
    Methods may be called from any event loop; ``close`` is idempotent.
    """

    def __init__(self, limit_s: float, start_s: float = 20.0) -> None:
        self._limit_s = limit_s
        self._start_s = start_s
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bounded")

    async def call(self, job: Mapping[str, Any]) -> Any:
        """The job's result; ``limit_s`` bounds the processor time, so a busy machine changes no outcome.

        Raises:
            LimitExceeded: the limit was reached, or the child could not be started.
        """
        return await asyncio.wrap_future(self._thread.submit(self._call, json.dumps(job).encode() + b"\n"))

    def close(self) -> None:
        """Stop the child; a later call starts another."""
        self._thread.submit(self._kill).result()

    def _call(self, line: bytes) -> Any:
        child = self._running()
        try:
            assert child.stdin is not None
            while line:
                line = line[child.stdin.write(line) :]
            # The child's own limit comes first; this one is for a child that gets no processor time.
            return json.loads(self._reply(child, self._limit_s + self._start_s))
        except (OSError, EOFError, ValueError):
            self._kill()
            raise LimitExceeded from None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._kill()
            self._child = subprocess.Popen(
                [sys.executable, "-I", str(_CHILD), str(self._limit_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
            )
        return self._child

    @staticmethod
    def _reply(child: subprocess.Popen[bytes], limit_s: float) -> bytes:
        assert child.stdout is not None
        deadline, reply = time.monotonic() + limit_s, b""
        while not reply.endswith(b"\n"):
            if not _readable(child.stdout, deadline - time.monotonic()):
                raise TimeoutError
            part = child.stdout.read(65536)
            if not part:
                raise EOFError
            reply += part
        return reply

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def _readable(pipe: IO[bytes], timeout_s: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        return bool(selector.select(max(0.0, timeout_s)))
