"""What comes back from encoded rows, and how far off it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import wire
from kvtransfer.cache import Group, HostCache
from kvtransfer.codec import CODECS, GROUP, TINY, Codec, Scratch, encoded_gather, encoded_shapes
from kvtransfer.fence import Fence
from kvtransfer.wire import Shape
from tests.kvtransfer.ends import Pair, contents, make_key

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
KEY = make_key()
WORST = {"int8": 1 / 126, "fp8": 1 / 15}
"""The stated bound, as a share of the group's largest magnitude."""


def as_rows(values: torch.Tensor) -> torch.Tensor:
    """Values ``[layers, count, heads, elements]`` as rows of bfloat16."""
    return values.bfloat16().view(torch.uint8)


def encoded(codec: Codec, rows: torch.Tensor) -> torch.Tensor:
    out = torch.empty((*rows.shape[:-1], codec.encoded_bytes(rows.shape[-1])), dtype=torch.uint8)
    codec.encode(rows, out)
    return out


def round_trip(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    """What values ``[..., elements]`` come back as, float64."""
    rows = as_rows(values.view(1, 1, 1, -1))
    back = codec.decode(encoded(codec, rows))
    assert back.shape == rows.shape
    assert back.dtype == torch.uint8
    return back.view(torch.bfloat16).double().view(values.shape)


@every_codec
@given(seed=st.integers(0, 2**32), exponents=st.lists(st.integers(-150, 126), min_size=1, max_size=6))
def test_an_element_is_off_by_no_more_than_is_stated(codec: Codec, seed: int, exponents: list[int]) -> None:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(len(exponents), GROUP, generator=random, dtype=torch.float64).clamp(-1.99, 1.99)
    values *= torch.exp2(torch.tensor(exponents, dtype=torch.float64))[:, None]
    values *= torch.rand(len(exponents), GROUP, generator=random) < 0.9
    values = values.bfloat16().double()
    largest = values.abs().amax(-1, keepdim=True)
    error = (round_trip(codec, values) - values).abs()
    assert (error <= (largest * WORST[codec.name]).clamp(min=TINY)).all()
    if codec.name == "fp8":
        assert (error <= torch.maximum(values.abs() / 15, largest / 2**18).clamp(min=TINY)).all()
    assert (round_trip(codec, values)[values == 0] == 0).all()


@every_codec
def test_every_bfloat16_as_the_largest_of_its_group_keeps_the_bound(codec: Codec) -> None:
    largest = torch.arange(0, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()
    share = torch.linspace(-1, 1, GROUP - 1, dtype=torch.float64)
    values = torch.cat([largest[:, None], largest[:, None] * share], dim=1).bfloat16().double()
    error = (round_trip(codec, values) - values).abs()
    assert (error <= (largest[:, None] * WORST[codec.name]).clamp(min=TINY)).all()


@pytest.mark.parametrize("bits", range(256))
def test_bytes_of_fp8_stand_for_what_torch_says(bits: int) -> None:
    meant = torch.tensor([bits], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    row = torch.zeros(1, 1, 1, 2 + GROUP, dtype=torch.uint8)
    row[..., :2] = torch.tensor([2.0]).bfloat16().view(torch.uint8)
    row[..., 2:] = bits
    got = CODECS["fp8"].decode(row).view(torch.bfloat16).float()
    if not meant.isnan():  # never encoded: a NaN is its scale's
        assert (got == 2 * meant).all()


@every_codec
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_spoils_its_own_group_only(codec: Codec, poison: float) -> None:
    values = torch.linspace(-3, 3, 3 * GROUP).view(3, GROUP).bfloat16()
    clean = round_trip(codec, values)
    values[1, 7] = poison
    back = round_trip(codec, values)
    assert back[1].isnan().all()
    assert torch.equal(back[[0, 2]], clean[[0, 2]])


@every_codec
def test_zeros_come_back_as_zeros(codec: Codec) -> None:
    assert not round_trip(codec, torch.zeros(2, GROUP)).any()


@every_codec
@pytest.mark.parametrize(
    "shape", [(3, 70, 2, 16 * GROUP), (1, 1, 1, GROUP), (2, 1, 1, 10_000 * GROUP)], ids=str
)
def test_rows_are_encoded_alike_however_they_lie(codec: Codec, shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(1)
    rows = as_rows(torch.randn(shape, generator=random))
    layers, count, heads, nbytes = rows.shape
    wide = torch.zeros(layers, count + 3, heads + 2, nbytes, dtype=torch.uint8)
    wide[:, 3:, 1:-1] = rows
    plain = encoded(codec, rows)
    assert torch.equal(encoded(codec, wide[:, 3:, 1:-1]), plain)
    one = encoded(codec, rows[-1:, -1:, -1:])
    assert torch.equal(one, plain[-1:, -1:, -1:])
    target = torch.zeros(layers, count + 1, heads + 2, plain.shape[-1], dtype=torch.uint8)
    codec.encode(rows, target[:, 1:, :heads])
    assert torch.equal(target[:, 1:, :heads], plain)
    assert not target[:, 0].any()
    assert torch.equal(codec.decode(target[:, 1:, :heads]), codec.decode(plain))


@every_codec
def test_received_memory_is_read_wherever_it_starts_and_never_written(codec: Codec) -> None:
    rows = encoded(codec, as_rows(torch.randn(2, 3, 1, 4 * GROUP)))
    frame = b"x" + rows.numpy().tobytes()
    received = torch.frombuffer(memoryview(frame)[1:], dtype=torch.uint8).view(rows.shape)
    assert torch.equal(codec.decode(received), codec.decode(rows))
    assert frame[1:] == rows.numpy().tobytes()


@every_codec
@pytest.mark.parametrize("row_bytes", [0, 2, 2 * GROUP - 2, 2 * GROUP + 2, 3 * GROUP])
def test_rows_that_are_not_whole_groups_are_refused(codec: Codec, row_bytes: int) -> None:
    with pytest.raises(ValueError, match="whole groups"):
        codec.encoded_bytes(row_bytes)
    with pytest.raises(ValueError, match="whole groups"):
        encoded_shapes([Shape(2, 2, row_bytes)], codec)


@every_codec
def test_a_wrong_place_to_write_and_foreign_rows_are_refused(codec: Codec) -> None:
    rows = as_rows(torch.zeros(1, 2, 1, GROUP))
    with pytest.raises(ValueError, match="encoded rows are"):
        codec.encode(rows, torch.empty(1, 2, 1, GROUP, dtype=torch.uint8))
    with pytest.raises(ValueError, match="elements a group"):
        codec.decode(rows)


@every_codec
def test_an_encoded_row_is_about_half_as_long(codec: Codec) -> None:
    assert codec.encoded_bytes(2 * 1024) == 1024 + 2 * 1024 // GROUP
    assert encoded_shapes([Shape(3, 2, 2048)], codec) == (Shape(3, 2, codec.encoded_bytes(2048)),)


class LateCache(HostCache):
    """A cache whose gathers are made only when their fence is waited for: later than any device."""

    def gather(self, group: int, block_ids: Sequence[int], out: torch.Tensor) -> Fence:  # type: ignore[override]
        copy = partial(super().gather, group, list(block_ids), out)

        class Later:
            def wait(self) -> None:
                copy()

        return Later()


@every_codec
def test_what_is_still_being_gathered_is_encoded_after_its_fence(codec: Codec) -> None:
    layers = [torch.randn(9, 2, 2 * GROUP).bfloat16() for _ in range(3)]
    late, host = (cache([Group(layers, 2)]) for cache in (LateCache, HostCache))
    scratch = Scratch(keep=1)
    jobs = []
    for ids in ([4, 1, 7], [2], [8, 0, 3, 5]):
        out = torch.zeros(3, len(ids), 2, codec.encoded_bytes(4 * GROUP), dtype=torch.uint8)
        jobs.append((ids, out, encoded_gather(late, codec, 0, ids, out, scratch)))
    for ids, out, fence in jobs:
        assert fence is not None
        assert not out.any()
        fence.wait()
        expected = torch.empty_like(out)
        encoded_gather(host, codec, 0, ids, expected)
        assert torch.equal(out, expected)


@every_codec
def test_blocks_are_gathered_and_encoded_in_one_go(codec: Codec) -> None:
    layers = [torch.randn(9, 2, 2 * GROUP).bfloat16() for _ in range(3)]
    cache = HostCache([Group(layers, 2)])
    scratch = Scratch()
    for ids in ([4, 1, 7], [2], [8, 0, 3, 5]):  # the scratch memory is larger, smaller and new
        raw = torch.empty(3, len(ids), 2, 4 * GROUP, dtype=torch.uint8)
        cache.gather(0, ids, raw)
        out = torch.zeros(3, len(ids), 2, codec.encoded_bytes(4 * GROUP), dtype=torch.uint8)
        assert encoded_gather(cache, codec, 0, ids, out, scratch) is None
        assert torch.equal(out, encoded(codec, raw))


def bfloat16_pair(make_pair: Callable[..., Pair], codec: Codec) -> Pair:
    """Ends with caches of bfloat16, of which the producer sends them encoded."""
    pair = make_pair(row_bytes=4 * GROUP, codec=codec)
    random = torch.Generator().manual_seed(3)
    for layer in pair.p.cache.tensors[0]:
        values = torch.randn(layer.numel() // 2, generator=random)
        layer.view(torch.bfloat16).flatten().copy_(values)
    return pair


@pytest.mark.parametrize("transport", ["shm", "zmq"])
@every_codec
def test_blocks_travel_encoded_and_are_written_decoded(
    make_pair: Callable[..., Pair], codec: Codec, transport: str
) -> None:
    pair = bfloat16_pair(make_pair, codec)
    d = pair.consumer(transports=[transport], codecs=CODECS)
    pair.p.open(KEY, 3)
    pair.p.publish(KEY, 0, [5, 2, 9])
    d.load(KEY, pair.endpoint, (4, 7, 1))
    loaded = d.events.expect(wire.Loaded, KEY)
    raw = pair.p.cache.take([5, 2, 9])
    assert loaded.nbytes == raw.numel() * codec.encoded_bytes(4 * GROUP) // (4 * GROUP)
    assert loaded.nbytes < 0.52 * raw.numel()
    assert torch.equal(d.cache.take([4, 7, 1]), codec.decode(encoded(codec, raw)))
    others = [block for block in range(d.cache.blocks) if block not in (4, 7, 1)]
    assert not contents(d.cache)[:, others].any()


@every_codec
def test_who_does_not_know_the_encoding_takes_nothing(make_pair: Callable[..., Pair], codec: Codec) -> None:
    pair = bfloat16_pair(make_pair, codec)
    pair.p.open(KEY, 1)
    pair.p.publish(KEY, 0, [5])
    pair.d.load(KEY, pair.endpoint, (4,))
    assert pair.d.events.expect(wire.Failed, KEY).reason == "codec"
    assert not contents(pair.d.cache).any()
