"""Which workers there are, and whether they live."""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from braid import wire

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RETIRED = 64
"""Replaced epochs remembered a worker name."""

Watcher = Callable[["Worker", str], None]
"""Called once with the worker and a short reason when the worker is gone."""


CALM_S = 1.5
"""Seconds without a single request after which a worker is taken for one that runs groups at full width; a
little less than the workers' own ``calm_s``."""


class HelloRefused(ValueError):
    """A worker introduced itself in a way that can't be registered; the message says why."""


@dataclass(slots=True, eq=False)
class Worker:
    """One engine start of one worker.

    Attributes:
        identity: its ZMQ routing id.
        seen: monotonic time of its last message.
        since: monotonic time of its registration.
        inflight: samples (decode) or prompts (prefill) that the router sent it and that have not ended.
        newcomers: single requests that it was sent since its last heartbeat.
        single_at: monotonic time when it was last sent one, or one of its ended.
        spoke: it has said something since it was registered.
        quiet: it is connected, and has said nothing for some heartbeats.
        watchers: told once when it is gone.
    """

    identity: bytes
    hello: wire.Hello
    since: float
    seen: float
    beat: wire.Beat = field(default_factory=wire.Beat)
    draining: bool = False
    gone: bool = False
    inflight: int = 0
    newcomers: int = 0
    single_at: float = -math.inf
    spoke: bool = False
    quiet: bool = False
    watchers: set[Watcher] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.hello.worker

    @property
    def usable(self) -> bool:
        """Whether it may be given new work."""
        return not self.gone and not self.draining and self.beat.engine_ok

    @property
    def state(self) -> str:
        if self.gone:
            return "gone"
        if self.draining:
            return "draining"
        if self.quiet:
            return "quiet"
        return "ready" if self.beat.engine_ok else "broken"

    @property
    def load(self) -> float:
        """Work in flight per slot."""
        return self.inflight / self.hello.slots

    @property
    def crowd(self) -> int:
        """Sequences that a single request would share its steps with: those that ran at the last heartbeat,
        and the single requests since. Beside single requests few samples of groups are let in at a time;
        where there has been none for :data:`CALM_S`, all that the worker was given run, or will."""
        if time.monotonic() - self.single_at > CALM_S:
            return max(self.beat.running, self.inflight)
        return self.beat.running + self.newcomers


class Registry:
    """Workers by name and by routing id. One epoch a name: a newer one replaces the older."""

    def __init__(self) -> None:
        self._by_name: dict[str, Worker] = {}
        self._by_identity: dict[bytes, Worker] = {}
        self._retired: dict[str, deque[int]] = {}
        self._models_seen: set[str] = set()
        self.joined: list[Callable[[Worker], None]] = []
        self.lost: list[Watcher] = []

    def __len__(self) -> int:
        return len(self._by_name)

    def all(self) -> list[Worker]:
        return sorted(self._by_name.values(), key=lambda w: w.name)

    def get(self, identity: bytes) -> Worker | None:
        return self._by_identity.get(identity)

    def ready(self, role: wire.Role, model: str) -> list[Worker]:
        """Workers that may be given work for ``model``, by name; quiet ones only if there are no others."""
        found = [w for w in self.all() if w.hello.role == role and w.usable and model in w.hello.models]
        return [w for w in found if not w.quiet] or found

    def models(self) -> list[str]:
        """Models that a decode worker serves now."""
        return sorted({m for w in self._by_name.values() if w.hello.role == "decode" for m in w.hello.models})

    def has_served(self, model: str) -> bool:
        """Whether any worker has served ``model`` since the router started."""
        return model in self._models_seen

    def hello(self, identity: bytes, hello: wire.Hello, now: float, duplicate_s: float) -> Worker:
        """Register the worker that introduced itself.

        A repeated ``Hello`` changes nothing if it came within ``duplicate_s`` of the first, or if the worker
        has said nothing else since: then it was sent before the welcome was read. Another one says that the
        worker lost the router and stopped its work: what it had is lost, and it starts afresh.

        Raises:
            HelloRefused: wrong protocol, unusable values, or an epoch that a newer one replaced.
        """
        _check_hello(hello)
        if hello.epoch in self._retired.get(hello.worker, ()):
            raise HelloRefused("a newer start of this worker has replaced it")
        old = self._by_name.get(hello.worker)
        if old is not None:
            same = old.identity == identity and old.hello == hello
            if same and (not old.spoke or now - old.since < duplicate_s):
                old.seen = now
                return old
            self._replace(old, hello.epoch)
        other = self._by_identity.get(identity)
        if other is not None:
            self.lose(other, "replaced")
        worker = Worker(identity=identity, hello=hello, since=now, seen=now)
        self._by_name[worker.name] = self._by_identity[identity] = worker
        self._models_seen.update(hello.models)
        for callback in self.joined:
            callback(worker)
        return worker

    def lose(self, worker: Worker, reason: str) -> None:
        """Forget a worker and tell who watches it. Idempotent."""
        if worker.gone:
            return
        worker.gone = True
        del self._by_name[worker.name]
        del self._by_identity[worker.identity]
        for callback in (*self.lost, *worker.watchers):
            callback(worker, reason)
        worker.watchers.clear()

    def hush(self, heard_since: float) -> None:
        """Note which workers have not been heard since then."""
        for worker in self.all():
            worker.quiet = worker.seen < heard_since

    def expire(self, silent_since: float) -> None:
        """Lose every worker that was last heard before ``silent_since``."""
        for worker in self.all():
            if worker.seen < silent_since:
                self.lose(worker, "silent")

    def state(self) -> list[dict[str, Any]]:
        """What ``/cluster`` shows of the workers."""
        return [_describe(worker) for worker in self.all()]

    def check_integrity(self) -> None:
        """Assert that both indexes hold the same living workers and no count is negative."""
        assert {id(w) for w in self._by_name.values()} == {id(w) for w in self._by_identity.values()}
        for name, worker in self._by_name.items():
            assert worker.name == name
            assert self._by_identity[worker.identity] is worker
            assert not worker.gone
            assert worker.inflight >= 0

    def _replace(self, old: Worker, epoch: int) -> None:
        if old.hello.epoch != epoch:
            self._retired.setdefault(old.name, deque(maxlen=_RETIRED)).append(old.hello.epoch)
        self.lose(old, "replaced")


def _check_hello(hello: wire.Hello) -> None:
    if hello.protocol != wire.PROTOCOL:
        raise HelloRefused(f"it speaks protocol {hello.protocol}, this router {wire.PROTOCOL}")
    if not _NAME.fullmatch(hello.worker):
        raise HelloRefused("its name must be 1-64 characters of A-Z a-z 0-9 . _ -")
    if not hello.models or hello.slots < 1 or hello.block_size < 1 or hello.max_model_len < 1:
        raise HelloRefused("models, slots, block_size and max_model_len must not be empty or zero")
    if hello.role == "prefill" and not hello.kv_endpoints:
        raise HelloRefused("a prefill worker needs a KV endpoint")


def _describe(worker: Worker) -> dict[str, Any]:
    hello, beat = worker.hello, worker.beat
    return {
        "worker": worker.name,
        "role": hello.role,
        "state": worker.state,
        "epoch": hello.epoch,
        "models": list(hello.models),
        "fingerprint": hello.fingerprint,
        "vllm_version": hello.vllm_version,
        "block_size": hello.block_size,
        "max_model_len": hello.max_model_len,
        "http": hello.http,
        "slots": hello.slots,
        "inflight": worker.inflight,
        "running": beat.running,
        "waiting": beat.waiting,
        "kv_usage": beat.kv_usage,
        "staging_bytes": beat.staging_bytes,
        "tickets": beat.tickets,
    }
