"""One thread that owns ZMQ sockets: everything registered on it runs there, so it needs no locks."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable

import zmq

log = logging.getLogger("braid.kvtransfer")

TICK_S = 0.25
"""Period of the timers; also the longest a stop takes."""
BUSY_S = 50e-6
"""Pause between two turns while something can only be polled."""


class Loop(threading.Thread):
    """Polls sockets and runs callbacks.

    :meth:`call_soon` may be called from any thread, the rest before :meth:`start` or on the loop's
    own thread. A callback that raises is logged and does not end the loop. Sockets are closed by the
    loop when it stops; the context is the owner's.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._poller = zmq.Poller()
        self._handlers: dict[object, Callable[[], None]] = {}
        self._timers: list[Callable[[], None]] = []
        self._polls: list[Callable[[], bool]] = []
        self._busy = False
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        self._poller.register(self._wake_r, zmq.POLLIN)
        self._wakes = threading.RLock()  # a finalizer may call while its thread calls already
        self._stopping = False
        self._closed = False

    def add(self, socket: zmq.Socket[bytes], handler: Callable[[], None]) -> None:
        """Call ``handler`` whenever ``socket`` is readable; it must read until EAGAIN or once."""
        self._poller.register(socket, zmq.POLLIN)
        self._handlers[socket] = handler

    def remove(self, socket: zmq.Socket[bytes]) -> None:
        """Forget and close a socket. Idempotent."""
        if self._handlers.pop(socket, None) is not None:
            self._poller.unregister(socket)
            socket.close(linger=0)

    def every_tick(self, timer: Callable[[], None]) -> None:
        """Call ``timer`` about every :data:`TICK_S` seconds."""
        self._timers.append(timer)

    def every_turn(self, poll: Callable[[], bool]) -> None:
        """Call ``poll`` every turn, for what has no descriptor to wait on. While one returns True turns
        follow one another without waiting (:data:`BUSY_S`); if none does, the loop sleeps as ever."""
        self._polls.append(poll)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Run ``call`` on the loop's thread; calls keep their order. After the stop: nothing."""
        with self._wakes:
            if self._closed:
                return
            self._calls.append(call)
            with contextlib.suppress(BlockingIOError):  # a full pipe has woken the loop already
                os.write(self._wake_w, b"x")

    def stop(self) -> None:
        """Stop and wait. Calls queued before are still made. Idempotent."""
        self.call_soon(self._end)
        self.join()

    def _end(self) -> None:  # not `_stop`: that is threading.Thread's own
        self._stopping = True

    def run(self) -> None:
        _use_all_cores()
        due = time.monotonic() + TICK_S
        while not self._stopping:
            timeout = 0 if self._busy else max(0, math.ceil((due - time.monotonic()) * 1000))
            ready = self._poller.poll(timeout)
            for source, _ in ready:
                if source == self._wake_r:
                    self._drain_wakes()
                elif source in self._handlers:
                    self._guard(self._handlers[source])
            while self._calls:
                self._guard(self._calls.popleft())
            if time.monotonic() >= due:
                due = time.monotonic() + TICK_S
                for timer in self._timers:
                    self._guard(timer)
            self._busy = self._poll_all()
            if self._busy and not ready:
                time.sleep(BUSY_S)
        for socket in list(self._handlers):
            self.remove(socket)  # type: ignore[arg-type]
        with self._wakes:
            self._closed = True
            os.close(self._wake_r)
            os.close(self._wake_w)

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_r, 4096):
                pass

    def _poll_all(self) -> bool:
        busy = False
        for poll in self._polls:
            try:
                busy |= poll()
            except Exception:
                log.exception("kv_loop_callback_failed")
        return busy

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            log.exception("kv_loop_callback_failed")


def _use_all_cores() -> None:
    """Undo the core binding that a thread inherits from an engine's worker: a transfer that shares
    the model's core does not overlap with it."""
    if hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        except OSError:
            log.warning("kv_loop_affinity_unchanged")
