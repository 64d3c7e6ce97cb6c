"""What goes on from a sample runs where that was made; waves of a prompt stay where it is."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from braid import wire
from tests.router.conftest import CHAT, MakeStand, Stand, chat
from tests.router.fake_worker import FakeWorker, answer_samples, group_done, sample
from tests.router.test_reasoning import votes

GENRM = {"strategy": "genrm", "n": 4, "k": 2}
ESC = {"strategy": "early_stopping_consistency", "n": 10, "window": 5}


def groups(worker: FakeWorker) -> tuple[list[wire.Decode], list[wire.Decode]]:
    """What a worker was asked: answers and what goes on from them."""
    decodes = worker.got(wire.Decode)
    return [d for d in decodes if d.keep], [d for d in decodes if not d.keep]


def numbers(decode: wire.Decode) -> set[int]:
    return set(range(decode.first, decode.first + msgspec.json.decode(decode.body)["n"]))


async def test_a_verification_runs_where_the_answer_was_made_and_is_not_prefilled(
    make_stand: MakeStand,
) -> None:
    stand = await make_stand(spread="spread")
    p, *decoders = await stand.workers(decode=answer_samples, decoders=2)
    reply = await stand.post(CHAT, chat(reasoning=GENRM))
    assert reply.status_code == 200
    await p.expect(wire.Prefill)  # it may be read after the reply
    assert len(p.got(wire.Prefill)) == 1
    seen: set[int] = set()
    for worker in decoders:
        (answers,), chains = groups(worker)
        assert {c.after for c in chains} == {f"{answers.ref:x}-{i}" for i in numbers(answers)}
        assert {(c.ticket, c.reason) for c in chains} == {(None, "continued")}
        seen |= {i for decode in (answers, *chains) for i in numbers(decode)}
    assert seen == set(range(4 + 4 * 2))


async def test_what_goes_on_counts_only_its_new_tokens_as_prompt(stand: Stand) -> None:
    async def reads_on(worker: FakeWorker, message: wire.Decode) -> None:
        n = msgspec.json.decode(message.body)["n"]
        for index in range(message.first, message.first + n):
            await worker.send(sample(message, index, "The answer is 7."))
        done = group_done(message, n)
        if message.after:  # 7 of the prompt, 5 of the sample, 8 new; of the first 12, 11 are in the cache
            done = msgspec.structs.replace(done, prompt_tokens=20, cached_tokens=11)
        await worker.send(done)

    await stand.workers(decode=reads_on)
    body = (await stand.post(CHAT, chat(reasoning=GENRM))).json()
    assert body["usage"] == {
        "prompt_tokens": 7 + 4 * 8,
        "completion_tokens": (4 + 4 * 2) * 5,
        "total_tokens": 39 + 60,
        "prompt_tokens_details": {"cached_tokens": 4, "continued_tokens": 48, "recomputed_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 55},
    }


async def test_kept_samples_are_forgotten_when_the_request_ends(stand: Stand) -> None:
    _, d = await stand.workers(decode=answer_samples)
    await stand.post(CHAT, chat(reasoning=GENRM))
    forgotten = await d.expect(wire.Forget)
    (answers,), _ = groups(d)
    assert forgotten.names == tuple(f"{answers.ref:x}-{i}" for i in range(4))


async def test_an_answer_whose_worker_is_gone_is_verified_elsewhere(make_stand: MakeStand) -> None:
    stand = await make_stand()

    async def waits_with_what_goes_on(worker: FakeWorker, message: wire.Decode) -> None:
        if message.after:
            await worker.gate.wait()
        await answer_samples(worker, message)

    await stand.workers(decoders=0)
    d0 = await stand.worker("decode", "d0", waits_with_what_goes_on)
    d1 = await stand.worker("decode", "d1", waits_with_what_goes_on)
    await stand.until(lambda: sum(p["verified"] for p in stand.app.pairs.state()) == 2)
    task = asyncio.create_task(stand.post(CHAT, chat(reasoning={**GENRM, "n": 1, "k": 1})))
    await stand.until(lambda: bool(groups(d0)[1] or groups(d1)[1]))
    first, second = (d0, d1) if groups(d0)[1] else (d1, d0)
    assert [c.after for c in groups(first)[1]] == [f"{groups(first)[0][0].ref:x}-0"]
    await first.die()
    assert (await task).status_code == 200
    (moved,) = groups(second)[1]
    assert moved.after == "", "it is a request like any other there"
    assert moved.ticket is not None


async def test_later_waves_go_where_the_prompt_is(stand: Stand) -> None:
    split = (7, 5, 6, 7, 8, 7, 7, 7, 7, 7)
    _, d0, d1 = await stand.workers(decode=votes(*split), decoders=2)
    for _ in range(3):
        await stand.post(CHAT, chat(reasoning=ESC))
    by_request: dict[str, set[str]] = {}
    waves: list[Any] = [(d.request_id.split("-")[0], w.name) for w in (d0, d1) for d in w.got(wire.Decode)]
    for request, name in waves:
        by_request.setdefault(request, set()).add(name)
    assert len(waves) == 6
    assert all(len(names) == 1 for names in by_request.values())
