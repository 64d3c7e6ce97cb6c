"""Receive buffers that are lent and come back."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch

from kvtransfer.loop import Loop
from kvtransfer.transport.pool import Pool

DEADLINE_S = 10.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop("test-pool")
    yield loop
    loop.start() if loop.ident is None else None
    loop.stop()


def test_a_buffer_is_lent_again_only_when_nothing_refers_to_it(loop: Loop) -> None:
    pool = Pool(loop, 8192)
    buffer = pool.take(8192, lambda: None)
    assert buffer is not None
    rows = buffer.data.view(2, 4, 2, 512)[:, 1:, 1:2]
    array = rows.numpy()
    del buffer, rows
    gc.collect()
    assert pool.take(1, lambda: None) is None, "the array still shows it"
    array[:] = 1
    del array
    assert pool.take(8192, lambda: None) is not None


def test_who_waits_for_room_is_called_when_there_is_some(loop: Loop) -> None:
    pool, called = Pool(loop, 4096), threading.Event()
    buffer = pool.take(100, called.set)
    assert buffer is not None
    assert pool.take(100, called.set) is None
    loop.start()
    released = threading.Thread(target=_drop, args=([buffer],))
    del buffer
    released.start()
    released.join()
    assert called.wait(DEADLINE_S)
    assert pool.lent == 0


def test_buffers_do_not_overlap(loop: Loop) -> None:
    pool = Pool(loop, 1 << 16)
    buffers = [pool.take(5000, lambda: None) for _ in range(8)]
    assert all(buffer is not None for buffer in buffers)
    for value, buffer in enumerate(buffers):
        assert buffer is not None
        buffer.data.fill_(value)
    for value, buffer in enumerate(buffers):
        assert buffer is not None
        assert torch.equal(buffer.data, torch.full((5000,), value, dtype=torch.uint8))


def _drop(held: list[object]) -> None:
    held.clear()
