"""Strategies that go on from partial answers, through the router to its workers."""

from __future__ import annotations

from typing import Any

import msgspec

from braid import wire
from tests.router.conftest import CHAT, Stand, chat
from tests.router.fake_worker import FakeWorker, group_done, sample

STEPS = {"strategy": "beam_of_steps", "n": 4, "width": 2, "verifier": "arithmetic", "cot": False}


def body_of(decode: wire.Decode) -> dict[str, Any]:
    body: dict[str, Any] = msgspec.json.decode(decode.body)
    return body


async def grow(worker: FakeWorker, message: wire.Decode) -> None:
    """First steps, of which only number 2 computes rightly; then the answer."""
    n, last = body_of(message)["n"], body_of(message)["messages"][-1]
    for index in range(message.first, message.first + n):
        first = last["role"] == "user"
        made = sample(message, index, f"2+2={6 - index}." if first else "The answer is 4.")
        choice = msgspec.json.decode(made.choice) | {"stop_reason": "\n\n" if first else None}
        await worker.send(msgspec.structs.replace(made, choice=msgspec.json.encode(choice)))
    await worker.send(group_done(message, n))


async def test_steps_go_on_on_the_worker_that_made_them(stand: Stand) -> None:
    p, d0, d1 = await stand.workers(decode=grow, decoders=2)
    reply = (await stand.post(CHAT, chat(reasoning=STEPS))).json()
    assert reply["choices"][0]["message"]["content"] == "2+2=4.\n\nThe answer is 4."
    assert reply["reasoning"]["kept"][0][0] == 2
    decodes = [(worker, decode) for worker in (d0, d1) for decode in worker.got(wire.Decode)]
    made = {i: (w, d) for w, d in decodes for i in range(d.first, d.first + body_of(d)["n"])}
    later = [(worker, decode) for worker, decode in decodes if decode.after]
    assert len(later) == 2, "one group a kept beam"
    for worker, decode in later:
        before = int(decode.after.rpartition("-")[2])
        assert worker is made[before][0]
        message = body_of(decode)["messages"][-1]
        assert message == {"role": "assistant", "content": f"2+2={6 - before}.\n\n"}
        assert body_of(decode)["continue_final_message"] is True
        assert decode.reason == "continued"
    assert len(p.got(wire.Prefill)) == 1
    assert reply["usage"]["completion_tokens"] == 5 * 8


async def test_a_watch_reaches_the_workers_and_the_confidence_comes_back(stand: Stand) -> None:
    async def sure(worker: FakeWorker, message: wire.Decode) -> None:
        n = body_of(message)["n"]
        for index in range(message.first, message.first + n):
            made = sample(message, index, f"The answer is {index % 2}.")
            await worker.send(msgspec.structs.replace(made, confidence=2.0 + index))
        await worker.send(group_done(message, n))

    _, d = await stand.workers(decode=sure)
    options = {
        "strategy": "deepconf",
        "n": 6,
        "warmup": 4,
        "wave": 2,
        "window": 9,
        "top": 3,
        "filter": "high",
    }
    reply = (await stand.post(CHAT, chat(reasoning=options))).json()
    watches = [decode.watch for decode in d.got(wire.Decode)]
    assert watches == [wire.Watch(9, 3), wire.Watch(9, 3, 2.3)]
    assert [one["confidence"] for one in reply["reasoning"]["confidences"]] == [2, 3, 4, 5, 6, 7]
    assert reply["reasoning"]["threshold"] == 2.3


async def test_a_beam_search_is_one_sample_on_one_worker(stand: Stand) -> None:
    async def search(worker: FakeWorker, message: wire.Decode) -> None:
        await worker.send(sample(message, 0, "The answer is 4.", tokens=40), group_done(message, 8))

    _, d0, d1 = await stand.workers(decode=search, decoders=2)
    reply = (await stand.post(CHAT, chat(reasoning={"strategy": "beam_search", "n": 4}))).json()
    (decode,) = d0.got(wire.Decode) + d1.got(wire.Decode)
    body = body_of(decode)
    assert (body["n"], body["use_beam_search"], body["vllm_xargs"]) == (1, True, {"beam_width": 4})
    assert reply["reasoning"]["answer"] == "4"
    assert reply["usage"]["completion_tokens"] == 40
