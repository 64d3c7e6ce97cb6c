"""Messages that are nearly right, by the hundred: at the decoders, a live producer and a live consumer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtransfer import wire
from tests.kvtransfer.ends import BLOCK_BYTES, EPOCH, HEADS, Pair, make_key, same
from tests.kvtransfer.raw import ONE_LANE, SHAPES, RawConsumer, RawProducer

KEY, OTHER = make_key(), make_key(2)
OURS = (1, 2)
live = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

small = st.one_of(st.integers(-1, 4), st.sampled_from([2**31, 2**62, 2**63 - 1, 2**64 - 1, -(2**63)]))
keys = st.one_of(st.sampled_from([KEY, OTHER]), st.builds(wire.Key, st.binary(max_size=20), small, small))
texts = st.sampled_from(["", "zmq", "shm", "no_session", "no_transport", "x" * 1000])
datas = st.sampled_from([b"", ONE_LANE, b"\x81\xa5lanes\xff", b"\xff" * 40])
wants = st.lists(st.builds(wire.Want, small, small, small), max_size=3).map(tuple)
shapes = st.one_of(
    st.just(SHAPES), st.lists(st.builds(wire.Shape, small, small, small), max_size=3).map(tuple)
)
heads = st.one_of(st.just((0, HEADS)), st.tuples(small, small))
seconds = st.sampled_from([1.0, 0.0, -1.0, float("nan"), float("-inf")])
epochs = st.sampled_from([EPOCH, EPOCH, EPOCH + 1])
MESSAGES: list[st.SearchStrategy[wire.Data]] = [
    st.builds(
        wire.Hello,
        st.binary(max_size=17),
        small,
        texts,
        st.lists(st.tuples(texts, datas), max_size=3).map(tuple),
    ),
    st.builds(wire.Welcome, small, texts, datas),
    st.builds(wire.Lane, st.binary(max_size=17), small),
    st.builds(wire.Rendezvous, small, texts, datas),
    st.builds(wire.Subscribe, keys, small, epochs, wants, heads, seconds),
    st.builds(
        wire.Manifest,
        small,
        epochs,
        st.just(8),
        st.just(b"chain"),
        st.just("fp"),
        shapes,
        st.sampled_from(["", "q"]),
    ),
    st.builds(
        wire.Blocks,
        *[small] * 4,
        st.one_of(small, st.just(BLOCK_BYTES)),
        at=small,
        skip=small,
        of=small,
        heads=small,
        digest=small.filter(lambda n: n >= 0),
    ),
    st.builds(wire.Ack, small, small),
    st.builds(wire.Done, keys, small),
    st.builds(wire.Drop, keys, small),
    st.builds(wire.Alive, st.lists(keys, max_size=3).map(tuple)),
    st.builds(wire.Refused, small, texts),
]
messages = st.one_of(MESSAGES)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message with bytes changed, cut out, put in or doubled; or as it is."""
    frame = bytearray(wire.encode(draw(messages)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(frame) - 1)))
        to = draw(st.integers(at, len(frame)))
        match draw(st.sampled_from(["flip", "cut", "insert", "double", "end"])):
            case "flip" if frame:
                frame[at] ^= draw(st.integers(1, 255))
            case "cut":
                del frame[at : at + 3]
            case "insert":
                frame[at:at] = draw(st.binary(max_size=9))
            case "double":
                frame[at:at] = frame[at:to]
            case "end":
                del frame[at:]
    return bytes(frame)


@given(damaged())
def test_a_decoder_gives_a_message_or_refuses(frame: bytes) -> None:
    for decode in (wire.decode_data, wire.decode_command, wire.decode_event):
        try:
            decode(frame)
        except wire.KvWireError:
            continue


def works(pair: Pair, key: wire.Key) -> None:
    pair.p.open(key, 2)
    pair.p.publish(key, 0, [6, 7])
    pair.d.load(key, pair.endpoint, (8, 9))
    pair.d.events.expect(wire.Loaded, key)
    assert same(pair.p.cache, [6, 7], pair.d.cache, [8, 9])


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_a_live_producer_survives(make_pair: Callable[..., Pair], transport: str) -> None:
    pair = make_pair(transports=[transport], lease_s=1000.0)
    for key in (KEY, OTHER):
        pair.p.open(key, 4, subscribers=100)
    pair.p.publish(KEY, 0, [1, 2, 3, 4])
    stranger = RawConsumer(pair.endpoint, offers=(transport,))

    @live
    @given(st.lists(damaged(), min_size=1, max_size=5))
    def throw(frames: list[bytes]) -> None:
        stranger.say_raw(*frames)

    throw()
    pair.p.publish(OTHER, 0, [1])
    works(pair, make_key(7))
    stranger.close()
    for key in (KEY, OTHER):
        pair.p.call(lambda key=key: pair.p.end.end(key, "over"))  # type: ignore[misc]
    pair.p.settle()


def test_a_live_consumer_survives(pair: Pair) -> None:
    raw = RawProducer()
    pair.d.load(make_key(3), raw.endpoint, OURS)
    raw.welcome()
    first = raw.expect(wire.Subscribe).sub
    pair.d.unload(make_key(3))
    loads = 0

    @live
    @given(st.lists(st.tuples(damaged(), st.sampled_from([b"", bytes(BLOCK_BYTES)])), min_size=1, max_size=5))
    def throw(frames: list[tuple[bytes, bytes]]) -> None:
        nonlocal loads
        loads += 1
        key = wire.Key(KEY.id, loads)
        while not pair.d.call(lambda: pair.d.end._peer(raw.endpoint).up):
            raw.answer_greetings()  # what was thrown before has ended the session, or the connection
        pair.d.end._subs = iter(range(1, 5))  # type: ignore[assignment]
        pair.d.load(key, raw.endpoint, OURS)
        for frame, payload in frames:
            raw.say_raw(frame, payload)
        pair.d.unload(key)
        assert len(pair.d.events.of(wire.Failed, key) + pair.d.events.of(wire.Loaded, key)) >= 1

    assert first == 1
    throw()
    pair.d.end._subs = iter(range(10**6, 2 * 10**6))  # type: ignore[assignment]
    works(pair, make_key(7))
    pair.d.settle()
    pair.d.call(pair.d.end.check_integrity)
    raw.close()
