"""A group of two ranks by ``torch.distributed``, and the thread that builds it and posts what it moves.

Groups are built directly, beside whatever default group the engine has in this process. They meet over the
session's control lane (:class:`LaneStore`), so no store listens anywhere; Gloo listens on the address it is
given alone.

Gloo has no way to end the wait for an operation whose bytes are half here when its connection is lost; only
operations that have not begun are woken. So each payload is followed by an empty message, and that is what
is waited for.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from kvtransfer import wire
from kvtransfer.loop import Loop
from kvtransfer.transport import Unavailable

BUILD_S = 5.0
"""How long the two halves may take to meet."""
CONNECT_S = 2.0
"""How long, after that, to connect; a thread in between can't be stopped."""
MAX_HELD = 4 * wire.MAX_PAYLOAD
"""Bytes sent that a consumer has acknowledged but not said to have got, before its session is ended."""
_FOREVER = timedelta(days=365)
_MAX_VALUES, _MAX_VALUE = 64, 64 * 1024
_DATA, _MARK, _WATCH, _ABORT = 0, 1, 2, 3  # Gloo's tags


class Backend(Protocol):
    """One kind of process group. Groups have rank 0, the producer, and rank 1, the consumer."""

    name: str

    def check(self) -> None:
        """Raise :class:`Unavailable` if this machine lacks it."""

    def build(self, store: Any, rank: int) -> Any:
        """Connect; blocks. Raises RuntimeError."""

    def send(self, group: Any, rows: Any) -> Any:
        """Begin to send ``rows``; returns the work, to be held until the consumer has them."""

    def receive(self, group: Any, buffer: Any) -> Any:
        """Begin to receive into the host memory ``buffer``; returns the work, to be waited for."""

    def wait(self, work: Any) -> None:
        """Block until it is complete. Raises RuntimeError if the group broke or was aborted."""

    def abort(self, group: Any) -> None:
        """End all operations of the group and its connection; from any thread, does not wait."""


class Gloo:
    """Groups over TCP, bound to ``bind``; tensors are in host memory, sent from and received in place."""

    name = "gloo"

    def __init__(self, bind: str) -> None:
        self._bind = bind

    def check(self) -> None:
        if not dist.is_available() or not dist.is_gloo_available():
            raise Unavailable("this torch has no Gloo")

    def build(self, store: Any, rank: int) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._bind)]
        options._timeout = timedelta(seconds=CONNECT_S)  # each wait has its own
        options._threads = 1
        return dist.ProcessGroupGloo(store, rank, 2, options)

    def send(self, group: Any, rows: Any) -> Any:
        data = group.send([rows.contiguous().view(-1)], 1 - group.rank(), _DATA)
        return data, group.send([_empty()], 1 - group.rank(), _MARK)

    def receive(self, group: Any, buffer: Any) -> Any:
        data = group.recv([buffer], 1 - group.rank(), _DATA)
        return data, group.recv([_empty()], 1 - group.rank(), _MARK)

    def watch(self, group: Any) -> Any:
        """A receive of what is never sent."""
        return group.recv([torch.empty(1, dtype=torch.uint8)], 1 - group.rank(), _WATCH)

    def wait(self, work: Any) -> None:
        data, mark = work
        mark.wait(_FOREVER)
        data.wait(timedelta(seconds=CONNECT_S))  # it came before

    def ended(self, watch: Any) -> None:
        """Block until the group has ended."""
        with contextlib.suppress(RuntimeError):
            watch.wait(_FOREVER)

    def abort(self, group: Any) -> None:
        # Gloo closes a group's connections, and fails all that wait, when one operation times out.
        with contextlib.suppress(RuntimeError):
            doomed = group.recv([torch.empty(1, dtype=torch.uint8)], 1 - group.rank(), _ABORT)
            doomed.wait(timedelta(milliseconds=1))


class Nccl:
    """Groups between GPUs; payloads take a detour through device memory on both sides. Not measured.

    Args:
        device: this rank's.
        max_ctas: thread blocks, and with them channels and their device memory, of a group.
    """

    name = "nccl"

    def __init__(self, device: str, max_ctas: int = 2) -> None:
        self._device = torch.device(device)
        self._max_ctas = max_ctas

    def check(self) -> None:
        if not dist.is_available() or not dist.is_nccl_available() or not torch.cuda.is_available():
            raise Unavailable("no NCCL, or no GPU")

    def build(self, store: Any, rank: int) -> Any:
        torch.cuda.set_device(self._device)  # of this thread
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _FOREVER  # its watchdog ends the process
        options.config.max_ctas = self._max_ctas
        return dist.ProcessGroupNCCL(store, rank, 2, options)

    def send(self, group: Any, rows: Any) -> Any:
        on_device = rows.contiguous().view(-1).to(self._device)
        return group.send([on_device], 1 - group.rank(), _DATA), on_device

    def receive(self, group: Any, buffer: Any) -> Any:
        on_device = torch.empty_like(buffer, device=self._device)
        return group.recv([on_device], 1 - group.rank(), _DATA), buffer, on_device

    def wait(self, work: Any) -> None:
        operation, buffer, on_device = work
        operation.wait()
        buffer.copy_(on_device)
        torch.cuda.current_stream(self._device).synchronize()

    def abort(self, group: Any) -> None:
        with contextlib.suppress(RuntimeError):
            group.abort()


def _empty() -> Any:
    return torch.empty(0, dtype=torch.uint8)


def backend_of(device: str, bind: str) -> Backend:
    """The backend for tensors on ``device``; Gloo listens on the address ``bind``."""
    return Gloo(bind) if torch.device(device).type == "cpu" else Nccl(device)


class LaneStore(dist.Store):  # type: ignore[misc]  # torch is not followed
    """The store two halves meet in: what one sets, ``say`` carries to the other, which is :meth:`told`.

    Called by the group's constructor on the session's thread.
    """

    def __init__(self, say: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._say = say
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def told(self, name: str, value: bytes) -> None:
        """The other half has set a value."""
        with self._changed:
            if len(self._values) < _MAX_VALUES and len(value) <= _MAX_VALUE:
                self._values.setdefault(name, value)
            self._changed.notify_all()

    def close(self) -> None:
        """Whoever waits for a value gets an error instead."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        with self._changed:
            self._values[key] = data
        self._say(key, data)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or all(key in self._values for key in keys), BUILD_S)
            if self._closed or not all(key in self._values for key in keys):
                raise RuntimeError("the session ended" if self._closed else "the other half did not come")


class Job(Protocol):
    """An operation of a session, of ``nbytes``."""

    @property
    def nbytes(self) -> int: ...

    def post(self, group: Any) -> Any:
        """Begin; returns its work."""

    def done(self) -> None:
        """The work is complete; called on the consumer's side only, on the thread."""


class Session:
    """A group, and the thread that builds it and posts jobs in order. The consumer's (rank 1) waits for them,
    the producer's holds them until :meth:`release`.

    ``failed`` is called once on the loop if the group ends before :meth:`close`. The methods are the loop's.
    """

    def __init__(
        self,
        loop: Loop,
        backend: Backend,
        rank: int,
        say: Callable[[str, bytes], None],
        failed: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._backend = backend
        self._rank = rank
        self._failed = failed
        self._store = LaneStore(say)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._held: deque[tuple[Job, Any]] = deque()
        self._held_bytes = self._released = 0
        self._lock = threading.Lock()
        self._group: Any = None
        self._closed = self._ended = False
        self._thread = threading.Thread(target=self._run, name="braid-kv-collective", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def told(self, name: str, value: bytes) -> None:
        """See :meth:`LaneStore.told`."""
        self._store.told(name, value)

    def put(self, job: Job) -> None:
        """Post ``job`` after those before it, once the group is up. Nothing after the group's end."""
        self._held_bytes += job.nbytes
        if self._rank == 0 and self._held_bytes > MAX_HELD:
            self._lost("the consumer does not say what it has got")
        with self._lock:
            if not self._closed and not self._ended:
                self._jobs.put(job)

    def release(self) -> None:
        """The oldest job that is held is complete."""
        with self._lock:  # the other half may be faster than the thread
            self._released += 1
        self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            while self._released and self._held:
                job, _ = self._held.popleft()
                self._released -= 1
                self._held_bytes -= job.nbytes

    def close(self) -> None:
        """Abort. Nothing of a tensor is sent or written any more; the thread ends by itself. Idempotent."""
        with self._lock:
            self._closed = True
            group, self._group = self._group, None
        self._store.close()
        self._jobs.put(None)
        if group is not None:
            self._backend.abort(group)

    def join(self) -> None:
        """Wait for the thread, which after :meth:`close` takes no longer than a group to be built."""
        self._thread.join(2 * CONNECT_S)

    def _run(self) -> None:
        try:
            group = self._backend.build(self._store, self._rank)
            with self._lock:
                if self._closed:
                    return
                self._group = group
            if self._rank == 0 and isinstance(self._backend, Gloo):
                self._watch(self._backend, group)
            self._work(group)
        except Exception as error:  # RuntimeError and its kin of torch's: whatever it is, the group is lost
            self._loop.call_soon(partial(self._lost, str(error)))
        finally:
            with self._lock:
                self._ended = True
            self._held.clear()
            while not self._jobs.empty():
                self._jobs.get()

    def _work(self, group: Any) -> None:
        posted: deque[tuple[Job, Any]] = deque()
        while True:
            if not posted or not self._jobs.empty():
                if (job := self._jobs.get()) is None:
                    return
                (posted if self._rank else self._held).append((job, job.post(group)))
                del job  # a job holds its buffer
                self._let_go()
            else:
                self._finish(*posted.popleft())

    def _finish(self, job: Job, work: Any) -> None:
        self._backend.wait(work)
        job.done()

    def _watch(self, backend: Gloo, group: Any) -> None:
        """Notice that the other half has ended while nothing is being sent."""
        work = backend.watch(group)

        def run() -> None:
            backend.ended(work)
            self._loop.call_soon(partial(self._lost, "the other half ended"))

        threading.Thread(target=run, name="braid-kv-collective-watch", daemon=True).start()

    def _lost(self, reason: str) -> None:
        if not self._closed:
            self.close()
            self._failed(reason)
