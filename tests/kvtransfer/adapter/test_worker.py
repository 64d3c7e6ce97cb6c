"""The end in an engine's worker, where it can't be made."""

from __future__ import annotations

import gc
import socket

import pytest
import torch

from kvtransfer.adapter import worker
from kvtransfer.adapter.options import Options
from kvtransfer.adapter.worker import WorkerSide
from kvtransfer.cache import Group


@pytest.mark.timeout(20)
def test_an_address_that_is_taken_is_an_error_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose worker waits in the collection of a ZMQ context never ends."""
    monkeypatch.setattr(worker, "get_tensor_model_parallel_rank", lambda: 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = Options(
            role="prefill",
            control="ipc:///nobody/is/there",
            kv_bind=f"tcp://127.0.0.1:{taken.getsockname()[1]}",
            name="p",
            epoch=1,
            transports=("zmq",),
            staging_bytes=1 << 20,
            piece_bytes=1 << 16,
        )
        with pytest.raises(OSError, match=r"can't be served on .* \(Address already in use\).*--kv-bind"):
            WorkerSide(options, [Group([torch.zeros(4, 2, 32, 8)], 2)], 32)
    gc.collect()
