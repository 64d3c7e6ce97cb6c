"""Loads from a producer whose blocks have another size than ours, where tokens can be told apart in a block.

A row (what a head of a layer keeps for the ``n`` tokens of a block) must be keys ``[head_size, n]`` and then
values ``[n, head_size]``, as the CPU's ``vec`` kernels keep it. The producer sends its blocks as they are;
the consumer copies the tokens of each into the blocks of ours that they belong to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import torch

from kvtransfer import wire
from kvtransfer.cache import Group, as_rows, check_rows, shape_of
from kvtransfer.plan import num_blocks

_BLOCKS = 1 << 62
"""Of a pool whose ids are never used twice."""


class Move(NamedTuple):
    """Tokens ``[at, at + length)`` of a producer's block go to our ``block``, from its token ``to`` on."""

    block: int
    at: int
    to: int
    length: int


def moves(index: int, theirs: int, ours: int, span: wire.Span, tokens: int) -> tuple[Move, ...]:
    """Where the tokens of the producer's block number ``index`` of a prompt go.

    Args:
        theirs: the producer's block size in tokens; ``ours``: this engine's.
        span: our blocks; tokens outside of them go nowhere.
        tokens: of the prompt.
    """
    first, found = index * theirs, []
    last = min(first + theirs, tokens)
    for number in range(first // ours, num_blocks(last, ours)):
        if 0 <= number - span.first < len(span.block_ids):
            begin, end = max(first, number * ours), min(last, (number + 1) * ours)
            block = span.block_ids[number - span.first]
            found.append(Move(block, begin - first, begin - number * ours, end - begin))
    return tuple(found)


def copy_tokens(
    source: Any, source_tokens: int, target: Any, target_tokens: int, move: Move, item: int
) -> None:
    """Copy tokens from rows to rows.

    Args:
        source: numpy array ``[..., row_bytes]``, uint8, of blocks of ``source_tokens``; ``target``: likewise.
        item: bytes of an element.
    """
    taken = _halves(source, source_tokens, item)
    given = _halves(target, target_tokens, item)
    at, to, length = move.at, move.to, move.length
    given[0][..., to * item : (to + length) * item] = taken[0][..., at * item : (at + length) * item]
    given[1][..., to : to + length, :] = taken[1][..., at : at + length, :]


def _halves(rows: Any, tokens: int, item: int) -> tuple[Any, Any]:
    """Views of keys ``[..., head_size, tokens * item]`` and values ``[..., tokens, head_size * item]``."""
    half = rows.shape[-1] // 2
    keys, values = rows[..., :half], rows[..., half:]
    lead, step = rows.shape[:-1], half // tokens
    return keys.reshape(*lead, step // item, tokens * item), values.reshape(*lead, tokens, step)


class ReblockedCache:
    """A :class:`kvtransfer.cache.Cache` of one group in the producer's blocks, for scatters only.

    Its block ids are those of :attr:`table`. Owns nothing: it writes the engine's tensors.

    Attributes:
        table: where each block's tokens go; who loads adds an entry and takes it away.
    """

    blocks = _BLOCKS

    def __init__(self, group: Group, ours: int, theirs: int) -> None:
        self._layers = [as_rows(layer, group.heads).numpy() for layer in group.layers]
        self._item = group.layers[0].element_size()
        self._ours, self._theirs = ours, theirs
        shape = shape_of(self._layers)
        if shape.row_bytes % (2 * ours * self._item):
            raise ValueError(f"rows of {shape.row_bytes} bytes are not keys and values of {ours} tokens")
        self.shapes: tuple[wire.Shape, ...] = (
            wire.Shape(shape.layers, shape.heads, shape.row_bytes // ours * theirs),
        )
        self.table: dict[int, tuple[Move, ...]] = {}

    def gather(self, group: int, block_ids: Sequence[int], out: torch.Tensor) -> None:
        raise NotImplementedError("a consumer does not gather")

    def copy(self, group: int, source: int, target: int) -> None:
        raise NotImplementedError("blocks are copied in the engine's own cache")

    def scatter(self, group: int, block_ids: Sequence[int], rows: torch.Tensor, put: int = 0) -> None:
        check_rows(self.shapes[group], len(block_ids), rows, put)
        source = rows.numpy()
        heads = slice(put, put + source.shape[2])
        for i, block in enumerate(block_ids):
            for move in self.table[block]:
                for layer, of_layer in zip(self._layers, source, strict=True):
                    target = layer[move.block, heads]
                    copy_tokens(of_layer[i], self._theirs, target, self._ours, move, self._item)


class Translation:
    """Loads in our blocks as loads in the producer's, whose ids are entries of a :class:`ReblockedCache`.

    :meth:`ended` takes a load's entries away; its owner calls it with every event of the consumer.
    """

    def __init__(self, cache: ReblockedCache, ours: int, theirs: int) -> None:
        self._cache = cache
        self._ours, self._theirs = ours, theirs
        self._ids = itertools.count(1)
        self._of: dict[wire.Key, tuple[int, ...]] = {}

    def load(self, spec: wire.Load) -> wire.Load:
        """The load as the consumer runs it: whole blocks of the producer's, from the first one needed.

        Raises:
            ValueError: it is not of the one group, or its key is in flight.
        """
        if len(spec.spans) != 1 or spec.key in self._of:
            raise ValueError("bad_blocks" if spec.key not in self._of else "duplicate")
        (span,) = spec.spans
        first = span.first * self._ours // self._theirs
        found = [
            moves(i, self._theirs, self._ours, span, spec.tokens)
            for i in range(first, num_blocks(spec.tokens, self._theirs))
        ]
        ids = tuple(next(self._ids) for _ in found)
        self._of[spec.key] = ids
        self._cache.table.update(zip(ids, found, strict=True))
        return msgspec.structs.replace(spec, spans=(wire.Span(span.group, first, ids),))

    def ended(self, event: wire.Event) -> None:
        """Forget the load that this event ends."""
        if isinstance(event, wire.Loaded | wire.Failed):
            for block in self._of.pop(event.key, ()):
                del self._cache.table[block]

    def __contains__(self, key: wire.Key) -> bool:
        """Whether this load is in flight."""
        return key in self._of


Emit = Callable[[wire.Event], None]


def translated(emit: Emit, translation: Translation) -> Emit:
    """``emit`` that ends loads of the translation first."""

    def emit_(event: wire.Event) -> None:
        translation.ended(event)
        emit(event)

    return emit_
