"""What `benchmarks.kvtransfer` compares, each as pairs of workers that move blocks when told to."""

from __future__ import annotations

import random
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kv_layout import Layout
from benchmarks.kv_link import Worker

Measure = dict[str, Any]
"""`seconds`, and whatever else a contender says of a transfer."""

UCX_ENV: Mapping[str, Mapping[str, str]] = {
    "nixl-tcp": {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo"},
    # UCX refuses `sm,self` alone: shared memory has no failure handling of its own, so TCP stays as a lane
    # beside it; blocks go by cross-memory attach.
    "nixl-shm": {"UCX_TLS": "sm,self,tcp", "UCX_NET_DEVICES": "lo"},
}
NIXL_PAUSES = {"polled": 0.0, "paused": 50e-6}
"""Ways of waiting for a NIXL transfer: look all the time, or leave the core to its progress thread for
these seconds between looks. Which is faster depends on size and cores, so both are measured."""


@dataclass
class Site:
    """Where workers run: interpreters, folder for logs and sockets, and the seed of block ids."""

    layout: Layout
    run_dir: Path
    python: str
    peer_python: str
    staging_bytes: int
    nixl_threads: int = 0
    seed: int = 0

    def start(
        self,
        name: str,
        role: str,
        setup: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        *,
        peer: bool = False,
    ) -> Worker:
        """A worker of a role, told the layout."""
        python = self.peer_python if peer else self.python
        full = {"layout": self.layout.public(), **setup}
        return Worker(name, role, full, python=python, run_dir=self.run_dir, env=env)


@dataclass
class Contender(ABC):
    """Something that moves blocks, in one of its `modes`. Owns its workers from `start()` to `stop()`."""

    name: str
    site: Site
    modes: tuple[str, ...] = ("wire",)
    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.site.seed} {self.name}")

    @abstractmethod
    def start(self) -> None:
        """Start and connect the workers."""

    @abstractmethod
    def transfer(self, count: int, mode: str) -> Measure:
        """Move `count` random blocks."""

    def verify(self, count: int) -> None:
        """Move blocks in every mode and compare what came. Raises ValueError if they differ."""
        for mode in self.modes:
            self.transfer(count, mode)

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.workers.clear()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Runs while in the context; a contender that uses cores while idle is put aside outside of it."""
        yield

    def cpu_seconds(self) -> float:
        """CPU time of its workers so far."""
        return sum(worker.process.cpu_seconds() for worker in self.workers)

    def _some_blocks(self, count: int) -> list[int]:
        """Different ids in no order; block 0 is never used."""
        return self._random.sample(range(1, self.site.layout.blocks), count)

    def _stretch(self, count: int) -> int:
        return self._random.randint(0, self.site.layout.blocks - count)


class Memcpy(Contender):
    """One copy by one thread, contiguous."""

    def start(self) -> None:
        self.workers = [self.site.start("copier", "copier", {})]

    def transfer(self, count: int, mode: str) -> Measure:
        return self.workers[0].ask(
            "copy", source=self._stretch(count), target=self._stretch(count), count=count
        )


class Stream(Contender):
    """Frames as large as our pieces from a ZMQ socket to another whose owner drops them."""

    def start(self) -> None:
        sender = self.site.start("sender", "sender", {})
        self.workers.append(sender)
        self.workers.append(self.site.start("receiver", "receiver", sender.ask("endpoint")))

    def transfer(self, count: int, mode: str) -> Measure:
        sender, receiver = self.workers
        with receiver.asking("receive", count=count) as received:
            start = sender.ask("send", first=self._stretch(count), count=count)["start"]
        return {"seconds": received()["end"] - start}


class Nixl(Contender):
    """NIXL's READ. Its processes use a core each while idle, so they are stopped outside their turn."""

    def start(self) -> None:
        for side, filled in (("source", True), ("target", False)):
            name = f"{self.name}-{side}"
            setup = {"name": name, "filled": filled, "threads": self.site.nixl_threads}
            self.workers.append(self.site.start(name, "nixl", setup, UCX_ENV[self.name], peer=True))
        source, target = self.workers
        target.ask("connect", **source.ask("describe"))
        source.ask("connect", **target.ask("describe"))
        self._freeze()

    def transfer(self, count: int, mode: str) -> Measure:
        return self._read(self._some_blocks(count), self._some_blocks(count), mode)

    def _read(self, local: Sequence[int], remote: Sequence[int], mode: str) -> Measure:
        return self.workers[1].ask("read", local=local, remote=remote, pause_s=NIXL_PAUSES[mode])

    def verify(self, count: int) -> None:
        for mode in self.modes:
            local, remote = self._some_blocks(count), self._some_blocks(count)
            self._read(local, remote, mode)
            _compare(self.name, self.workers, remote, local)

    @contextmanager
    def turn(self) -> Iterator[None]:
        for worker in self.workers:
            worker.process.thaw()
        try:
            yield
        finally:
            self._freeze()

    def _freeze(self) -> None:
        for worker in self.workers:
            worker.process.freeze()


class Ends:
    """The producer's and the consumer's process, which several contenders share."""

    def __init__(self, site: Site, transports: Sequence[tuple[str, int]]) -> None:
        self.producer = site.start("producer", "producer", {"staging_bytes": site.staging_bytes})
        try:
            self.consumer = site.start("consumer", "consumer", {"transports": transports})
        except BaseException:
            self.producer.stop()
            raise
        self.endpoints: dict[str, str] = self.producer.ask("endpoints")


@dataclass
class Ours(Contender):
    """`kvtransfer` over one transport.

    Modes: `wire`, from publishing what is in staging to `Loaded`; `whole`, from the start of gathering, which
    overlaps with sending.
    """

    modes: tuple[str, ...] = ("wire", "whole")
    transport: str = "zmq-1"
    check: str = "off"
    ends: Callable[[], Ends] = field(kw_only=True)

    def start(self) -> None:
        ends = self.ends()
        self.workers = [ends.producer, ends.consumer]

    def transfer(self, count: int, mode: str) -> Measure:
        return self._move(self._some_blocks(count), self._some_blocks(count), mode)

    def _move(self, source: Sequence[int], target: Sequence[int], mode: str) -> Measure:
        producer, consumer = self.workers
        key, endpoint = secrets.token_hex(16), self.ends().endpoints[self.check]
        consumer.ask("load", transport=self.transport, endpoint=endpoint, key=key, block_ids=target)
        producer.ask("open", check=self.check, key=key, count=len(source))
        staged = producer.ask("stage", check=self.check, key=key, block_ids=source, mode=mode)
        loaded = consumer.ask("wait", transport=self.transport)
        return {"seconds": loaded.pop("end") - staged.pop("start"), **staged, **loaded}

    def verify(self, count: int) -> None:
        for mode in self.modes:
            source, target = self._some_blocks(count), self._some_blocks(count)
            self._move(source, target, mode)
            _compare(self.name, self.workers, source, target)


def _compare(name: str, workers: Sequence[Worker], sent: Sequence[int], got: Sequence[int]) -> None:
    source, target = workers
    if source.ask("checksum", block_ids=sent) != target.ask("checksum", block_ids=got):
        raise ValueError(f"{name}: the blocks that came are not those that were sent")


OURS = {
    "zmq": ("zmq-1", "off"),
    "zmq-2-lanes": ("zmq-2", "off"),
    "zmq-sampled": ("zmq-1", "sampled"),
    "shm": ("shm-1", "off"),
    "shm-sampled": ("shm-1", "sampled"),
}
"""Transport with its lanes, and digests, of our contenders."""
NAMES = ("memcpy", "stream", *OURS, *UCX_ENV)


def contenders(names: Sequence[str], site: Site) -> list[Contender]:
    """Those named, not started; ours share two processes, which start with the first."""
    shared: list[Ends] = []

    def ends() -> Ends:
        if not shared:
            shared.append(Ends(site, [("zmq", 1), ("zmq", 2), ("shm", 1)]))
        return shared[0]

    found: list[Contender] = []
    for name in names:
        if name in OURS:
            transport, check = OURS[name]
            found.append(Ours(name, site, transport=transport, check=check, ends=ends))
        elif name in UCX_ENV:
            found.append(Nixl(name, site, modes=tuple(NIXL_PAUSES)))
        else:
            found.append({"memcpy": Memcpy, "stream": Stream}[name](name, site))
    return found
