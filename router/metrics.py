"""The router's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
_KV_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, *_SECONDS[:13])


class Metrics:
    """One registry a router, so that several can live in one process."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.accepted = Counter(
            "braid_requests_accepted", "Requests admitted; each ends once", ["endpoint"], registry=r
        )
        self.requests = Counter(
            "braid_requests",
            "Admitted requests by how they ended: completed, failed, cancelled",
            ["endpoint", "outcome"],
            registry=r,
        )
        self.errors = Counter("braid_errors", "Errors answered, by kind", ["error"], registry=r)
        self.strategies = Counter("braid_strategies", "Requests by strategy", ["strategy"], registry=r)
        self.service_calls = Counter(
            "braid_service_calls",
            "Calls of verifiers and retrievers over HTTP, by outcome",
            ["service", "outcome"],
            registry=r,
        )
        self.path = Counter(
            "braid_path", "Prompts by how their KV came to a decode worker", ["path", "reason"], registry=r
        )
        self.kv_bytes = Counter("braid_kv_bytes", "KV bytes moved for answered requests", registry=r)
        self.kv_transfers = Counter(
            "braid_kv_transfers", "KV transfers made for answered requests", registry=r
        )
        self.kv_retries = Counter(
            "braid_kv_retries", "KV transfers resumed after a broken connection", registry=r
        )
        self.kv_blocks = Counter(
            "braid_kv_blocks",
            "KV blocks of answered requests' prompts: moved, or cached by the decode worker before",
            ["source"],
            registry=r,
        )
        self.kv_queue = self._kv_time("queue", "Prompt at the decode worker to its KV asked for")
        self.kv_wait = self._kv_time("wait", "KV asked for to its first block (the prefill's time is in it)")
        self.kv_wire = self._kv_time("wire", "First KV block to the last")
        self.kv_scatter = self._kv_time("scatter", "Of the time on the wire, spent writing the cache")
        self.ttft = Histogram(
            "braid_ttft_seconds", "Request received to first body bytes", buckets=_SECONDS, registry=r
        )
        self.duration = Histogram(
            "braid_request_seconds", "Request received to its end", ["endpoint"], buckets=_SECONDS, registry=r
        )
        self.retries = Counter(
            "braid_retries", "Rungs of the fallback ladder taken", ["stage", "reason"], registry=r
        )
        self.queue_depth = Gauge("braid_queue_depth", "Requests waiting for a slot", registry=r)
        self.inflight_samples = Gauge("braid_inflight_samples", "Samples holding a slot", registry=r)
        self.workers = Gauge("braid_workers", "Workers registered", ["role", "state"], registry=r)
        self.pairs = Gauge("braid_pairs", "Prefill/decode pairs by state", ["state"], registry=r)
        self.probes = Counter("braid_pair_probes", "Pair probes by outcome", ["outcome"], registry=r)
        self.workers_lost = Counter("braid_workers_lost", "Workers lost", ["role", "reason"], registry=r)
        self.frames_dropped = Counter("braid_frames_dropped", "Frames dropped", ["reason"], registry=r)
        self.cancels_unanswered = Counter(
            "braid_cancels_unanswered", "Cancelled dispatches whose worker never answered", registry=r
        )

    def _kv_time(self, name: str, help: str) -> Histogram:
        return Histogram(
            f"braid_kv_{name}_seconds", help, ["transport"], buckets=_KV_SECONDS, registry=self.registry
        )

    def render(self) -> bytes:
        return generate_latest(self.registry)
