"""Proof of path: how a request's KV came to each decode worker, for headers, bodies and metrics."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from braid.proof import merge
from braid.wire import KvRecord
from router.metrics import Metrics

_LABEL = re.compile(r"[a-z0-9_]{0,32}")


def by_worker(pairs: Iterable[tuple[str, KvRecord | None]]) -> dict[str, KvRecord | None]:
    """Records keyed by decode worker, in order; None where none has come yet."""
    found: dict[str, list[KvRecord]] = {}
    for name, record in pairs:
        found.setdefault(name, []).extend([] if record is None else [record])
    return {name: merge(records) if records else None for name, records in found.items()}


def headers(request_id: str, prefill: str, kv: dict[str, KvRecord | None]) -> list[tuple[str, str]]:
    """The ``x-braid-*`` headers; those of the path are absent while no worker has reported.

    The times of the transfers are in ``server-timing`` (W3C), in milliseconds.
    """
    known = [record for record in kv.values() if record is not None]
    lines = [("x-request-id", request_id), ("x-braid-decode", ",".join(kv))]
    if prefill:
        lines.append(("x-braid-prefill", prefill))
    if known:
        total = merge(known)
        lines += [
            ("x-braid-path", total.path),
            ("x-braid-kv-bytes", str(total.nbytes)),
            ("x-braid-kv-transfers", str(total.transfers)),
            ("x-braid-kv-blocks", str(total.blocks)),
            ("x-braid-kv-blocks-cached", str(total.blocks_cached)),
            ("x-braid-kv-retries", str(total.retries)),
        ]
        if total.transport:
            spans = ("queue", total.queue_s), ("wait", total.wait_s), ("wire", total.wire_s)
            timing = (*spans, ("scatter", total.scatter_s))
            lines += [
                ("x-braid-kv-transport", total.transport),
                ("server-timing", ", ".join(f"kv-{name};dur={s * 1000:.3f}" for name, s in timing)),
            ]
    return lines


def body(prefill: str, kv: dict[str, KvRecord | None]) -> dict[str, Any]:
    """The ``braid`` object of a reply."""
    known = [record for record in kv.values() if record is not None]
    total = merge(known) if known else None
    return {
        "path": total.path if total else None,
        "kv_bytes": total.nbytes if total else 0,
        "kv_transfers": total.transfers if total else 0,
        "prefill": prefill or None,
        "decode": {name: _one(record) for name, record in kv.items()},
    }


def count(metrics: Metrics, kv: dict[str, KvRecord | None]) -> None:
    """Add an ended request's records to the metrics."""
    for record in kv.values():
        if record is not None:
            reason = record.reason if _LABEL.fullmatch(record.reason) else "other"
            metrics.path.labels(record.path, reason).inc()
            metrics.kv_bytes.inc(record.nbytes)
            metrics.kv_transfers.inc(record.transfers)
            metrics.kv_retries.inc(record.retries)
            metrics.kv_blocks.labels("moved").inc(record.blocks)
            metrics.kv_blocks.labels("cached").inc(record.blocks_cached)
            if record.path == "remote":
                metrics.kv_queue.labels(record.transport).observe(record.queue_s)
                metrics.kv_wait.labels(record.transport).observe(record.wait_s)
                metrics.kv_wire.labels(record.transport).observe(record.wire_s)
                metrics.kv_scatter.labels(record.transport).observe(record.scatter_s)


def _one(record: KvRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {
        "path": record.path,
        "kv_bytes": record.nbytes,
        "kv_transfers": record.transfers,
        "blocks": record.blocks,
        "blocks_cached": record.blocks_cached,
        "reason": record.reason,
        "transport": record.transport,
        "retries": record.retries,
        "queue_s": round(record.queue_s, 6),
        "wait_s": round(record.wait_s, 6),
        "wire_s": round(record.wire_s, 6),
        "scatter_s": round(record.scatter_s, 6),
    }
