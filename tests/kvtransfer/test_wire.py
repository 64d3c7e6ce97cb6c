"""KV messages: what is understood, and that nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import wire

Decode = Callable[[bytes], object]
DECODERS: list[tuple[object, Decode]] = [
    (wire.Data, wire.decode_data),
    (wire.Command, wire.decode_command),
    (wire.Event, wire.decode_event),
]
numbers = st.integers(-(2**63), 2**63 - 1)
keys = st.builds(wire.Key, st.binary(max_size=16), numbers, numbers)
wants = st.builds(wire.Want, numbers, numbers, numbers)
_strategies = ((int, numbers), (float, st.floats(allow_nan=False)), (wire.Key, keys), (wire.Want, wants))
for _type, _strategy in _strategies:
    st.register_type_strategy(_type, _strategy)
messages = {union: st.one_of([st.from_type(kind) for kind in get_args(union)]) for union, _ in DECODERS}
any_decoder = pytest.mark.parametrize(("union", "decode"), DECODERS, ids=["data", "command", "event"])


@any_decoder
@given(data=st.data())
def test_every_message_round_trips(union: object, decode: Decode, data: st.DataObject) -> None:
    message = data.draw(messages[union])
    assert decode(wire.encode(message)) == message


@any_decoder
@given(frame=st.binary(max_size=200))
def test_random_bytes_are_refused_cleanly(union: object, decode: Decode, frame: bytes) -> None:
    _decodes_or_refuses(decode, frame)


@any_decoder
@given(data=st.data())
def test_damaged_messages_are_refused_cleanly(union: object, decode: Decode, data: st.DataObject) -> None:
    frame = wire.encode(data.draw(messages[union]))
    bit = data.draw(st.integers(0, len(frame) * 8 - 1))
    flipped = bytearray(frame)
    flipped[bit // 8] ^= 1 << bit % 8
    _decodes_or_refuses(decode, bytes(flipped))
    with pytest.raises(wire.KvWireError):
        decode(frame[: data.draw(st.integers(0, len(frame) - 1))])


@any_decoder
def test_unknown_fields_and_tags_are_refused(union: object, decode: Decode) -> None:
    known = msgspec.msgpack.decode(wire.encode(get_args(union)[0](**_fields(get_args(union)[0]))))
    others: list[object] = [{**known, "extra": 1}, {**known, "t": "nonsense"}, {}, [], None, "sub"]
    for changed in others:
        with pytest.raises(wire.KvWireError):
            decode(msgspec.msgpack.encode(changed))


@any_decoder
def test_other_planes_messages_are_refused(union: object, decode: Decode) -> None:
    for other, _ in DECODERS:
        if other is not union:
            kind = get_args(other)[0]
            with pytest.raises(wire.KvWireError):
                decode(wire.encode(kind(**_fields(kind))))


@any_decoder
def test_an_oversized_frame_is_refused_before_it_is_decoded(union: object, decode: Decode) -> None:
    with pytest.raises(wire.KvWireError, match="over the cap"):
        decode(bytes(wire.MAX_MESSAGE + 1))


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(wire.KvWireError):
        wire.decode_data(b"\x91" * 100_000)


def _decodes_or_refuses(decode: Decode, frame: bytes) -> None:
    try:
        message = decode(frame)
    except wire.KvWireError:
        return
    frame = wire.encode(message)  # type: ignore[arg-type]
    assert wire.encode(decode(frame)) == frame  # type: ignore[arg-type]  # a float may be NaN


def _fields(kind: type) -> dict[str, object]:
    samples: dict[object, object] = {int: 1, str: "x", bytes: b"x", float: 1.0}
    samples["Key"] = samples[wire.Key] = wire.Key(b"id", 1)
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    return {name: samples.get(type_, ()) for name, type_ in types.items()}
