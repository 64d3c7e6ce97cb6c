"""One thread that owns ZMQ sockets: everything registered on it runs there, so it needs no locks."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
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

    One thread at a time *holds* the loop and may use its sockets: its own, or one that runs a callback by
    :meth:`call_at_once`. :meth:`call_soon` and :meth:`call_at_once` may be called from any thread, the rest
    before :meth:`start` or by who holds the loop. A callback that raises is logged and does not end the
    loop. Sockets are closed by the loop when it stops; the context is the owner's.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._poller = select.poll()  # of descriptors: a ZMQ socket is touched by nobody but the holder
        self._sockets: dict[int, tuple[zmq.Socket[bytes], Callable[[], None]]] = {}
        self._timers: list[Callable[[], None]] = []
        self._polls: list[Callable[[], bool]] = []
        self._busy = False
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        self._poller.register(self._wake_r, select.POLLIN)
        self._wakes = threading.RLock()  # a finalizer may call while its thread calls already
        self._held = threading.Lock()
        self._turning = False
        self._stopping = False
        self._closed = False

    def add(self, socket: zmq.Socket[bytes], handler: Callable[[], None]) -> None:
        """Call ``handler`` whenever ``socket`` is readable, and now and then when it is not: it must read
        without blocking, until EAGAIN or once."""
        fd = int(socket.getsockopt(zmq.FD))
        self._sockets[fd] = socket, handler
        self._poller.register(fd, select.POLLIN)
        self._wake()  # another thread than the holder may be waiting for the others

    def remove(self, socket: zmq.Socket[bytes]) -> None:
        """Forget and close a socket. Idempotent."""
        for fd in [fd for fd, (known, _) in self._sockets.items() if known is socket]:
            del self._sockets[fd]
            self._poller.unregister(fd)
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
            if not self._closed:
                self._calls.append(call)
                self._wake()

    def call_at_once(self, call: Callable[[], None]) -> None:
        """Run ``call`` here, before this returns, if nobody holds the loop and no call waits; else the same
        as :meth:`call_soon`. It saves the time that waking another thread takes."""
        if not self._held.acquire(blocking=False):
            self.call_soon(call)
            return
        try:
            here = self._turning and not self._calls and not self._stopping
            if here:
                self._guard(call)
                if self._polls or self._readable():
                    self._wake()
        finally:
            self._held.release()
        if not here:
            self.call_soon(call)

    def _wake(self) -> None:
        with self._wakes, contextlib.suppress(BlockingIOError):  # a full pipe has woken the loop already
            if not self._closed:
                os.write(self._wake_w, b"x")

    def stop(self) -> None:
        """Stop and wait. Calls queued before are still made. Idempotent."""
        self.call_soon(self._end)
        self.join()

    def _end(self) -> None:  # not `_stop`: that is threading.Thread's own
        self._stopping = True

    def run(self) -> None:
        use_all_cores()
        due = time.monotonic() + TICK_S
        with self._held:
            self._turning = True
            ready = self._readable()
        while not self._stopping:
            ready = ready or self._wait(due)
            with self._held:
                handled = self._handle(ready)
                while self._calls:
                    self._guard(self._calls.popleft())
                if time.monotonic() >= due:
                    due = time.monotonic() + TICK_S
                    for timer in self._timers:
                        self._guard(timer)
                self._busy = self._poll_all()
                ready = self._readable()
            if self._busy and not handled:
                time.sleep(BUSY_S)
        with self._held:
            for socket, _ in list(self._sockets.values()):
                self.remove(socket)
        with self._wakes:
            self._closed = True
            os.close(self._wake_r)
            os.close(self._wake_w)

    def _wait(self, due: float) -> list[int]:
        """Descriptors that something came for, when it did or the next timer is due."""
        timeout = 0 if self._busy else max(0, math.ceil((due - time.monotonic()) * 1000))
        return [fd for fd, _ in self._poller.poll(timeout)]

    def _readable(self) -> list[int]:
        """Descriptors of the sockets that have something to read. To use a socket may take away what its
        descriptor says, so who has used some asks before anybody waits."""
        found = self._sockets.items()
        return [fd for fd, (socket, _) in found if int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN]

    def _handle(self, ready: list[int]) -> bool:
        """Call the handlers. Returns whether there was anything."""
        for fd in ready:
            if fd == self._wake_r:
                self._drain_wakes()
            elif fd in self._sockets:
                self._guard(self._sockets[fd][1])
        return bool(ready)

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


def use_all_cores() -> None:
    """Undo the core binding that a thread inherits from an engine's worker: a transfer that shares
    the model's core does not overlap with it."""
    if hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        except OSError:
            log.warning("kv_loop_affinity_unchanged")
