"""Waiting for a device's copies without stopping the thread that started them."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

from kvtransfer.loop import Loop, use_all_cores

log = logging.getLogger("braid.kvtransfer")


class Fence(Protocol):
    """Copies in flight on a device; a copy on the CPU has none (it is complete when it returns)."""

    def wait(self) -> None:
        """Block the calling thread until they are complete. Raises what made them fail."""


_Item = tuple[Fence, Callable[[bool], None], Callable[[], object]]


class Waiter:
    """A thread that waits for fences, one after the other, and then calls back, holding a loop.

    It starts with the first fence: where nothing is asynchronous there is no thread.
    """

    def __init__(self, loop: Loop, name: str) -> None:
        self._loop = loop
        self._name = name
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._begin = threading.Lock()

    def after(
        self, fence: Fence, call: Callable[[bool], None], meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        """Run ``call`` as a holder of the loop once the fence has passed, with whether its copies went well.

        Calls keep their order. ``meanwhile`` is run before waiting, without the loop; if it raises, the call
        is told that it did not go well, after the fence all the same. From any thread.
        """
        with self._begin:
            started = self._thread is not None or self._start()
        if started:
            self._queue.put((fence, call, meanwhile))
        else:
            self._pass(fence, call, meanwhile)

    def _start(self) -> bool:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the process can have no more; who copies waits itself
            log.warning("kv_waiter_not_started", extra={"detail": str(error)})
            return False
        self._thread = thread
        return True

    def stop(self) -> None:
        """Wait for the fences so far, then end. Idempotent."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        use_all_cores()
        while (item := self._queue.get()) is not None:
            self._pass(*item)

    def _pass(self, fence: Fence, call: Callable[[bool], None], meanwhile: Callable[[], object]) -> None:
        try:
            try:
                meanwhile()
            finally:
                fence.wait()
        except Exception:
            log.exception("kv_copy_failed")
            self._loop.call_at_once(partial(call, False))
        else:
            self._loop.call_at_once(partial(call, True))
