"""What the headers of a reply tell of its KV."""

from __future__ import annotations

from braid.wire import KvRecord
from router import proof

FIRST = KvRecord(
    "remote",
    transfers=1,
    nbytes=1000,
    blocks=4,
    blocks_cached=2,
    queue_s=0.001,
    wait_s=0.05,
    wire_s=0.0025,
    scatter_s=0.0005,
    transport="shm",
    retries=1,
)
SECOND = KvRecord("remote", transfers=1, nbytes=500, blocks=2, wait_s=0.08, transport="zmq")


def test_headers_tell_the_whole_record_of_all_workers() -> None:
    assert dict(proof.headers("r1", "p0", {"d0": FIRST, "d1": SECOND})) == {
        "x-request-id": "r1",
        "x-braid-prefill": "p0",
        "x-braid-decode": "d0,d1",
        "x-braid-path": "remote",
        "x-braid-kv-bytes": "1500",
        "x-braid-kv-transfers": "2",
        "x-braid-kv-blocks": "6",
        "x-braid-kv-blocks-cached": "2",
        "x-braid-kv-retries": "1",
        "x-braid-kv-transport": "shm,zmq",
        "server-timing": "kv-queue;dur=1.000, kv-wait;dur=80.000, kv-wire;dur=2.500, kv-scatter;dur=0.500",
    }


def test_what_did_not_travel_has_no_times() -> None:
    told = dict(proof.headers("r1", "", {"d0": KvRecord("local", reason="short")}))
    assert (told["x-braid-path"], told["x-braid-kv-blocks"]) == ("local", "0")
    assert not {"server-timing", "x-braid-kv-transport", "x-braid-prefill"} & set(told)


def test_before_a_worker_has_reported_headers_tell_where_it_runs() -> None:
    assert dict(proof.headers("r1", "p0", {"d0": None})) == {
        "x-request-id": "r1",
        "x-braid-prefill": "p0",
        "x-braid-decode": "d0",
    }
