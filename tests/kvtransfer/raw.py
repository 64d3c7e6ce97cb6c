"""Sockets that say what they are told to, where an end should be."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import zmq

from kvtransfer import wire
from kvtransfer.transport.zmq import Terms
from tests.kvtransfer.ends import DEADLINE_S, EPOCH, HEADS, ROW_BYTES

M = TypeVar("M")
SHAPES = (wire.Shape(2, HEADS, ROW_BYTES),)
"""Of the tests' default cache."""
ONE_LANE = msgspec.msgpack.encode(Terms(1))


class RawProducer:
    """A producer by hand; ``peer`` is the consumer that spoke last."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.peer = b""

    def expect(self, kind: type[M]) -> M:
        """The next message of this type; others are passed over."""
        while True:
            self.peer, frame, *_ = self._socket.recv_multipart()
            if isinstance(message := wire.decode_data(frame), kind):
                return message

    def welcome(self, transport: str = "zmq", data: bytes = ONE_LANE) -> wire.Hello:
        """Agree on a session with the next consumer that greets."""
        hello = self.expect(wire.Hello)
        self.say(wire.Welcome(hello.session, transport, data))
        return hello

    def answer_greetings(self) -> None:
        """Agree on a session with whoever has greeted; the rest of what was said is passed over."""
        while self._socket.poll(20):
            self.peer, frame, *_ = self._socket.recv_multipart()
            if isinstance(hello := wire.decode_data(frame), wire.Hello):
                self.say(wire.Welcome(hello.session, "zmq", ONE_LANE))

    def say(self, message: wire.Data, *payload: bytes) -> None:
        self.say_raw(wire.encode(message), *payload)

    def say_raw(self, *frames: bytes) -> None:
        self._socket.send_multipart([self.peer, *frames])

    def close(self) -> None:
        self._context.destroy(linger=0)


class RawConsumer:
    """A consumer by hand; it has begun a session unless ``greet`` is False."""

    def __init__(self, endpoint: str, *, greet: bool = True, offers: Sequence[str] = ("zmq",)) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
        self._socket.connect(endpoint)
        self.id = secrets.token_bytes(16)
        data = {"zmq": ONE_LANE, "shm": msgspec.msgpack.encode(os.getpid())}
        self.offers = tuple((name, data.get(name, b"")) for name in offers)
        if greet:
            self.greet(1)
            self.expect(wire.Welcome)

    def greet(self, session: int) -> None:
        self.say(wire.Hello(self.id, session, "raw", self.offers))

    def subscribe(self, key: wire.Key, sub: int, count: int, **changes: Any) -> None:
        """Ask for the prompt's first ``count`` blocks."""
        honest = wire.Subscribe(key, sub, EPOCH, (wire.Want(0, 0, count),), (0, HEADS), DEADLINE_S)
        self.say(msgspec.structs.replace(honest, **changes))

    def say(self, *messages: wire.Data) -> None:
        self.say_raw(*map(wire.encode, messages))

    def say_raw(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def hear(self) -> wire.Data:
        """The next message that is not just a sign of life."""
        while True:
            message = wire.decode_data(self._socket.recv_multipart()[0])
            if not isinstance(message, wire.Alive):
                return message

    def expect(self, kind: type[M]) -> M:
        """The next message, which is of this type."""
        message = self.hear()
        assert isinstance(message, kind), message
        return message

    def signs_of_life(self, seconds: float) -> int:
        """How often it is looked after in so long, in which nothing else comes."""
        until, found = time.monotonic() + seconds, 0
        while (left := until - time.monotonic()) > 0:
            if self._socket.poll(int(left * 1000)):
                assert isinstance(wire.decode_data(self._socket.recv_multipart()[0]), wire.Alive)
                found += 1
        return found

    def hears_nothing(self, seconds: float) -> bool:
        """Whether nothing but signs of life comes for so long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._socket.poll(int(left * 1000)) and not isinstance(
                wire.decode_data(self._socket.recv_multipart()[0]), wire.Alive
            ):
                return False
        return True

    def close(self) -> None:
        self._context.destroy(linger=0)
