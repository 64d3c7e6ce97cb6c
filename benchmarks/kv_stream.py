"""A bare stream of ZMQ frames that nobody looks at, the ceiling of a transport over ZMQ.

The frames are as large as the transport's pieces and are sent without a copy, from memory that is as large
as the contenders' pools; the receiver drops them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zmq

from benchmarks.kv_layout import Evictor, layout_of, now
from kvtransfer.plan import pieces


class Sender:
    """Binds and sends; the receiver connects, as a consumer does to its producer."""

    def __init__(self, layout: dict[str, int]) -> None:
        self._layout = layout_of(layout)
        self._memory = np.full((self._layout.blocks, self._layout.block_bytes), 1, np.uint8)
        self._frames: Any = self._memory  # pyzmq takes any buffer
        self._evictor = Evictor()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.bind("tcp://127.0.0.1:*")

    def endpoint(self) -> dict[str, Any]:
        return {"endpoint": self._socket.getsockopt_string(zmq.LAST_ENDPOINT)}

    def send(self, first: int, count: int) -> dict[str, Any]:
        """Send the bytes of `count` blocks from block `first` on; when it began.

        Another thread sends than the one that has swept the caches of its core, as in a transfer.
        """
        runs = pieces(first, first + count, self._layout.block_bytes, self._layout.piece_bytes)
        swept = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(self._stream, swept, runs)
            self._evictor.evict()
            swept.set()
            return {"start": sent.result()}

    def _stream(self, swept: threading.Event, runs: Sequence[range]) -> float:
        swept.wait()
        start = now()
        for run in runs:
            self._socket.send(self._frames[run.start : run.stop], copy=False)
        return start

    def close(self) -> None:
        self._context.destroy(linger=0)


class Receiver:
    """Takes frames as they come."""

    def __init__(self, layout: dict[str, int], endpoint: str) -> None:
        self._layout = layout_of(layout)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 64)
        self._socket.connect(endpoint)

    def receive(self, count: int) -> dict[str, Any]:
        """Wait for the bytes of `count` blocks; when the last frame was here."""
        left = count * self._layout.block_bytes
        while left > 0:
            left -= len(self._socket.recv(copy=False))
        return {"end": now()}

    def close(self) -> None:
        self._context.destroy(linger=0)
