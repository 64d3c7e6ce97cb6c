"""Options that all KV sockets share."""

from __future__ import annotations

import zmq

HEARTBEAT_S = 2.0
"""Interval of ZMQ's own pings."""
SILENT_S = 8.0
"""A connection without an answer for this long is closed: a blackholed peer is a lost one."""


def new_context() -> zmq.Context[zmq.Socket[bytes]]:
    """A context for as many sockets as ZMQ can have.

    A connection takes three, so 341 of them use up the 1,023 that a context has as it comes.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, int(context.get(zmq.SOCKET_LIMIT)))
    return context


def set_heartbeat(socket: zmq.Socket[bytes]) -> None:
    """Notice a peer that is stopped or cut off though its connection looks open.

    ZMQ pings only where nothing else waits to be sent; what waits is TCP's to give up on.
    """
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(HEARTBEAT_S * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(SILENT_S * 1000))
    socket.setsockopt(zmq.TCP_MAXRT, int(SILENT_S * 1000))


def receive_frames(socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """The frames of one message, which hold their bytes uncopied. Raises ``zmq.Again`` if there is none.

    The same as ``recv_multipart``, without asking the socket after each frame whether there is one more.
    """
    frame = socket.recv(zmq.NOBLOCK, copy=False)
    frames = [frame]
    while frame.more:
        frame = socket.recv(copy=False)
        frames.append(frame)
    return frames
