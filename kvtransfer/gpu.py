"""A cache on a CUDA device: gathers and scatters beside the model's work, without stopping the host for it.

Bytes take two steps. Between the layers and a bounce buffer on the device, one kernel launch moves the rows
of all layers (:mod:`kvtransfer.kernels`); between the bounce buffer and pinned host memory, a copy engine
does. Each direction has a stream for either step and a ring of bounce buffers; events order them::

    gather:   model's stream --> gather stream --> landing stream --> fence
                    ^------------------'           (the model goes on when the rows are out)
    scatter:  arrival stream --> scatter stream --> fence

How fast this is has not been measured; ``benchmarks/kvtransfer_gpu.py`` would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from kvtransfer.cache import Group, check_rows
from kvtransfer.fence import Fence
from kvtransfer.kernels import Box, PagedRows, boxes

SLOTS = 4
SLOT_BYTES = 16 * 1024 * 1024
"""A piece up to this size takes one launch."""


class Stream(Protocol):
    """Work that a device does in order."""

    def run(self, work: Callable[[], None]) -> None:
        """Submit what ``work`` submits to the current stream."""

    def mark(self) -> Fence:
        """Passes when the work submitted so far is done."""

    def follow(self, mark: Fence) -> None:
        """Have the device do later work only when ``mark`` of a stream of the same device has passed."""


class Device(Protocol):
    """What :class:`DeviceCache` needs of a device besides memory."""

    def stream(self) -> Stream:
        """A new stream."""

    def current(self) -> Stream:
        """The calling thread's current stream."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Host memory the device copies from and to by itself; not used again before such copies are done."""

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor is such memory."""


class _CudaMark:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(blocking=True)  # a thread that waits leaves the core to others
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class CudaStream:
    """A :class:`Stream` of CUDA."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> Fence:
        return _CudaMark(self._stream)

    def follow(self, mark: Fence) -> None:
        assert isinstance(mark, _CudaMark)
        self._stream.wait_event(mark.event)


class CudaDevice:
    """A :class:`Device` of CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def stream(self) -> Stream:
        return CudaStream(torch.cuda.Stream(self._device))

    def current(self) -> Stream:
        return CudaStream(torch.cuda.current_stream(self._device))

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return bool(tensor.is_pinned())


@dataclass(slots=True)
class _Slot:
    """A bounce buffer. ``free``: the mark after which it may be used again."""

    memory: torch.Tensor
    ids: torch.Tensor
    host: torch.Tensor | None
    free: Fence | None = None


class _Ring:
    """Slots in turn."""

    def __init__(self, slots: list[_Slot]) -> None:
        self._slots = slots
        self._at = 0

    def next(self) -> _Slot:
        self._at = (self._at + 1) % len(self._slots)
        return self._slots[self._at]


class _Landed:
    """A gather into host memory that is not pinned: the last leg is the waiting thread's."""

    def __init__(self, fence: Fence, pinned: torch.Tensor, out: torch.Tensor) -> None:
        self._fence, self._pinned, self._out = fence, pinned, out

    def wait(self) -> None:
        self._fence.wait()
        self._out.copy_(self._pinned)


class _Holding:
    """A fence that keeps what is being read."""

    def __init__(self, fence: Fence, held: torch.Tensor) -> None:
        self._fence, self._held = fence, held

    def wait(self) -> None:
        self._fence.wait()


class DeviceCache:
    """A :class:`kvtransfer.cache.Cache` on a CUDA device. Owns bounce buffers; views the engine's tensors.

    Gathers and copies never wait on the host: they may be called within the engine's step. A gather reads
    what the current stream was given before, and the current stream's later work waits, on the device, until
    the rows have left the layers; beyond ``slots`` bounce buffers that wait includes copies to the host. A
    scatter may block its thread until a bounce buffer is free.

    A caller owns the blocks it scatters into if nothing that the device was given before still reads or
    writes them. Where that can't be known (steps are submitted before the last one's end is), pass ``after``.

    Args:
        groups: see :class:`~kvtransfer.kernels.PagedRows` for the layouts; others raise ValueError.
        slots: bounce buffers a direction.
        slot_bytes: of a bounce buffer, one row at least. ``2 * slots * slot_bytes`` of device memory and
            ``slots * slot_bytes`` of pinned host memory are held.
        after: scattered rows enter the layers when all work this stream was given before has ended.
        device: what stands for the layers' device.

    The kernels are compiled, and tried on block 0 (which keeps its content), by the constructor.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES,
        after: Stream | None = None,
        device: Device | None = None,
    ) -> None:
        self._groups = [PagedRows(group) for group in groups]
        self.shapes = tuple(rows.shape for rows in self._groups)
        self.blocks = min(rows.blocks for rows in self._groups)
        self._slot_bytes = max(slot_bytes, *(shape.row_bytes for shape in self.shapes))
        place = groups[0].layers[0].device
        self._device = device if device is not None else CudaDevice(place)
        self._after = after
        self._out_lock, self._in_lock = threading.Lock(), threading.Lock()
        self._gathering, self._landing = self._device.stream(), self._device.stream()
        self._arriving, self._scattering = self._device.stream(), self._device.stream()
        self._out = _Ring([self._slot(place, False) for _ in range(slots)])
        self._in = _Ring([self._slot(place, True) for _ in range(slots)])
        self._try()

    def _slot(self, place: torch.device, host: bool) -> _Slot:
        memory = torch.empty(self._slot_bytes, dtype=torch.uint8, device=place)
        most = self._slot_bytes // min(shape.row_bytes for shape in self.shapes)
        ids = torch.empty(most, dtype=torch.int64, device=place)
        return _Slot(memory, ids, self._device.pinned(self._slot_bytes) if host else None)

    def _try(self) -> None:
        for group, shape in enumerate(self.shapes):
            rows = self._device.pinned(shape.block_bytes).view(shape.layers, 1, shape.heads, shape.row_bytes)
            for move in (self.gather, self.scatter):
                fence = move(group, [0], rows)
                assert fence is not None
                fence.wait()
            self.copy(group, 0, 0)
        self._device.current().mark().wait()

    def gather(self, group: int, block_ids: Sequence[int], out: torch.Tensor) -> Fence | None:
        """See :class:`~kvtransfer.cache.Cache`. ``out`` is contiguous, and pinned or it costs the waiting
        thread one more copy.

        Raises:
            ValueError: ``out`` has another shape.
            IndexError: a block does not exist.
        """
        check_rows(self.shapes[group], len(block_ids), out, 0)
        if not out.is_contiguous() or out.shape[2] != self.shapes[group].heads:
            raise ValueError("rows are gathered into contiguous memory, all heads")
        ids = self._upload(block_ids)
        if ids is None:
            return None
        if self._device.is_pinned(out):
            return self._gather(group, ids, out)
        pinned = self._device.pinned(out.numel()).view(out.shape)
        return _Landed(self._gather(group, ids, pinned), pinned, out)

    def _gather(self, group: int, ids: torch.Tensor, out: torch.Tensor) -> Fence:
        gathering, landing, model = self._gathering, self._landing, self._device.current()
        with self._out_lock:
            gathering.follow(model.mark())
            for box in self._boxes(group, out):
                slot = self._out.next()
                if slot.free is not None:
                    gathering.follow(slot.free)
                gathering.run(partial(self._take, group, box, ids, slot))
                taken = gathering.mark()
                landing.follow(taken)
                landing.run(partial(_land, slot, out[box.index]))
                slot.free = fence = landing.mark()
            model.follow(taken)
        return fence

    def _take(self, group: int, box: Box, ids: torch.Tensor, slot: _Slot) -> None:
        mine = slot.ids[: box.shape[1]].copy_(ids[box.blocks], non_blocking=True)
        self._groups[group].gather(box, mine, slot.memory)

    def scatter(self, group: int, block_ids: Sequence[int], rows: torch.Tensor, put: int = 0) -> Fence | None:
        """See :class:`~kvtransfer.cache.Cache`. Contiguous pinned rows are read until the fence has passed,
        others until this returns.

        Raises:
            ValueError: the rows do not have the group's shape.
            IndexError: a block does not exist.
        """
        check_rows(self.shapes[group], len(block_ids), rows, put)
        ids = self._upload(block_ids)
        if ids is None or rows.numel() == 0:
            return None
        direct = rows.is_contiguous() and self._device.is_pinned(rows)
        with self._in_lock:
            for box in self._boxes(group, rows):
                slot = self._in.next()
                if slot.free is not None:
                    slot.free.wait()
                source = rows[box.index] if direct else _staged(slot, rows[box.index])
                slot.free = fence = self._put(group, box, ids, source, slot, put)
        return _Holding(fence, rows) if direct else fence

    def _put(
        self, group: int, box: Box, ids: torch.Tensor, source: torch.Tensor, slot: _Slot, put: int
    ) -> Fence:
        arriving, scattering = self._arriving, self._scattering
        mine = slot.ids[: box.shape[1]]
        arriving.run(partial(_arrive, slot, source, mine, ids[box.blocks]))
        scattering.follow(arriving.mark())
        if self._after is not None:
            scattering.follow(self._after.mark())
        scattering.run(partial(self._groups[group].scatter, box, mine, slot.memory, put))
        return scattering.mark()

    def copy(self, group: int, source: int, target: int) -> None:
        """Copy one block onto another on the current stream, all layers in one launch.

        Raises:
            IndexError: a block does not exist.
        """
        self._check((source, target))
        self._device.current().run(partial(self._groups[group].copy, source, target))

    def _boxes(self, group: int, rows: torch.Tensor) -> list[Box]:
        layers, count, heads, row_bytes = rows.shape
        return boxes(layers, count, heads, self._slot_bytes // row_bytes)

    def _upload(self, block_ids: Sequence[int]) -> torch.Tensor | None:
        """Block ids in pinned memory; None if there are none."""
        self._check(block_ids)
        if not block_ids:
            return None
        ids = self._device.pinned(8 * len(block_ids)).view(torch.int64)
        return ids.copy_(torch.tensor(block_ids, dtype=torch.int64))

    def _check(self, block_ids: Sequence[int]) -> None:
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.blocks:
            raise IndexError(f"blocks {min(block_ids)} to {max(block_ids)} of a cache of {self.blocks}")


def _land(slot: _Slot, out: torch.Tensor) -> None:
    out.copy_(slot.memory[: out.numel()].view(out.shape), non_blocking=True)


def _staged(slot: _Slot, rows: torch.Tensor) -> torch.Tensor:
    assert slot.host is not None
    return slot.host[: rows.numel()].view(rows.shape).copy_(rows)


def _arrive(slot: _Slot, source: torch.Tensor, mine: torch.Tensor, ids: torch.Tensor) -> None:
    slot.memory[: source.numel()].view(source.shape).copy_(source, non_blocking=True)
    mine.copy_(ids, non_blocking=True)


_PORTABLE = 1


def pin(memory: memoryview) -> None:
    """Have CUDA treat host memory as pinned, all of it; it stays so until :func:`unpin` or the process ends.

    All its pages are allocated by this. Raises OSError if CUDA refuses (locked memory is limited, say).
    """
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    code = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel(), _PORTABLE))
    if code:
        raise OSError(f"cudaHostRegister of {flat.numel()} bytes failed with CUDA error {code}")


def unpin(memory: memoryview) -> None:
    """Undo :func:`pin`, before the memory is unmapped; no copy of it is under way."""
    code = int(torch.cuda.cudart().cudaHostUnregister(torch.frombuffer(memory, dtype=torch.uint8).data_ptr()))
    if code:
        raise OSError(f"cudaHostUnregister failed with CUDA error {code}")
