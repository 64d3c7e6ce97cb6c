"""How the two ends of the router's link find out that the other is gone.

Two limits, because two things can be wrong. A process that is killed, stopped or cut off answers nothing:
ZMQ's own pings are answered by its I/O thread, so they find that out within ``heartbeat_misses`` heartbeats,
however busy either side's event loop is, and close the connection. A process whose event loop hangs still
answers those; it is gone once none of its own messages has come for ``hang_s``.
"""

from __future__ import annotations

from typing import Any

import zmq

_SHORTEST_MS = 50


def watch_connection(socket: zmq.Socket[Any], heartbeat_s: float, misses: int) -> None:
    """Have ZMQ close a connection over which nothing came for ``misses`` heartbeats.

    Call it before ``bind`` or ``connect``. Queues get no limit: a reader whose loop is busy would else stop
    its I/O thread at a full queue, and with it the answers to pings."""
    interval = max(_SHORTEST_MS, int(heartbeat_s * 1000))
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, interval)
    # A ping is due up to one interval after the last word, and the limit counts from it.
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, interval * (misses - 1))


def is_connected(socket: zmq.Socket[Any]) -> bool:
    """Whether a socket with ``IMMEDIATE`` and without a send limit has a peer now."""
    return bool(int(socket.get(zmq.EVENTS)) & zmq.POLLOUT)
