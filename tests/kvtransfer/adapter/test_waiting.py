"""Readers of vLLM's shared-memory queues sleep until something is written."""

from __future__ import annotations

import ctypes
import mmap
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from kvtransfer.adapter import futex
from kvtransfer.adapter.guards import ease_waiting
from kvtransfer.rows import address_of

LONG_S = 60.0
"""A sleep that only a wake ends in time."""


@pytest.fixture
def word() -> ctypes.c_uint32:
    memory = mmap.mmap(-1, 4096)
    return ctypes.c_uint32.from_buffer(memory)


def test_a_word_that_has_changed_is_not_waited_for(word: ctypes.c_uint32) -> None:
    word.value = 7
    at = ctypes.addressof(word)
    assert futex.value(at) == 7
    futex.wait(at, 6, LONG_S)


def test_a_wait_has_a_limit(word: ctypes.c_uint32) -> None:
    futex.wait(ctypes.addressof(word), 0, 0.01)


def test_an_address_without_memory_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad address"):
        futex.wait(4096, 0, 0.01)


def test_a_wake_ends_the_waits_of_all(word: ctypes.c_uint32) -> None:
    at = ctypes.addressof(word)
    with ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(until_changed, at) for _ in range(3)]
        word.value = 1
        while not all(wait.done() for wait in waits):
            futex.wake(at)
            time.sleep(0.001)


def until_changed(at: int) -> None:
    while futex.value(at) == 0:
        futex.wait(at, 0, LONG_S)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Both ends of a queue with two readers, which look again after :data:`LONG_S` only."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

    for owner, name in (
        (MessageQueue, "acquire_read"),
        (MessageQueue, "acquire_write"),
        (SpinCondition, "wait"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    ease_waiting(look_s=LONG_S)
    writer = MessageQueue(2, 2, max_chunk_bytes=1024, max_chunks=4)
    readers = [MessageQueue.create_from_handle(writer.export_handle(), rank) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        ready = [pool.submit(reader.wait_until_ready) for reader in readers]
        writer.wait_until_ready()
        for one in ready:
            one.result()
    yield SimpleNamespace(writer=writer, readers=readers)
    for end in (writer, *readers):
        end.shutdown()


@pytest.mark.slow
def test_messages_arrive_in_order_and_waiting_for_them_takes_no_core(queue: SimpleNamespace) -> None:
    def read(reader: object) -> tuple[list[int], float, float]:
        busy, since = time.thread_time(), time.monotonic()
        found = [reader.dequeue(timeout=LONG_S / 2) for _ in range(40)]  # type: ignore[attr-defined]
        return found, time.thread_time() - busy, time.monotonic() - since

    with ThreadPoolExecutor(2) as pool:
        reads = [pool.submit(read, reader) for reader in queue.readers]
        for number in range(40):
            threading.Event().wait(0.02)  # a step
            queue.writer.enqueue(number)
        for found, busy, wall in (one.result() for one in reads):
            assert found == list(range(40))
            assert busy < wall / 4


@pytest.mark.slow
def test_a_queues_words_lie_on_its_flags(queue: SimpleNamespace) -> None:
    from kvtransfer.adapter.guards import _flag

    ring = queue.readers[0].buffer
    start = address_of(ring.shared_memory.buf)
    for index in range(4):
        flag = start + ring.metadata_offset + index * ring.metadata_size
        assert _flag(ring, index) in range(flag - 3, flag + 1)
        assert _flag(ring, index) % 4 == 0


EXCHANGE = """
import gc
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from braid.heap import allocated
from kvtransfer.adapter.guards import read_pings
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

if sys.argv[1] == "True":
    read_pings(every_s=0.1)
writer = MessageQueue(1, 1, max_chunk_bytes=1024, max_chunks=4)
reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
with ThreadPoolExecutor(1) as pool:
    ready = pool.submit(reader.wait_until_ready)
    writer.wait_until_ready()
    ready.result()

def exchange(messages):
    for number in range(messages):
        writer.enqueue(number)
        assert reader.dequeue(timeout=60) == number
        time.sleep(0.001)
    gc.collect()
    return allocated().in_use

before = exchange(500)
print(exchange(4000) - before)
for end in (writer, reader):
    end.shutdown()
"""


def kept_of_4000_messages(pings_are_read: bool) -> int:
    """Bytes by which a process has grown that reads a message at least once a second."""
    command = [sys.executable, "-c", EXCHANGE, str(pings_are_read)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is in use is not told")
def test_announcements_of_messages_that_have_been_read_are_not_kept() -> None:
    """The EngineCore of a prefill worker grew by 2 MiB an hour."""
    assert kept_of_4000_messages(pings_are_read=True) < kept_of_4000_messages(pings_are_read=False) / 4
