"""KV messages: between the two ends (data plane) and between a server and its engine's workers.

MessagePack of msgspec tagged structs, unknown fields refused, sizes capped.

Data plane, one ZMQ DEALER (consumer) to ROUTER (producer) connection a rank pair, the *control lane*. How the
bytes of blocks travel is the transport's (:mod:`kvtransfer.transport`), agreed once a connection::

    consumer                         producer
    Hello(offers)      ------------>             after each (re)connection; a new session replaces the old one
              <------------ Welcome(transport)
    Subscribe(wants)   ------------>             any time after that, also before the producer knows the key
              <------------ Manifest             as soon as the prompt is admitted: "started"
              <------------ Blocks               as blocks are finished; the payload comes by the transport
    Ack                ------------>             bytes taken, the window moves on
    Done               ------------>             all blocks are in the cache; the lease may end
    Drop               ------------>             no longer wanted (idempotent)
    Alive              ------------>             still waiting; extends the lease
              <------------ Refused(reason)      never anything after it for this subscription

A subscription is one key, one producer rank, one range of heads; ``sub`` numbers are the consumer's and never
used again, so what is late for one can't be taken for another's.
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


class Want(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Blocks ``[first, first + count)`` of a prompt in one KV cache group."""

    group: int
    first: int
    count: int


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A block of one KV cache group as it travels: ``layers x heads`` rows of ``row_bytes`` on this rank.

    A row is what one head of one layer keeps for the tokens of a block, keys and values; encoded if the
    manifest names a codec.
    """

    layers: int
    heads: int
    row_bytes: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers and heads."""
        return self.layers * self.heads * self.row_bytes


class Hello(_Msg, frozen=True, tag="hello"):
    """``consumer``: 16 random bytes of this consumer's life. ``offers``: (transport, what it needs to be
    told) in order of preference."""

    consumer: bytes
    session: int
    name: str
    offers: tuple[tuple[str, bytes], ...]


class Welcome(_Msg, frozen=True, tag="welcome"):
    """The transport of this session, and what the consumer needs to be told to open its side."""

    session: int
    transport: str
    data: bytes


class Lane(_Msg, frozen=True, tag="lane"):
    """First message on a further connection of a session, see :mod:`kvtransfer.transport.zmq`."""

    consumer: bytes
    session: int


class Rendezvous(_Msg, frozen=True, tag="meet"):
    """Either way, from one half of a transport to the other: what it needs to be told to connect."""

    session: int
    name: str
    value: bytes


class Subscribe(_Msg, frozen=True, tag="sub"):
    """``epoch``: the producer's, from the ticket. ``heads``: range of the producer rank's heads.

    ``deadline_s``: the consumer counts no block that comes later than this after the subscription was
    sent, so the producer may use the memory again then, whether or not it hears from the consumer. 0 to
    600. ``wants``: one run a group.
    """

    key: Key
    sub: int
    epoch: int
    wants: tuple[Want, ...]
    heads: tuple[int, int]
    deadline_s: float


class Manifest(_Msg, frozen=True, tag="man"):
    """What will be sent: ``tokens`` of the prompt, its block-hash ``chain``, the ``fingerprint`` of the
    model and cache layout, the ``shapes`` of this rank's groups and the ``codec`` of rows ("" for none)."""

    sub: int
    epoch: int
    tokens: int
    chain: bytes
    fingerprint: str
    shapes: tuple[Shape, ...]
    codec: str = ""


class Blocks(_Msg, frozen=True, tag="blk"):
    """Blocks ``[first, first + count)`` of a group, shape ``[layers, count, heads, row_bytes]``, C order.

    ``at``, ``skip``, ``of`` and ``heads`` are for transports whose consumer reads the producer's staging
    itself (else 0, but that ``collective`` numbers parcels by ``at``): at ``at`` lie ``of`` blocks, of which
    ``first`` is the one after ``skip``, with all ``heads`` of the producer's rank. ``digest``: xxh3-64 of the
    payload as it lies in staging, 0 if not computed.
    """

    sub: int
    group: int
    first: int
    count: int
    nbytes: int
    at: int = 0
    skip: int = 0
    of: int = 0
    heads: int = 0
    digest: int = 0


class Ack(_Msg, frozen=True, tag="ack"):
    """The consumer has taken ``nbytes`` more of this session's payload out of the transport."""

    session: int
    nbytes: int


class Done(_Msg, frozen=True, tag="done"):
    key: Key
    sub: int


class Drop(_Msg, frozen=True, tag="drop"):
    key: Key
    sub: int


class Alive(_Msg, frozen=True, tag="alive"):
    keys: tuple[Key, ...]


class Refused(_Msg, frozen=True, tag="ref"):
    """``sub`` 0: the session itself; the consumer says ``Hello`` again."""

    sub: int
    reason: str


class Open(_Msg, frozen=True, tag="open"):
    """Server to producer: reserve staging for a prompt. ``spans``: the blocks of each group that will be
    staged, one run a group; ``subscribers`` consumers will pull."""

    key: Key
    tokens: int
    chain: bytes
    fingerprint: str
    spans: tuple[Want, ...]
    subscribers: int


class Opened(_Msg, frozen=True, tag="opened"):
    """Producer to server: staging is reserved, the prompt may be submitted."""

    key: Key


class Close(_Msg, frozen=True, tag="close"):
    """Server to producer: end the lease now (idempotent)."""

    key: Key
    reason: str


class Closed(_Msg, frozen=True, tag="closed"):
    """Producer to server: the lease has ended (done | expired | copy_failed | what Close said), or was
    refused (another reason; of ``key is in use`` the lease there was goes on).

    ``sent``: bytes given to transports; ``early``: of those, before the last blocks were computed.
    """

    key: Key
    reason: str
    sent: int = 0
    early: int = 0


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Cache blocks of one group that take the prompt's blocks from ``first`` on."""

    group: int
    first: int
    block_ids: tuple[int, ...]


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One producer rank of a load: its heads ``[first, last)`` become this rank's from ``put`` on."""

    endpoint: str
    epoch: int
    first: int
    last: int
    put: int


class Load(_Msg, frozen=True, tag="load"):
    """Server to consumer: fetch these blocks of ``key`` into these cache blocks, from every source.

    Until ``Loaded`` or ``Failed`` the consumer owns the cache blocks; after either it never writes them (but
    ``Failed(duplicate)`` answers a second load of a key, and the first goes on). ``spans``: one a group, of
    blocks but block 0. ``deadline_s``: at most 600.
    ``block_size``: tokens of the producer's blocks, 0 if unknown: of this engine's size.
    """

    key: Key
    sources: tuple[Source, ...]
    fingerprint: str
    tokens: int
    chain: bytes
    spans: tuple[Span, ...]
    deadline_s: float
    block_size: int = 0


class Hold(_Msg, frozen=True, tag="hold"):
    """Server to consumer: a load of ``key`` will come from these producers; say that it waits, so that they
    keep the lease. No endpoints: say so no longer. Not answered."""

    key: Key
    endpoints: tuple[str, ...]


class Unload(_Msg, frozen=True, tag="unload"):
    """Server to consumer: stop. Always answered by ``Failed``, also if the load had ended before."""

    key: Key
    reason: str


class Loaded(_Msg, frozen=True, tag="loaded"):
    """``nbytes`` moved for ``blocks`` cache blocks over ``transport``. Seconds: ``wait_s`` from Load to the
    first block, ``wire_s`` from there to the last, ``scatter_s`` of that spent writing the cache;
    ``retries``: times the load was resumed."""

    key: Key
    nbytes: int
    blocks: int
    wait_s: float
    wire_s: float
    scatter_s: float
    transport: str
    retries: int


class Failed(_Msg, frozen=True, tag="failed"):
    """The load has ended without all its blocks, for a reason of those in docs/kvtransfer.md."""

    key: Key
    reason: str


class Ready(_Msg, frozen=True, tag="ready"):
    """A rank's end is up. ``layout`` names device and kernels, whose blocks look alike inside; ``shapes`` are
    the cache's groups on this rank; ``endpoint`` is the producer's, else empty."""

    rank: int
    layout: str
    shapes: tuple[Shape, ...]
    endpoint: str


class Stat(_Msg, frozen=True, tag="stat"):
    """Asks for ``Stats``."""


class Stats(_Msg, frozen=True, tag="stats"):
    """Producer: ``staging_bytes`` reserved, ``leases`` held, ``pending`` ones and subscriptions without one.
    Consumer: ``loads`` in flight or announced."""

    staging_bytes: int = 0
    leases: int = 0
    pending: int = 0
    loads: int = 0


Data = (
    Hello | Welcome | Lane | Rendezvous | Subscribe | Manifest | Blocks | Ack | Done | Drop | Alive | Refused
)
Command = Open | Close | Load | Hold | Unload | Stat
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
