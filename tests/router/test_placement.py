"""Placement: pure choices over workers."""

from __future__ import annotations

import math
import time

from hypothesis import given
from hypothesis import strategies as st

from braid import wire
from router.placement import divide, place
from router.registry import Worker


def worker(
    role: wire.Role, name: str, inflight: int = 0, slots: int = 8, running: int = 0, calm: bool = False
) -> Worker:
    hello = wire.Hello(
        wire.PROTOCOL, role, name, 1, ("demo",), 2048, 32, slots, "f", "0.32.0", ("tcp://127.0.0.1:1",)
    )
    beat = wire.Beat(running=running)
    single_at = -math.inf if calm else time.monotonic() + 3600
    return Worker(name.encode(), hello, 0.0, 0.0, beat, inflight=inflight, single_at=single_at)


def always(prefill: Worker, decode: Worker) -> bool:
    return True


def test_pack_takes_the_least_loaded_decode_worker() -> None:
    decoders = [worker("decode", "d0", inflight=4), worker("decode", "d1", inflight=1)]
    plan = place(decoders, [worker("prefill", "p0")], always, 8, "pack")
    assert [(s.worker.name, s.first, s.n) for s in plan.shares] == [("d1", 0, 8)]


def test_load_is_relative_to_slots() -> None:
    decoders = [worker("decode", "d0", inflight=4, slots=32), worker("decode", "d1", inflight=2, slots=4)]
    plan = place(decoders, [worker("prefill", "p0")], always, 1, "pack")
    assert plan.shares[0].worker.name == "d0"


def test_a_single_request_goes_where_the_fewest_run() -> None:
    """Samples of groups that wait for a seat are no burden to it, those that run are."""
    decoders = [worker("decode", "d0", inflight=40, running=2), worker("decode", "d1", inflight=8, running=8)]
    prefillers = [worker("prefill", "p0")]
    for spread in ("pack", "spread"):
        plan = place(decoders, prefillers, always, 1, spread, single=True)  # type: ignore[arg-type]
        assert plan.shares[0].worker.name == "d0"
        assert place(decoders, prefillers, always, 1, spread).shares[0].worker.name == "d1"  # type: ignore[arg-type]


def test_groups_run_at_full_width_where_no_single_request_was_of_late() -> None:
    """So one goes there only if they are few, though the last heartbeat was before they came."""
    narrow = worker("decode", "d0", inflight=80, slots=128, running=9)
    wide = worker("decode", "d1", inflight=64, slots=128, running=0, calm=True)
    few = worker("decode", "d1", inflight=4, slots=128, running=0, calm=True)
    for other, chosen in ((wide, "d0"), (few, "d1")):
        plan = place([narrow, other], [worker("prefill", "p0")], always, 1, "pack", single=True)
        assert plan.shares[0].worker.name == chosen


def test_single_requests_between_two_heartbeats_do_not_all_go_to_one() -> None:
    decoders = [worker("decode", "d0", running=1), worker("decode", "d1", running=2)]
    chosen = []
    for _ in range(4):
        (share,) = place(decoders, [worker("prefill", "p0")], always, 1, "pack", single=True).shares
        share.worker.inflight += 1
        share.worker.newcomers += 1
        chosen.append(share.worker.name)
    assert chosen == ["d0", "d1", "d0", "d1"]


def test_spread_divides_evenly_with_offsets() -> None:
    decoders = [worker("decode", f"d{i}") for i in range(3)]
    plan = place(decoders, [worker("prefill", "p0")], always, 8, "spread")
    assert [(s.worker.name, s.first, s.n) for s in plan.shares] == [("d0", 0, 3), ("d1", 3, 3), ("d2", 6, 2)]


def test_spread_of_fewer_samples_than_workers_leaves_some_out() -> None:
    decoders = [worker("decode", f"d{i}") for i in range(3)]
    plan = place(decoders, [worker("prefill", "p0")], always, 2, "spread")
    assert [s.n for s in plan.shares] == [1, 1]


def test_a_decode_worker_with_a_usable_pair_goes_before_a_less_loaded_one() -> None:
    decoders = [worker("decode", "d0"), worker("decode", "d1", inflight=5)]
    plan = place(decoders, [worker("prefill", "p0")], lambda p, d: d.name == "d1", 1, "pack")
    assert plan.shares[0].worker.name == "d1"
    assert plan.prefill is not None


def test_without_a_prefill_worker_the_prompt_is_computed_on_decode() -> None:
    plan = place([worker("decode", "d0")], [], always, 1, "pack")
    assert (plan.prefill, plan.reason) == (None, "no_prefill")


def test_a_pair_that_is_not_usable_is_not_used() -> None:
    plan = place([worker("decode", "d0")], [worker("prefill", "p0")], lambda p, d: False, 1, "pack")
    assert (plan.prefill, plan.reason) == (None, "no_pair")


def test_the_least_loaded_prefill_worker_is_taken() -> None:
    prefillers = [worker("prefill", "p0", inflight=3), worker("prefill", "p1")]
    plan = place([worker("decode", "d0")], prefillers, always, 1, "pack")
    assert plan.prefill is prefillers[1]


@given(st.integers(1, 200), st.integers(1, 9), st.sampled_from(["pack", "spread"]))
def test_shares_cover_every_sample_once(n: int, workers: int, spread: str) -> None:
    shares = divide([worker("decode", f"d{i}") for i in range(workers)], n, spread)  # type: ignore[arg-type]
    covered = [i for share in shares for i in range(share.first, share.first + share.n)]
    assert covered == list(range(n))
    assert max(s.n for s in shares) - min(s.n for s in shares) <= 1
