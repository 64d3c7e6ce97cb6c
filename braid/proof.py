"""One record of KV transfers for several."""

from __future__ import annotations

from collections.abc import Iterable

from braid.wire import KvRecord

_WORST_FIRST = ("recomputed", "local", "remote")


def merge(records: Iterable[KvRecord]) -> KvRecord:
    """The worst path with its reason, the sum of what moved, the longest of each time.

    Without records: path ``local``, nothing moved.
    """
    records = list(records)
    if not records:
        return KvRecord("local")
    worst = min(records, key=lambda r: _WORST_FIRST.index(r.path))
    return KvRecord(
        path=worst.path,
        transfers=sum(r.transfers for r in records),
        nbytes=sum(r.nbytes for r in records),
        blocks=sum(r.blocks for r in records),
        blocks_cached=sum(r.blocks_cached for r in records),
        reason=worst.reason,
        queue_s=max(r.queue_s for r in records),
        wait_s=max(r.wait_s for r in records),
        wire_s=max(r.wire_s for r in records),
        scatter_s=max(r.scatter_s for r in records),
        transport=",".join(sorted({r.transport for r in records if r.transport})),
        retries=sum(r.retries for r in records),
    )
