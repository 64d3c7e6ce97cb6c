"""Joining streams and bodies of shares."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.sse import DONE, Broken, Joiner, event, join_bodies, merge_usage, parse_event

PROOF = {"path": "remote"}


def chunk(index: int, text: str = "", finish: str | None = None, **fields: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    return {"id": "a", "created": 1, "choices": [choice], **fields}


def usage(completion: int, **fields: Any) -> dict[str, Any]:
    return {"prompt_tokens": 7, "completion_tokens": completion, "total_tokens": 7 + completion, **fields}


def parsed(data: bytes) -> list[Any]:
    """The events of a stream as JSON, ``[DONE]`` as it is."""
    events = [raw for raw in data.split(b"\n\n") if raw]
    return ["[DONE]" if raw == b"data: [DONE]" else parse_event(raw) for raw in events]


def test_one_share_passes_through_but_for_the_proof() -> None:
    joiner = Joiner([0], 1)
    first, last = b'data: {"choices": [ {"index":0} ],  "odd":1}\n\n', event(chunk(0, "", "stop"))
    assert joiner.feed(0, first) == first
    assert joiner.feed(0, last + DONE) == b""
    assert joiner.finish(PROOF) == event({**chunk(0, "", "stop"), "braid": PROOF}) + DONE


def test_the_proof_rides_on_the_last_of_several_finish_chunks() -> None:
    joiner = Joiner([0], 2)
    early = event(chunk(1, "", "stop"))
    assert joiner.feed(0, early) == early
    assert joiner.feed(0, event(chunk(0, "", "length"))) == b""
    assert parsed(joiner.finish(PROOF))[0]["braid"] == PROOF


def test_text_that_looks_like_a_finish_reason_is_only_text() -> None:
    joiner = Joiner([0], 1)
    raw = event(chunk(0, '{"finish_reason":"stop"} data: [DONE]'))
    assert joiner.feed(0, raw) == raw


def test_shares_get_their_numbers_one_id_and_one_usage() -> None:
    joiner = Joiner([0, 2], 3)
    out = joiner.feed(0, event(chunk(0, "x", id="a")))
    out += joiner.feed(1, event(chunk(0, "y", id="b", created=2)))
    for share, n in ((0, 2), (1, 1)):
        for index in range(n):
            out += joiner.feed(share, event(chunk(index, "", "stop", id="ab"[share])))
        out += joiner.feed(share, event({"id": "ab"[share], "choices": [], "usage": usage(4)}) + DONE)
    *chunks, tokens, done = parsed(out + joiner.finish(PROOF))
    assert [c["choices"][0]["index"] for c in chunks] == [0, 2, 0, 1, 2]
    assert {c["id"] for c in [*chunks, tokens]} == {"a"}
    assert [("braid" in c) for c in chunks] == [False] * 4 + [True]
    assert tokens["usage"] == usage(8)
    assert done == "[DONE]"


def test_an_error_event_passes_and_no_done_follows() -> None:
    joiner = Joiner([0], 1)
    raw = event({"error": {"message": "x"}})
    assert joiner.feed(0, raw + DONE) == raw
    assert joiner.failed
    assert DONE not in joiner.finish(PROOF)


def test_a_cut_stream_gives_back_what_was_held_without_proof() -> None:
    joiner = Joiner([0], 1)
    joiner.feed(0, event(chunk(0, "", "stop")))
    assert joiner.cut() == event(chunk(0, "", "stop"))


def test_comments_and_other_fields_pass() -> None:
    joiner = Joiner([0, 1], 2)
    assert joiner.feed(0, b": keep-alive\n\n") == b": keep-alive\n\n"


@pytest.mark.parametrize("raw", [b"data: nope\n\n", b"data: [1]\n\n", b'data: {"a":\n\n'])
def test_an_event_that_is_not_a_chunk_is_broken(raw: bytes) -> None:
    with pytest.raises(Broken):
        Joiner([0, 1], 2).feed(0, raw)


@settings(max_examples=60, deadline=None)
@given(st.integers(), st.integers(1, 3), st.integers(1, 4), st.integers(0, 5))
def test_any_interleaving_and_cutting_joins_to_the_same_texts(
    seed: int, shares: int, n: int, steps: int
) -> None:
    chance = random.Random(seed)
    streams = [
        b"".join(event(chunk(i, f"{s}.{i}.{t};")) for t in range(steps) for i in range(n))
        + b"".join(event(chunk(i, "", "stop")) for i in range(n))
        + event({"choices": [], "usage": usage(steps * n)})
        + DONE
        for s in range(shares)
    ]
    joiner, out = Joiner([s * n for s in range(shares)], shares * n), b""
    while any(streams):
        share = chance.choice([s for s in range(shares) if streams[s]])
        size = chance.randint(1, len(streams[share]))
        out += joiner.feed(share, streams[share][:size])
        streams[share] = streams[share][size:]
    *chunks, tokens, done = parsed(out + joiner.finish(PROOF))
    texts = dict.fromkeys(range(shares * n), "")
    for c in chunks:
        texts[c["choices"][0]["index"]] += c["choices"][0]["delta"]["content"]
    assert texts == {
        s * n + i: "".join(f"{s}.{i}.{t};" for t in range(steps)) for s in range(shares) for i in range(n)
    }
    assert ("braid" in chunks[-1], tokens["usage"], done) == (True, usage(shares * steps * n), "[DONE]")
    assert sum("braid" in c for c in chunks) == 1


def test_bodies_join_in_order_with_the_prompt_counted_once() -> None:
    bodies = [{"id": s, "choices": [{"index": 1}, {"index": 0}], "usage": usage(3)} for s in "ab"]
    joined = join_bodies([(0, bodies[0]), (2, bodies[1])])
    assert [choice["index"] for choice in joined["choices"]] == [0, 1, 2, 3]
    assert (joined["id"], joined["usage"]) == ("a", usage(6))


def test_usage_details_add_up() -> None:
    details = {
        "completion_tokens_details": {"reasoning_tokens": 2},
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    merged = merge_usage([usage(3, **details), usage(4, **details)])
    assert merged["completion_tokens_details"] == {"reasoning_tokens": 4}
    assert merged["prompt_tokens_details"] == {"cached_tokens": 5}
    assert msgspec.json.decode(msgspec.json.encode(merged)) == merged
