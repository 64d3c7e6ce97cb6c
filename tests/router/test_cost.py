"""Placement by cost: the rule, the index of prompts, and what is learned."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid import wire
from router.cost import Station, divide
from router.estimates import Estimates
from router.placement import by_load, place
from router.prefixes import CHUNK, Prefixes
from tests.router.test_placement import always, worker

BASE_S, SEQ_S = 3e-3, 5e-5

stations = st.lists(
    st.builds(
        Station,
        room=st.integers(-4, 40),
        width=st.integers(0, 60),
        step_base_s=st.floats(1e-4, 1e-1),
        step_seq_s=st.floats(1e-7, 1e-2),
        handover_s=st.one_of(st.just(0.0), st.floats(1e-4, 5.0)),
    ),
    min_size=1,
    max_size=12,
)
counts, lengths = st.integers(1, 64), st.floats(1, 1000)


def alike(number: int, handover_s: float, room: int = 1000) -> list[Station]:
    return [Station(room, 0, BASE_S, SEQ_S, handover_s)] * number


def used(shares: list[int]) -> int:
    return sum(share > 0 for share in shares)


@given(stations, counts, lengths)
def test_every_sample_is_placed_once(found: list[Station], n: int, tokens: float) -> None:
    shares = divide(found, n, tokens)
    assert len(shares) == len(found)
    assert sum(shares) == n
    assert min(shares) >= 0


@given(stations, counts, lengths)
def test_no_worker_is_filled_over_while_another_has_room(found: list[Station], n: int, tokens: float) -> None:
    shares = divide(found, n, tokens)
    over = [s for s, share in zip(found, shares, strict=True) if share > max(0, s.room)]
    left = [s for s, share in zip(found, shares, strict=True) if share < s.room]
    assert not (over and left)


@given(stations, lengths)
def test_one_sample_goes_to_where_it_ends_first(found: list[Station], tokens: float) -> None:
    shares = divide(found, 1, tokens)
    assert used(shares) == 1
    roomy = [s for s in found if s.room > 0] or found
    taken = found[shares.index(1)]
    ends = [s.handover_s + s.decode_s(1, tokens) for s in roomy]
    assert taken.handover_s + taken.decode_s(1, tokens) == pytest.approx(min(ends))


@given(st.integers(1, 12), counts, lengths, st.floats(1e-4, 1), st.floats(1, 10))
def test_a_longer_hand_over_never_takes_more_workers(
    number: int, n: int, tokens: float, handover_s: float, longer: float
) -> None:
    short = used(divide(alike(number, handover_s), n, tokens))
    assert used(divide(alike(number, handover_s * longer), n, tokens)) <= short


@given(st.integers(1, 12), counts, st.floats(1e-4, 1), lengths, st.floats(1, 10))
def test_longer_samples_never_take_fewer_workers(
    number: int, n: int, handover_s: float, tokens: float, longer: float
) -> None:
    short = used(divide(alike(number, handover_s), n, tokens))
    assert used(divide(alike(number, handover_s), n, tokens * longer)) >= short


@given(stations, counts, lengths)
def test_it_ends_no_later_than_pack_or_spread_by_its_own_estimate(
    found: list[Station], n: int, tokens: float
) -> None:
    found = [Station(1000, s.width, s.step_base_s, s.step_seq_s, s.handover_s) for s in found]

    def end(shares: list[int]) -> float:
        link = sum(s.handover_s for s, share in zip(found, shares, strict=True) if share)
        return max(
            (link if s.handover_s else 0.0) + s.decode_s(share, tokens)
            for s, share in zip(found, shares, strict=True)
            if share
        )

    least = end(divide(found, n, tokens))
    for place_of_all in range(len(found)):
        pack = [n if i == place_of_all else 0 for i in range(len(found))]
        assert least <= end(pack) * (1 + 1e-9)


def test_a_wide_group_of_a_short_prompt_is_divided_and_one_of_a_long_prompt_is_not() -> None:
    assert used(divide(alike(4, 1e-3), 64, 100)) == 4
    assert used(divide(alike(4, 2.0), 64, 100)) == 1


def test_where_the_kv_is_costs_nothing() -> None:
    there = Station(64, 8, BASE_S, SEQ_S, 0.0)
    assert divide([*alike(2, 0.5), there], 4, 50) == [0, 0, 4]
    assert used(divide([there, there, *alike(2, 0.5)], 32, 100)) == 2


# Which worker was given which prompt


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": text}], **fields}


def test_a_worker_is_known_by_the_beginning_it_was_given() -> None:
    index, text = Prefixes(), "a" * (4 * CHUNK)
    index.note(chat(text), 1)
    index.note(chat(text[: 2 * CHUNK] + "b" * 2 * CHUNK), 2)
    assert index.known(chat(text)) == {1: 1.0, 2: pytest.approx(0.4)}
    assert index.known(chat("c" + text)) == {}


def test_what_has_another_model_or_salt_is_another_prompt() -> None:
    index = Prefixes()
    index.note(chat("hi", cache_salt="a"), 1)
    assert index.known(chat("hi", cache_salt="a")) == {1: 1.0}
    assert index.known(chat("hi", cache_salt="b")) == index.known(chat("hi")) == {}
    assert index.known(chat("hi", cache_salt="a", model="other")) == {}


def test_sampling_fields_do_not_change_the_prompt() -> None:
    index = Prefixes()
    index.note(chat("hi", n=4, temperature=0.2), 1)
    assert index.known(chat("hi")) == {1: 1.0}
    index.note({"model": "demo", "prompt": [1, 2, 3]}, 2)
    assert index.known({"model": "demo", "prompt": [1, 2, 3]}) == {2: 1.0}


def test_the_index_forgets_what_was_used_longest_ago() -> None:
    index = Prefixes(size=2)
    for text in ("a", "b", "c"):
        index.note(chat(text), 1)
    assert len(index) == 2
    assert [bool(index.known(chat(text))) for text in ("a", "b", "c")] == [False, True, True]


# From workers to shares


def names(estimates: Estimates, workers: list[Any], n: int, body: dict[str, Any]) -> dict[str, int]:
    return {p.worker.name: p.n for p in estimates.divide("demo", body, workers, n, local=False)}


def test_one_sample_of_an_unknown_prompt_goes_where_pack_puts_it() -> None:
    workers = [worker("decode", f"d{i}", inflight=load) for i, load in enumerate((4, 1, 3))]
    assert names(Estimates(), workers, 1, chat("hi")) == {by_load(workers)[0].name: 1}


def test_a_later_wave_goes_to_those_that_have_the_prompt() -> None:
    estimates, body = Estimates(bandwidth=1e6), chat("a" * 4000)
    workers = [worker("decode", f"d{i}", slots=64) for i in range(4)]
    for number, one in enumerate(workers):
        one.hello = wire.Hello(
            **{f: getattr(one.hello, f) for f in one.hello.__struct_fields__} | {"epoch": number}
        )
    assert len(names(estimates, workers, 16, body)) == 1
    estimates.prefixes.note(body, 2)
    estimates.prefixes.note(body, 3)
    assert names(estimates, workers, 16, body) == {"d2": 8, "d3": 8}


def test_a_worker_without_free_blocks_or_slots_is_left_out() -> None:
    full, free = worker("decode", "d0", slots=64), worker("decode", "d1", slots=64, inflight=8)
    full.beat = wire.Beat(free_blocks=1)
    assert names(Estimates(), [full, free], 4, chat("a" * 2000)) == {"d1": 4}
    busy = worker("decode", "d2", slots=8, inflight=8)
    assert names(Estimates(), [busy, free], 4, chat("hi")) == {"d1": 4}


def test_a_worker_with_slower_steps_gets_fewer_samples() -> None:
    fast, slow = worker("decode", "d0", slots=64), worker("decode", "d1", slots=64)
    fast.beat = wire.Beat(step_base_s=0.01, step_seq_s=0.001)
    slow.beat = wire.Beat(step_base_s=0.01, step_seq_s=0.003)
    assert names(Estimates(), [fast, slow], 16, chat("hi")) == {"d0": 12, "d1": 4}


def test_a_worker_that_has_measured_nothing_is_taken_for_one_like_the_others() -> None:
    workers = [worker("decode", f"d{i}", slots=64) for i in range(3)]
    workers[0].beat = wire.Beat(step_base_s=0.001, step_seq_s=0.001)
    assert names(Estimates(), workers, 30, chat("hi")) == {"d0": 10, "d1": 10, "d2": 10}


def test_a_long_prompt_is_divided_where_what_it_costs_a_step_says_so() -> None:
    body = chat("a" * 24_000)
    workers = [worker("decode", f"d{i}", slots=64) for i in range(2)]
    for costs, used_by in ((0.0, 1), (1e-7, 2)):
        for one in workers:
            one.beat = wire.Beat(step_base_s=0.003, step_seq_s=1e-6, step_token_s=costs)
        assert len(names(Estimates(), workers, 32, body)) == used_by


def test_lengths_and_bytes_are_learned_from_what_shares_report() -> None:
    body = chat("a" * 1000)
    workers = [worker("decode", f"d{i}", slots=64) for i in range(2)]
    estimates = Estimates(bandwidth=1e8)
    short = wire.GroupDone(1, 200, b"", 250, 0, 16 * 4, wire.KvRecord("remote", 1, 40_000_000, 10))
    long = wire.GroupDone(1, 200, b"", 250, 0, 16 * 4000, wire.KvRecord("remote", 1, 40_000_000, 10))
    for _ in range(30):
        estimates.learn("demo", body, 16, short)
    assert len(names(estimates, workers, 16, body)) == 1
    for _ in range(30):
        estimates.learn("demo", body, 16, long)
    assert len(names(estimates, workers, 16, body)) == 2
    assert len(names(estimates, workers, 16, {**body, "max_tokens": 4})) == 1


def test_a_single_request_is_divided_by_what_runs() -> None:
    """Over the slots of d0 samples of a group wait for seats; they are not before a single request."""
    workers = [worker("decode", "d0", inflight=90, slots=64), worker("decode", "d1", inflight=30, slots=64)]
    for one, running in zip(workers, (4, 30), strict=True):
        one.beat = wire.Beat(running=running)
    for single, chosen in ((True, "d0"), (False, "d1")):
        (share,) = Estimates().divide("demo", chat("hi"), workers, 1, local=True, single=single)
        assert share.worker.name == chosen


def test_samples_are_numbered_without_a_gap() -> None:
    workers = [worker("decode", f"d{i}", slots=64) for i in range(3)]
    shares = Estimates().divide("demo", chat("hi"), workers, 20, local=True)
    assert [i for s in shares for i in range(s.first, s.first + s.n)] == list(range(20))


def test_auto_takes_the_prefill_worker_that_reaches_most() -> None:
    workers = [worker("decode", f"d{i}", slots=64) for i in range(3)]
    prefillers = [worker("prefill", "p0"), worker("prefill", "p1", inflight=4)]
    estimates = Estimates()
    plan = place(
        workers,
        prefillers,
        lambda p, d: p.name == "p1" or d.name == "d0",
        48,
        "auto",
        by_cost=lambda found, n, local: estimates.divide("demo", chat("hi"), found, n, local),
    )
    assert plan.prefill is prefillers[1]
    assert len(plan.shares) == 3
    assert always(prefillers[0], workers[0])
