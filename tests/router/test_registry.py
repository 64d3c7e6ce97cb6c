"""The registry: epochs, silence, and who is told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from braid import wire
from router.registry import HelloRefused, Registry, Worker

HELLO = wire.Hello(wire.PROTOCOL, "decode", "d0", 1, ("demo",), 2048, 32, 8, "f", "0.32.0")


def hello(**fields: Any) -> wire.Hello:
    return msgspec.structs.replace(HELLO, **fields)


@pytest.fixture
def registry() -> Registry:
    return Registry()


def join(registry: Registry, identity: bytes = b"1", now: float = 0.0, **fields: Any) -> Worker:
    worker = registry.hello(identity, hello(**fields), now, duplicate_s=1.0)
    registry.check_integrity()
    return worker


def test_a_new_epoch_replaces_the_old_one_and_tells(registry: Registry) -> None:
    lost: list[tuple[int, str]] = []
    registry.lost.append(lambda worker, reason: lost.append((worker.hello.epoch, reason)))
    old = join(registry)
    new = join(registry, b"2", epoch=2)
    assert lost == [(1, "replaced")]
    assert old.gone
    assert registry.all() == [new]


def test_a_replaced_epoch_cannot_come_back(registry: Registry) -> None:
    join(registry)
    join(registry, b"2", epoch=2)
    with pytest.raises(HelloRefused, match="replaced"):
        join(registry, b"1", epoch=1)


def test_a_repeated_hello_changes_nothing(registry: Registry) -> None:
    assert join(registry) is join(registry, now=0.5)


def test_a_late_hello_of_a_worker_that_has_not_read_its_welcome_changes_nothing(registry: Registry) -> None:
    assert join(registry) is join(registry, now=20.0)


def test_a_late_hello_means_that_work_was_dropped(registry: Registry) -> None:
    first = join(registry)
    first.spoke = True
    again = join(registry, now=2.0)
    assert first.gone
    assert registry.all() == [again]


def test_an_expired_worker_may_rejoin_with_its_epoch(registry: Registry) -> None:
    worker = join(registry)
    registry.expire(silent_since=0.1)
    assert worker.gone
    assert len(registry) == 0
    join(registry, now=5.0)
    assert len(registry) == 1


def test_watchers_hear_of_a_loss_once(registry: Registry) -> None:
    worker, heard = join(registry), []
    worker.watchers.add(lambda worker, reason: heard.append(reason))
    registry.lose(worker, "silent")
    registry.lose(worker, "silent")
    assert heard == ["silent"]


def test_a_draining_or_broken_worker_is_not_ready(registry: Registry) -> None:
    worker = join(registry)
    assert registry.ready("decode", "demo") == [worker]
    worker.beat = wire.Beat(engine_ok=False)
    assert (registry.ready("decode", "demo"), worker.state) == ([], "broken")
    worker.beat, worker.draining = wire.Beat(), True
    assert (registry.ready("decode", "demo"), worker.state) == ([], "draining")


@pytest.mark.parametrize(
    "fields",
    [
        {"protocol": wire.PROTOCOL + 1},
        {"worker": "a b"},
        {"worker": ""},
        {"worker": "x\r\nset-cookie: a"},
        {"models": ()},
        {"slots": 0},
        {"block_size": 0},
        {"role": "prefill"},
    ],
)
def test_an_unusable_hello_is_refused(registry: Registry, fields: dict[str, Any]) -> None:
    with pytest.raises(HelloRefused):
        join(registry, **fields)
    assert len(registry) == 0
