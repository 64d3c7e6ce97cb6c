"""KV messages: between the two ends (data plane) and between a server and its engine's workers.

MessagePack of msgspec tagged structs, unknown fields refused, sizes capped. A ``Blocks`` message is
followed by one payload frame in the same multipart.

Data plane, one ZMQ DEALER (consumer) to ROUTER (producer) connection a rank pair::

    consumer                         producer
    Subscribe(have=k)  ------------>             any time, also before the producer knows the key
              <------------ Manifest             as soon as the prompt is admitted: "started"
              <------------ Blocks + payload     as blocks are finished, in order, from block k
    Done               ------------>             all blocks are in the cache; the lease may end
    Drop               ------------>             no longer wanted (idempotent)
    Alive              ------------>             still waiting; extends the lease
              <------------ Refused(reason)      never anything after it for this key
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

_T = TypeVar("_T")

MAX_MESSAGE = 4 * 1024 * 1024
"""Upper bound of a message frame (not of a payload) in bytes."""
MAX_PAYLOAD = 64 * 1024 * 1024
"""Upper bound of a payload frame in bytes."""


class KvWireError(ValueError):
    """A frame that is not one of these messages."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names one prompt's KV: the ticket's 16-byte id, its attempt, and the prompt's number in the body."""

    id: bytes
    attempt: int
    part: int = 0


class _Msg(msgspec.Struct, tag_field="t", frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all messages."""


class Subscribe(_Msg, frozen=True, tag="sub"):
    """``have``: leading blocks the consumer already holds. ``epoch``: the producer's, from the ticket."""

    key: Key
    epoch: int
    subscriber: str
    have: int


class Manifest(_Msg, frozen=True, tag="man"):
    """What will be sent: ``tokens`` of the prompt, its block-hash ``chain``, the ``fingerprint`` of the
    model and cache layout, ``block_bytes`` of one block over all layers of this rank."""

    key: Key
    epoch: int
    tokens: int
    chain: bytes
    fingerprint: str
    block_bytes: int


class Blocks(_Msg, frozen=True, tag="blk"):
    """Payload: blocks ``[first, first + count)``, shape ``[layers, count, bytes]``, C order."""

    key: Key
    first: int
    count: int


class Done(_Msg, frozen=True, tag="done"):
    key: Key


class Drop(_Msg, frozen=True, tag="drop"):
    key: Key


class Alive(_Msg, frozen=True, tag="alive"):
    keys: tuple[Key, ...]


class Refused(_Msg, frozen=True, tag="ref"):
    key: Key
    reason: str


class Open(_Msg, frozen=True, tag="open"):
    """Server to producer: reserve staging for a prompt; ``subscribers`` consumers will pull."""

    key: Key
    tokens: int
    blocks: int
    chain: bytes
    fingerprint: str
    subscribers: int


class Opened(_Msg, frozen=True, tag="opened"):
    """Producer to server: staging is reserved, the prompt may be submitted."""

    key: Key


class Close(_Msg, frozen=True, tag="close"):
    """Server to producer: end the lease now (idempotent)."""

    key: Key
    reason: str


class Closed(_Msg, frozen=True, tag="closed"):
    """Producer to server: the lease has ended; ``reason`` is done | expired | what Close said."""

    key: Key
    reason: str


class Load(_Msg, frozen=True, tag="load"):
    """Server to consumer: fetch blocks ``[first, first + len(block_ids))`` of ``key`` into these cache
    blocks. Until ``Loaded`` or ``Failed`` the consumer owns them; after either it never writes them."""

    key: Key
    endpoint: str
    epoch: int
    fingerprint: str
    tokens: int
    chain: bytes
    first: int
    block_ids: tuple[int, ...]
    deadline_s: float


class Unload(_Msg, frozen=True, tag="unload"):
    """Server to consumer: stop. Always answered by ``Failed``, also if the load had ended before."""

    key: Key
    reason: str


class Loaded(_Msg, frozen=True, tag="loaded"):
    """``wait_s``: from Load to the first block; ``wire_s``: from the first block to the last."""

    key: Key
    nbytes: int
    blocks: int
    wait_s: float
    wire_s: float


class Failed(_Msg, frozen=True, tag="failed"):
    key: Key
    reason: str


class Ready(_Msg, frozen=True, tag="ready"):
    """A rank's end is up. ``layout`` describes its cache; ``endpoint`` is the producer's, else empty."""

    rank: int
    layout: str
    block_bytes: int
    endpoint: str


class Stat(_Msg, frozen=True, tag="stat"):
    """Asks for ``Stats``."""


class Stats(_Msg, frozen=True, tag="stats"):
    """``staging_bytes`` reserved, ``leases`` held (producer); ``loads`` in flight (consumer)."""

    staging_bytes: int = 0
    leases: int = 0
    pending: int = 0
    loads: int = 0


Data = Subscribe | Manifest | Blocks | Done | Drop | Alive | Refused
Command = Open | Close | Load | Unload | Stat
Event = Ready | Opened | Closed | Loaded | Failed | Stats

_encoder = msgspec.msgpack.Encoder()
_data: msgspec.msgpack.Decoder[Data] = msgspec.msgpack.Decoder(Data)
_command: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_event: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(message: Data | Command | Event) -> bytes:
    """One message as one frame."""
    return _encoder.encode(message)


def decode_data(frame: bytes) -> Data:
    """Decode a data-plane frame; raises :class:`KvWireError` on anything else."""
    return _decode(_data, frame)


def decode_command(frame: bytes) -> Command:
    """Decode a server's command; raises :class:`KvWireError`."""
    return _decode(_command, frame)


def decode_event(frame: bytes) -> Event:
    """Decode a worker's event; raises :class:`KvWireError`."""
    return _decode(_event, frame)


def _decode(decoder: msgspec.msgpack.Decoder[_T], frame: bytes) -> _T:
    if len(frame) > MAX_MESSAGE:
        raise KvWireError(f"message of {len(frame)} bytes is over the cap of {MAX_MESSAGE}")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KvWireError(str(error)) from None
