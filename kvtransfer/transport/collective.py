"""Payloads through ``torch.distributed``: a group of two ranks a session, Gloo in host memory, NCCL on GPUs.

Groups are built directly, beside whatever default group the engine has in this process. They meet over the
session's control lane (:class:`LaneStore`), so no store listens anywhere; Gloo listens on the address it is
given alone. Bytes on a group's connections are neither encrypted nor authenticated, and Gloo ends the process
that is sent more than it expects: it is for networks and peers that are trusted.

Each half has a thread that builds the group and posts operations in the order of their announcements, which
are numbered (``Blocks.at``). The consumer's waits for them and tells the producer (a ``Rendezvous`` named
"got"), which until then holds what is being sent. Ending a session aborts its group, which ends that thread.

Gloo has no way to end the wait for an operation whose bytes are half here when its connection is lost; only
operations that have not begun are woken. So each payload is followed by an empty message, and that is what
is waited for.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist
import zmq

from kvtransfer import wire
from kvtransfer.loop import Loop
from kvtransfer.transport import Broken, ConsumerSide, Deliver, Parcel, ProducerSide, Unavailable
from kvtransfer.transport.pool import Buffer, Pool

BUILD_S = 5.0
"""How long the two halves may take to meet."""
CONNECT_S = 2.0
"""How long, after that, to connect; a thread in between can't be stopped."""
IN_FLIGHT = 16 * 1024 * 1024
"""Payload that one session receives at a time (one parcel at least); the pool is shared by all."""
_FOREVER = timedelta(days=365)
_MAX_VALUES, _MAX_VALUE = 64, 64 * 1024
_DATA, _MARK, _WATCH, _ABORT = 0, 1, 2, 3  # Gloo's tags
_GOT = "got"
MAX_HELD = 4 * wire.MAX_PAYLOAD
"""Bytes sent that a consumer has acknowledged but not said to have got, before its session is ended."""


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Offer and answer: both halves need the same."""

    backend: str
    torch: str


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
        self._closed = False
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
        """Post ``job`` after those before it, once the group is up. After :meth:`close`: nothing."""
        self._held_bytes += job.nbytes
        if self._rank == 0 and self._held_bytes > MAX_HELD:
            self._lost("the consumer does not say what it has got")
        if not self._closed:
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


@dataclass(frozen=True, slots=True)
class _Send:
    backend: Backend
    rows: Any
    nbytes: int

    def post(self, group: Any) -> Any:
        return self.backend.send(group, self.rows)

    def done(self) -> None:
        """Nobody waits for it here."""


class CollectiveSender:
    """See :class:`kvtransfer.transport.Sender`."""

    outlives = False  # nothing leaves staging once the group is aborted
    stretch = 1
    wraps = False

    def __init__(self, side: ProducerSide, backend: Backend, address: bytes, number: int) -> None:
        self._socket = side.socket
        self._backend = backend
        self._address = address
        self._number = number
        self._turn = itertools.count(1)
        say = lambda name, value: side.loop.call_soon(partial(self._say, name, value))  # noqa: E731
        self.session = Session(side.loop, backend, 0, say, lambda reason: None)

    def _say(self, name: str, value: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the consumer is gone, and the session with it
            message = wire.Rendezvous(self._number, name, value)
            self._socket.send_multipart([self._address, wire.encode(message)])

    def told(self, name: str, value: bytes) -> None:
        if name == _GOT:
            self.session.release()
        else:
            self.session.told(name, value)

    def send(self, parcel: Parcel, digest: int) -> None:
        header = parcel.header(at=next(self._turn), digest=digest)
        self._socket.send_multipart([self._address, wire.encode(header)])
        self.session.put(_Send(self._backend, parcel.rows, parcel.nbytes))

    def close(self) -> None:
        self.session.close()


class CollectiveProducer:
    """See :class:`kvtransfer.transport.ProducerTransport`."""

    name = "collective"

    def __init__(self, side: ProducerSide, backend: Backend) -> None:
        self._side = side
        self._backend = backend
        self._senders: list[CollectiveSender] = []

    def accept(self, hello: wire.Hello, offer: bytes, address: bytes) -> tuple[CollectiveSender, bytes]:
        ours = _terms_of(self._backend)
        if (theirs := _decode(offer)) != ours:
            raise Unavailable(f"collective: {theirs} there, {ours} here")
        sender = CollectiveSender(self._side, self._backend, address, hello.session)
        self._senders = [s for s in self._senders if s.session.alive] + [sender]
        return sender, msgspec.msgpack.encode(ours)

    def close(self) -> None:
        for sender in self._senders:
            sender.close()
        for sender in self._senders:
            sender.session.join()


@dataclass(frozen=True, slots=True)
class _Receive:
    """``shape``: of the rows, None if nobody wants them."""

    receiver: CollectiveReceiver
    message: wire.Blocks
    shape: tuple[int, int, int, int] | None
    buffer: Buffer

    @property
    def nbytes(self) -> int:
        return self.message.nbytes

    def post(self, group: Any) -> Any:
        return self.receiver.backend.receive(group, self.buffer.data)

    def done(self) -> None:
        self.receiver.loop.call_soon(partial(self.receiver.arrived, self))


class CollectiveReceiver:
    """See :class:`kvtransfer.transport.Receiver`."""

    def __init__(
        self,
        side: ConsumerSide,
        backend: Backend,
        pool: Pool,
        endpoint: str,
        number: int,
        deliver: Deliver,
        broken: Broken,
    ) -> None:
        self.loop = side.loop
        self.backend = backend
        self._pool = pool
        self._deliver = deliver
        self._broken = broken
        self._expected = itertools.count(1)
        self._waiting: deque[tuple[wire.Blocks, tuple[int, int, int, int] | None]] = deque()
        self._in_flight = 0
        self._closed = False

        def say(name: str, value: bytes) -> None:
            side.loop.call_soon(partial(side.send, endpoint, wire.Rendezvous(number, name, value)))

        self._say = say
        self.session = Session(side.loop, backend, 1, say, self._fail)

    def told(self, name: str, value: bytes) -> None:
        self.session.told(name, value)

    def receive(
        self, message: wire.Blocks, shape: wire.Shape, heads: tuple[int, int], frames: Sequence[zmq.Frame]
    ) -> None:
        rows = (shape.layers, message.count, heads[1] - heads[0], shape.row_bytes)
        expected = rows[0] * rows[1] * rows[2] * rows[3]
        if message.count < 1 or message.nbytes != expected or expected > wire.MAX_PAYLOAD:
            raise wire.KvWireError(f"payload of {message.nbytes} bytes, expected {expected}")
        self._announced(message, rows)

    def skip(self, message: wire.Blocks) -> None:
        if message.nbytes > 0:
            self._announced(message, None)

    def close(self) -> None:
        self._closed = True
        self._waiting.clear()
        self.session.close()

    def _announced(self, message: wire.Blocks, shape: tuple[int, int, int, int] | None) -> None:
        if self._closed:
            return
        if message.at != next(self._expected):
            self._fail(f"payload {message.at} is out of turn")
            return
        self._waiting.append((message, shape))
        self._pump()

    def _pump(self) -> None:
        """Receive what has room, in order."""
        while self._waiting:
            message, shape = self._waiting[0]
            if self._in_flight and self._in_flight + message.nbytes > IN_FLIGHT:
                return
            buffer = self._pool.take(message.nbytes, self._pump)
            if buffer is None:
                return
            self._waiting.popleft()
            self._in_flight += message.nbytes
            self.session.put(_Receive(self, message, shape, buffer))

    def arrived(self, job: _Receive) -> None:
        """A payload is complete."""
        if self._closed:
            return
        self._in_flight -= job.nbytes
        self._say(_GOT, b"")
        self._pump()
        if job.shape is not None:
            self._deliver(job.message, job.buffer.data.view(job.shape))

    def _fail(self, reason: str) -> None:
        if not self._closed:
            self.close()
            self._broken(f"collective: {reason}")


class CollectiveConsumer:
    """See :class:`kvtransfer.transport.ConsumerTransport`."""

    name = "collective"

    def __init__(self, side: ConsumerSide, backend: Backend) -> None:
        self._side = side
        self._backend = backend
        self._pool = Pool(side.loop)
        self._receivers: list[CollectiveReceiver] = []

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(_terms_of(self._backend))

    def open(
        self, welcome: wire.Welcome, endpoint: str, deliver: Deliver, broken: Broken
    ) -> CollectiveReceiver:
        if _decode(welcome.data) != _terms_of(self._backend):
            raise Unavailable("collective: another backend than ours")
        receiver = CollectiveReceiver(
            self._side, self._backend, self._pool, endpoint, welcome.session, deliver, broken
        )
        self._receivers = [r for r in self._receivers if r.session.alive] + [receiver]
        return receiver

    def close(self) -> None:
        for receiver in self._receivers:
            receiver.close()
        for receiver in self._receivers:
            receiver.session.join()
        self._pool.close()


def _terms_of(backend: Backend) -> Terms:
    backend.check()
    return Terms(backend.name, torch.__version__.split("+")[0])


def _decode(data: bytes) -> Terms:
    try:
        return msgspec.msgpack.decode(data, type=Terms)
    except msgspec.DecodeError as error:
        raise Unavailable(f"collective terms: {error}") from None
