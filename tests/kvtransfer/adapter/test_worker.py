"""The end in an engine's worker, where it can't be made."""

from __future__ import annotations

import gc
import socket
from typing import Any

import pytest
import torch

from kvtransfer.adapter import worker
from kvtransfer.adapter.options import Options
from kvtransfer.adapter.worker import WorkerSide
from kvtransfer.cache import Group, HostCache
from kvtransfer.transport.select import consumer_transports, producer_transports

SHAPE = (4, 2, 32, 8)


def options(role: str, bind: str) -> Options:
    return Options(
        role=role,
        control="ipc:///nobody/is/there",
        kv_bind=bind,
        name="p",
        epoch=1,
        transports=("zmq",),
        staging_bytes=1 << 20,
        piece_bytes=1 << 16,
    )


@pytest.mark.timeout(20)
def test_an_address_that_is_taken_is_an_error_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose worker waits in the collection of a ZMQ context never ends."""
    monkeypatch.setattr(worker, "get_tensor_model_parallel_rank", lambda: 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        taken_too = options("prefill", f"tcp://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(OSError, match=r"can't be served on .* \(Address already in use\).*--kv-bind"):
            WorkerSide(taken_too, [Group([torch.zeros(SHAPE)], 2)], 32)
    gc.collect()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_transports_are_told_which_device_the_cache_is_on(monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    """A process group between GPUs was one of Gloo's, as nobody said that they were GPUs."""
    told = []

    def producer(names: Any, **where: str) -> Any:
        told.append(where["device"])
        return producer_transports(("zmq",))

    def consumer(names: Any, lanes: int, **where: str) -> Any:
        told.append(where["device"])
        return consumer_transports(("zmq",))

    monkeypatch.setattr(worker, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(worker, "_cache", lambda groups: HostCache([Group([torch.zeros(SHAPE)], 2)]))
    monkeypatch.setattr(worker, "producer_transports", producer)
    monkeypatch.setattr(worker, "consumer_transports", consumer)
    elsewhere = Group([torch.zeros(SHAPE, device="meta")], 2)
    WorkerSide(options(role, "tcp://127.0.0.1:*"), [elsewhere], 32).close()
    assert told == ["meta"]
