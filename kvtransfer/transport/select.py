"""Which transports an end has, by name, in order of preference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvtransfer.transport import ConsumerSide, ConsumerTransport, ProducerSide, ProducerTransport
from kvtransfer.transport.collective import CollectiveConsumer, CollectiveProducer
from kvtransfer.transport.group import backend_of
from kvtransfer.transport.nixl import NixlConsumer, NixlProducer
from kvtransfer.transport.shm import ShmConsumer, ShmProducer
from kvtransfer.transport.zmq import ZmqConsumer, ZmqProducer

NAMES = ("shm", "nixl", "collective", "zmq")
"""All transports; those of one host first, and the one that always works last."""


def producer_transports(
    names: Sequence[str], *, bind: str = "127.0.0.1", device: str = "cpu"
) -> Callable[[ProducerSide], list[ProducerTransport]]:
    """What :class:`kvtransfer.producer.Producer` takes as ``transports``.

    ``bind`` and ``device`` are those of ``collective``: the address its groups listen on, and where its
    tensors lie ("cpu" or a CUDA device).
    """
    makers: dict[str, Callable[[ProducerSide], ProducerTransport]] = {
        "shm": lambda side: ShmProducer(side.socket, side.arena),
        "nixl": NixlProducer,
        "collective": lambda side: CollectiveProducer(side, backend_of(device, bind)),
        "zmq": lambda side: ZmqProducer(side.socket),
    }
    _check(names)
    return lambda side: [makers[name](side) for name in names]


def consumer_transports(
    names: Sequence[str], lanes: int = 1, *, bind: str = "127.0.0.1", device: str = "cpu"
) -> Callable[[ConsumerSide], list[ConsumerTransport]]:
    """What :class:`kvtransfer.consumer.Consumer` takes as ``transports``; ``lanes`` are those of ``zmq``,
    ``bind`` and ``device`` as above."""
    makers: dict[str, Callable[[ConsumerSide], ConsumerTransport]] = {
        "shm": lambda side: ShmConsumer(),
        "nixl": NixlConsumer,
        "collective": lambda side: CollectiveConsumer(side, backend_of(device, bind)),
        "zmq": lambda side: ZmqConsumer(side.consumer, lanes, side.connect),
    }
    _check(names)
    return lambda side: [makers[name](side) for name in names]


def _check(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ValueError(f"unknown transports {unknown}: choose from {', '.join(NAMES)}")
