"""Which transports an end has, by name, in order of preference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import zmq

from kvtransfer.arena import Arena
from kvtransfer.transport import ConsumerTransport, ProducerTransport
from kvtransfer.transport.shm import ShmConsumer, ShmProducer
from kvtransfer.transport.zmq import ZmqConsumer, ZmqProducer

NAMES = ("shm", "zmq")
"""All transports; those of one host first, and the one that always works last."""

Socket = zmq.Socket[bytes]
Connect = Callable[[str], tuple[Socket, Callable[[], None]]]


def producer_transports(names: Sequence[str]) -> Callable[[Socket, Arena], list[ProducerTransport]]:
    """What :class:`kvtransfer.producer.Producer` takes as ``transports``."""
    makers: dict[str, Callable[[Socket, Arena], ProducerTransport]] = {
        "shm": ShmProducer,
        "zmq": lambda socket, arena: ZmqProducer(socket),
    }
    _check(names)
    return lambda socket, arena: [makers[name](socket, arena) for name in names]


def consumer_transports(
    names: Sequence[str], lanes: int = 1
) -> Callable[[bytes, Connect], list[ConsumerTransport]]:
    """What :class:`kvtransfer.consumer.Consumer` takes as ``transports``; ``lanes`` are those of ``zmq``."""
    makers: dict[str, Callable[[bytes, Connect], ConsumerTransport]] = {
        "shm": lambda consumer, connect: ShmConsumer(),
        "zmq": lambda consumer, connect: ZmqConsumer(consumer, lanes, connect),
    }
    _check(names)
    return lambda consumer, connect: [makers[name](consumer, connect) for name in names]


def _check(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ValueError(f"unknown transports {unknown}: choose from {', '.join(NAMES)}")
