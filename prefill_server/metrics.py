"""What a prefill worker counts besides what vLLM does, on its own /metrics."""

from __future__ import annotations

from prometheus_client import Counter

SENT = Counter("braid_kv_sent_bytes", "KV bytes sent to decode workers")
EARLY = Counter("braid_kv_early_bytes", "Those sent before the last chunk of their prompt was computed")
