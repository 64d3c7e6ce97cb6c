"""Received rows on their way into a cache without tensors, and how a piece is wrapped for sending."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import zmq

from kvtransfer import rowcopy
from kvtransfer.fence import Fence, Waiter
from kvtransfer.loop import Loop
from kvtransfer.rows import Rows, packed
from kvtransfer.sockets import receive_frames
from kvtransfer.target import Target
from kvtransfer.transport import Parcel, Piece
from kvtransfer.wire import Shape
from tests.kvtransfer.ends import Blocks, contents, make_cache

LAYERS, HEADS, ROW = 3, 4, 128
PLACES = [5, 1, 7, 2]


def received(count: int, *, heads: int = HEADS, layers: int = LAYERS, row: int = ROW) -> Rows:
    """Packed rows of random bytes."""
    data = np.random.default_rng(count).integers(1, 256, layers * count * heads * row, dtype=np.uint8)
    return packed(data, data.ctypes.data, (layers, count, heads, row))


def cut(whole: Rows, skip: int, heads: tuple[int, int]) -> Rows:
    """What is left of packed rows without their first blocks and with these heads only."""
    layers, count, _, row = whole.shape
    offset = skip * whole.block_stride + heads[0] * row
    shape = (layers, count - skip, heads[1] - heads[0], row)
    return Rows(whole.memory, whole.address, offset, shape, whole.layer_stride, whole.block_stride)


class Scatters:
    """A cache that is given tensors only."""

    blocks = 12
    shapes: tuple[Shape, ...] = (Shape(LAYERS, HEADS, ROW),)

    def __init__(self) -> None:
        self.given: list[tuple[int, list[int], torch.Tensor, int]] = []

    def gather(self, group: int, block_ids: Sequence[int], out: torch.Tensor) -> None:
        raise NotImplementedError

    def copy(self, group: int, source: int, target: int) -> None:
        raise NotImplementedError

    def scatter(self, group: int, block_ids: Sequence[int], rows: torch.Tensor, put: int = 0) -> Fence | None:
        self.given.append((group, list(block_ids), rows, put))
        return None


@pytest.fixture
def cache() -> Blocks:
    return make_cache(LAYERS, heads=HEADS, row_bytes=ROW, fill=True)


@pytest.mark.parametrize("put", [0, 1])
@pytest.mark.parametrize(("at", "count"), [(0, 4), (1, 2), (3, 1)])
@pytest.mark.parametrize(("skip", "heads"), [(0, (0, HEADS)), (2, (0, HEADS)), (1, (1, 3))])
def test_rows_go_where_they_lie_into_the_blocks_and_nothing_else_changes(
    cache: Blocks, put: int, at: int, count: int, skip: int, heads: tuple[int, int]
) -> None:
    width = min(heads[1] - heads[0], HEADS - put)
    rows = cut(received(count + skip), skip, (heads[0], heads[0] + width))
    expected = contents(cache)
    expected[:, PLACES[at : at + count], put : put + width] = rows.tensor()
    target = Target(cache, 0, PLACES, width, put)
    assert target._write is not None
    assert target.write(at, count, rows) is None
    assert torch.equal(contents(cache), expected)


def test_rows_are_the_bytes_they_were_received_as() -> None:
    rows = received(2)
    assert rows.tensor().numpy().tobytes() == rows.memory.tobytes()
    part = cut(rows, 1, (2, 4)).tensor()
    assert torch.equal(part, rows.tensor()[:, 1:, 2:4])


@pytest.mark.parametrize(
    ("at", "rows"),
    [
        (3, received(2)),
        (-1, received(2)),
        (0, received(5)),
        (0, received(2, layers=LAYERS + 1)),
        (0, received(2, heads=HEADS - 1)),
        (0, received(2, row=2 * ROW)),
        (0, cut(received(2), 2, (0, HEADS))),
    ],
    ids=["past the end", "before the start", "too many", "layers", "heads", "row", "none"],
)
def test_rows_that_do_not_fit_are_refused_and_write_nothing(cache: Blocks, at: int, rows: Rows) -> None:
    before = contents(cache)
    target = Target(cache, 0, PLACES, HEADS, 0)
    with pytest.raises(ValueError, match="rows of shape"):
        target.write(at, rows.shape[1], rows)
    assert torch.equal(contents(cache), before)


def test_a_cache_that_prepares_nothing_is_given_tensors() -> None:
    cache, rows = Scatters(), received(2)
    target = Target(cache, 0, PLACES, HEADS, 0)
    target.write(1, 2, rows)
    target.write(3, 1, torch.zeros(LAYERS, 1, HEADS, ROW, dtype=torch.uint8))
    assert [(group, ids, put) for group, ids, _, put in cache.given] == [(0, [1, 7], 0), (0, [2], 0)]
    assert torch.equal(cache.given[0][2], rows.tensor())


def test_decoded_rows_go_into_a_cache_that_prepares_too(cache: Blocks) -> None:
    decoded = received(2).tensor().clone()
    Target(cache, 0, PLACES, HEADS, 0).write(2, 2, decoded)
    assert torch.equal(cache.take([7, 2]), decoded)


def test_what_the_compiled_copy_cannot_write_is_scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = make_cache(LAYERS, heads=HEADS, row_bytes=ROW // 2, fill=False)
    assert odd.prepare(0, PLACES, 1, 0) is None
    rows = received(1, heads=1, row=ROW // 2)
    Target(odd, 0, PLACES, 1, 2).write(1, 1, rows)
    assert torch.equal(odd.take([1])[:, :, 2:3], rows.tensor())
    monkeypatch.setattr(rowcopy, "compiled", lambda: None)
    assert make_cache(LAYERS, heads=HEADS, row_bytes=ROW, fill=False).prepare(0, PLACES, 1, 0) is None


def test_frames_of_a_message_come_together_and_uncopied() -> None:
    with zmq.Context() as context:
        here, there = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        here.bind("inproc://frames")
        there.connect("inproc://frames")
        with pytest.raises(zmq.Again):
            receive_frames(here)
        there.send_multipart([b"a", b"", b"c"])
        there.send(b"d")
        assert [frame.bytes for frame in receive_frames(here)] == [b"a", b"", b"c"]
        assert [frame.bytes for frame in receive_frames(here)] == [b"d"]
        here.close(linger=0)
        there.close(linger=0)


def make_piece() -> Piece:
    rows = torch.arange(2 * 3 * 2 * 4, dtype=torch.uint8).view(2, 3, 2, 4)
    return Piece(0, 0, 3, 0, rows, (2, 3, 2, 4), memoryview(rows.view(-1).numpy()))


def test_a_whole_piece_has_one_frame_for_everybody_and_a_part_one_of_its_own() -> None:
    piece = make_piece()
    whole = [Parcel(sub, piece, 0, piece.count, (0, 2)).wrap() for sub in (1, 2)]
    assert whole[0] is whole[1] is piece.wrap()
    assert whole[0].bytes == piece.rows.numpy().tobytes()
    part = Parcel(3, piece, 1, piece.count - 1, (1, 2))
    assert part.wrap() is not whole[0]
    assert part.wrap().bytes == piece.rows[:, 1:, 1:2].contiguous().numpy().tobytes()
    assert part.nbytes == len(part.wrap())


class Copying:
    """A fence that notes when it is waited for."""

    def __init__(self, order: list[str]) -> None:
        self._order = order

    def wait(self) -> None:
        self._order.append("waited")


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_done_meanwhile_comes_before_the_wait_and_never_in_its_place(fails: bool) -> None:
    order: list[str] = []
    done = threading.Event()

    def meanwhile() -> None:
        order.append("meanwhile")
        if fails:
            raise RuntimeError("no memory")

    def call(well: bool) -> None:
        order.append("well" if well else "failed")
        done.set()

    loop = Loop("test-target")
    loop.start()
    waiter = Waiter(loop, "test-waiter")
    waiter.after(Copying(order), call, meanwhile)
    assert done.wait(10)
    waiter.stop()
    loop.stop()
    assert order == ["meanwhile", "waited", "failed" if fails else "well"]
