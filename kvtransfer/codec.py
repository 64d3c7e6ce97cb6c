"""How rows are encoded on the wire, if they are.

Both codecs are for caches of bfloat16. A row's elements are cut into groups of consecutive ones; a group
travels as one bfloat16 scale and one byte an element, about half of what it was. An encoded row is all its
scales, then all its values, in the order of the elements::

    | scale 0 | scale 1 | ... | value 0 | value 1 | ...

Groups are what lies side by side: where a kernel packs several tokens into one stretch of memory, they share
a scale. Both codecs treat what is not finite alike: a group with a NaN or an infinity decodes to NaN in all
its elements, and no other group is affected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from kvtransfer.cache import Cache
from kvtransfer.fence import Fence
from kvtransfer.wire import Shape

GROUP = 64
"""Elements that share a scale."""
TINY = 2.0**-117
"""A group whose elements are all below this decodes to zeros."""
_CHUNK = 1 << 19
"""Elements encoded at a time, so that what they need in between is small and stays in cache."""
_ELEMENT = 2
_GROUP_BYTES = _ELEMENT + GROUP
_SMALLEST_SCALE = 2.0**-126
"""Below, a scale has no inverse in float32."""
_MAX = torch.finfo(torch.bfloat16).max


class Codec(Protocol):
    """A lossy encoding of rows, applied by who fills staging (:func:`encoded_gather`) and undone
    by the consumer.

    Attributes:
        name: as it stands in the manifest.
    """

    name: str

    def encoded_bytes(self, row_bytes: int) -> int:
        """Bytes of an encoded row. Raises ValueError if rows of that length can't be encoded."""

    def encode(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Encode raw rows ``[layers, count, heads, row_bytes]`` into ``[..., encoded_bytes]``, both uint8."""

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """The raw rows of encoded ones, which may be strided and read-only."""


class _Scaled:
    """A codec of one scale a group; the byte of an element is what the subclasses differ in."""

    name = ""
    largest = 0.0
    """The largest magnitude a byte can stand for, in units of the scale."""
    byte = torch.int8

    def encoded_bytes(self, row_bytes: int) -> int:
        """Bytes of an encoded row. Raises ValueError unless a row is a whole number of groups."""
        groups, rest = divmod(int(row_bytes), GROUP * _ELEMENT)
        if rest or groups < 1:
            raise ValueError(
                f"{self.name} can't encode rows of {row_bytes} bytes: not whole groups of {GROUP} bfloat16"
            )
        return groups * _GROUP_BYTES

    def encode(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Encode rows ``[layers, count, heads, row_bytes]`` into ``[..., encoded_bytes]``, both uint8.

        Either may be strided; the last dimension may not.

        Raises:
            ValueError: ``out`` has another shape, or rows of this length can't be encoded.
        """
        want = (*rows.shape[:-1], self.encoded_bytes(rows.shape[-1]))
        if tuple(out.shape) != want:
            raise ValueError(f"{self.name}: encoded rows are {want}, not {tuple(out.shape)}")
        if rows.is_contiguous() and out.is_contiguous():
            rows, out = _listed(rows), _listed(out)
        values = _grouped(rows.view(torch.bfloat16))
        scales, coded = self._parts(out)
        work = torch.empty(max(_CHUNK, values[:1, :1].numel()), dtype=torch.float32)
        inverse = self._scale(_largest(values, work), scales).unsqueeze(-1)
        for at in _chunks(values):
            x = values[at]
            y = work[: x.numel()].view(x.shape).copy_(x).mul_(inverse[at])
            coded[at].copy_(self._to_units(y))

    def _scale(self, largest: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Write the groups' scales, of their largest magnitudes; returns what elements are multiplied by."""
        scale = (largest.float() / self.largest).bfloat16().clamp_(max=_below(_MAX / self.largest))
        scale.masked_fill_(~torch.isfinite(largest), torch.nan)
        scale.masked_fill_(scale < _SMALLEST_SCALE, 0)
        scales.copy_(scale)
        return scale.float().reciprocal_().nan_to_num_(nan=0, posinf=0)

    def _parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales ``[..., groups]`` and values ``[..., groups, GROUP]`` of encoded rows, as views."""
        split = rows.shape[-1] // _GROUP_BYTES * _ELEMENT
        return rows[..., :split].view(torch.bfloat16), _grouped(rows[..., split:].view(self.byte))

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """The raw rows of encoded ones, ``[layers, count, heads, row_bytes]``, in memory of their own.

        Raises:
            ValueError: the rows are not encoded rows of this codec.
        """
        groups, rest = divmod(rows.shape[-1], _GROUP_BYTES)
        if rest or groups < 1:
            raise ValueError(
                f"rows of {rows.shape[-1]} bytes are not {self.name}'s of {GROUP} elements a group"
            )
        scales, coded = self._parts(_listed(rows) if rows.is_contiguous() else rows)
        raw = torch.empty(coded.shape, dtype=torch.bfloat16)
        for at in _chunks(raw):
            self._from_units(coded[at], raw[at]).mul_(scales[at].unsqueeze(-1))
        return raw.view(torch.uint8).view(*rows.shape[:-1], -1)

    def _to_units(self, y: torch.Tensor) -> torch.Tensor:
        """What ``coded`` takes by conversion; ``y`` may be overwritten."""
        raise NotImplementedError

    def _from_units(self, coded: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the exact values that bytes stand for into ``out``, bfloat16, and return it."""
        raise NotImplementedError


class Int8Codec(_Scaled):
    """Signed integers, -127 to 127 times the scale.

    With ``a`` the largest magnitude of its group, a decoded element is off by at most ``a / 126``
    (:data:`TINY` if that is more). Zeros come back as zeros.
    """

    name = "int8"
    largest = 127.0
    byte = torch.int8

    def _to_units(self, y: torch.Tensor) -> torch.Tensor:
        return y.round_().clamp_(-self.largest, self.largest)

    def _from_units(self, coded: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(coded)


class Fp8Codec(_Scaled):
    """``torch.float8_e4m3fn`` times the scale.

    With ``a`` the largest magnitude of its group, a decoded element ``x`` is off by at most ``|x| / 15``
    or, if that is more, ``a / 2**18`` (:data:`TINY` if that is more). Zeros come back as zeros.
    """

    name = "fp8"
    largest = 448.0
    byte = torch.float8_e4m3fn

    def _to_units(self, y: torch.Tensor) -> torch.Tensor:
        return y.clamp_(-self.largest, self.largest)

    def _from_units(self, coded: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        # Torch converts one at a time on CPUs. Shifted into place, exponent and mantissa are those of a
        # bfloat16 that is 2**120 times too small, subnormal ones too.
        bits = out.view(torch.int16)
        bits.copy_(coded.view(torch.int8))
        torch.bitwise_left_shift(bits, 4, out=bits)
        bits.bitwise_and_(0x87FF - 0x10000)
        return out.mul_(2.0**120)


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Int8Codec(), Fp8Codec())}
"""Every codec by its name."""


def encoded_shapes(shapes: Sequence[Shape], codec: Codec) -> tuple[Shape, ...]:
    """The shapes of a cache's groups as they travel. Raises ValueError if a group can't be encoded."""
    return tuple(Shape(s.layers, s.heads, codec.encoded_bytes(s.row_bytes)) for s in shapes)


class Scratch:
    """Host memory for raw rows on their way to being encoded, used again and again. Thread-safe.

    Args:
        keep: how many buffers are kept while nobody uses them, the largest ones.
    """

    def __init__(self, keep: int = 4) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._free: list[torch.Tensor] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """``nbytes`` or more; the caller's until it is given back."""
        with self._lock:
            if self._free and self._free[-1].numel() >= nbytes:
                return self._free.pop()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back."""
        with self._lock:
            self._free.append(buffer)
            self._free.sort(key=torch.Tensor.numel)
            del self._free[: -self._keep]


_scratch = Scratch()


class _Encoding:
    """A gather's fence, and then the encoding of what was gathered."""

    def __init__(self, fence: Fence, finish: Callable[[], None]) -> None:
        self._fence = fence
        self._finish = finish

    def wait(self) -> None:
        self._fence.wait()
        self._finish()


def encoded_gather(
    cache: Cache,
    codec: Codec,
    group: int,
    block_ids: Sequence[int],
    out: torch.Tensor,
    scratch: Scratch = _scratch,
) -> Fence | None:
    """Gather blocks and encode them into host memory ``out`` ``[layers, count, heads, encoded_bytes]``.

    If the gather is complete when it returns, so is the encoding; if not, the thread that waits for the fence
    encodes, and the fence is to be waited for once.
    """
    shape = cache.shapes[group]
    buffer = scratch.take(len(block_ids) * shape.block_bytes)
    flat = buffer[: len(block_ids) * shape.block_bytes]
    raw = flat.view(shape.layers, len(block_ids), shape.heads, shape.row_bytes)

    def finish() -> None:
        codec.encode(raw, out)
        scratch.give(buffer)

    fence = cache.gather(group, block_ids, raw)
    if fence is not None:
        return _Encoding(fence, finish)
    finish()
    return None


def _below(value: float) -> float:
    """The largest bfloat16 that is not above ``value``."""
    bits = torch.tensor(value, dtype=torch.float32).view(torch.int32) & -0x10000
    return float(bits.view(torch.float32))


def _listed(rows: torch.Tensor) -> torch.Tensor:
    """Contiguous ``[layers, count, heads, n]`` as ``[1, rows, 1, n]``, to be cut anywhere."""
    return rows.view(1, -1, 1, rows.shape[-1])


def _grouped(row: torch.Tensor) -> torch.Tensor:
    return row.unflatten(-1, (-1, GROUP))


def _largest(values: torch.Tensor, work: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each group, bfloat16; not finite where an element is not."""
    largest = torch.empty(values.shape[:-1], dtype=torch.int16)
    for at in _chunks(values):
        x = values[at].view(torch.int16)
        bits = work.view(torch.int16)[: x.numel()].view(x.shape)
        torch.bitwise_and(x, 0x7FFF, out=bits)  # magnitudes, as integers, keep their order
        torch.amax(bits, -1, out=largest[at])
    return largest.view(torch.bfloat16)


def _chunks(values: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Indices that cut ``[layers, count, ...]`` into parts of about ``_CHUNK`` elements, a block at least."""
    layers, count = values.shape[:2]
    step = max(1, _CHUNK // max(1, values[0, 0].numel()))
    for layer in range(layers):
        for first in range(0, count, step):
            yield layer, slice(first, first + step)
