"""Messages between router and workers: what is understood, and that nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid import wire

Decode = Callable[[bytes], Any]
DECODERS: list[tuple[Any, Decode]] = [
    (wire.FromWorker, wire.decode_from_worker),
    (wire.ToWorker, wire.decode_to_worker),
]
st.register_type_strategy(int, st.integers(-(2**63), 2**63 - 1))
st.register_type_strategy(float, st.floats(allow_nan=False))
messages = {union: st.one_of([st.from_type(kind) for kind in get_args(union)]) for union, _ in DECODERS}
any_decoder = pytest.mark.parametrize(("union", "decode"), DECODERS, ids=["from worker", "to worker"])


@any_decoder
@given(data=st.data())
def test_every_message_round_trips(union: Any, decode: Decode, data: st.DataObject) -> None:
    message = data.draw(messages[union])
    told = wire.encode(message)  # compared as bytes: a damaged number may be NaN, which equals nothing
    assert wire.encode(decode(told)) == told


@any_decoder
@given(frame=st.binary(max_size=200))
def test_random_bytes_are_refused_cleanly(union: Any, decode: Decode, frame: bytes) -> None:
    _decodes_or_refuses(decode, frame)


@any_decoder
@given(data=st.data())
def test_damaged_messages_are_refused_cleanly(union: Any, decode: Decode, data: st.DataObject) -> None:
    frame = wire.encode(data.draw(messages[union]))
    bit = data.draw(st.integers(0, len(frame) * 8 - 1))
    flipped = bytearray(frame)
    flipped[bit // 8] ^= 1 << bit % 8
    _decodes_or_refuses(decode, bytes(flipped))
    with pytest.raises(wire.WireError):
        decode(frame[: data.draw(st.integers(0, len(frame) - 1))])


@any_decoder
@given(data=st.data())
def test_unknown_fields_and_tags_are_refused(union: Any, decode: Decode, data: st.DataObject) -> None:
    fields = msgspec.msgpack.decode(wire.encode(data.draw(messages[union])))
    others: list[object] = [{**fields, "extra": 1}, {**fields, "t": "nonsense"}, {}, [], None, "ping"]
    for changed in others:
        with pytest.raises(wire.WireError):
            decode(msgspec.msgpack.encode(changed))


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(wire.WireError):
        wire.decode_from_worker(wire.encode(wire.Ping(1)))
    with pytest.raises(wire.WireError):
        wire.decode_to_worker(wire.encode(wire.Bye()))


@any_decoder
def test_an_oversized_frame_is_refused_before_it_is_decoded(
    union: Any, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME", 100)
    with pytest.raises(wire.WireError, match="over the cap"):
        decode(bytes(101))


@any_decoder
def test_deep_nesting_is_refused(union: Any, decode: Decode) -> None:
    with pytest.raises(wire.WireError):
        decode(b"\x91" * 100_000)


def _decodes_or_refuses(decode: Decode, frame: bytes) -> None:
    try:
        message = decode(frame)
    except wire.WireError:
        return
    told = wire.encode(message)  # compared as bytes: a damaged number may be NaN, which equals nothing
    assert wire.encode(decode(told)) == told
