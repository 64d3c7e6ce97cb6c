"""Samples that are drawn a second time: their worker is gone, or too slow."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import msgspec
import pytest

from braid import wire
from router.dispatch import Fanout
from tests.router.conftest import CHAT, MakeStand, Stand, chat
from tests.router.fake_worker import FakeWorker, Script, group_done, sample, silent

VOTE = {"strategy": "self_consistency", "n": 4, "cot": False, "early_stop": False}


def telling(*numbers: int) -> Script:
    """Answers these samples of a group and then nothing."""

    async def script(worker: FakeWorker, message: wire.Decode) -> None:
        for index in numbers:
            await worker.send(sample(message, index, "The answer is 7."))
        await silent(worker, message)

    return script


async def rest(worker: FakeWorker, message: wire.Decode) -> None:
    """Answers all of its range but what the router does not want of it, which it is told right behind it."""
    n = msgspec.json.decode(message.body)["n"]
    unwanted = (await worker.expect(wire.Cancel)).samples or () if n > 1 else ()
    for index in range(message.first, message.first + n):
        told = sample(message, index, "The answer is 5.")
        await worker.send(wire.Sample(message.ref, index, "cancelled") if index in unwanted else told)
    await worker.send(group_done(message, n - len(unwanted)))


async def begun(stand: Stand, decode: Script, **options: Any) -> tuple[Any, FakeWorker, FakeWorker]:
    """A group of 4 on ``d0``, of which ``d0`` runs ``decode``; ``d1`` draws what it is given."""
    await stand.workers(decoders=0)
    d0 = await stand.worker("decode", "d0", decode)
    d1 = await stand.worker("decode", "d1", rest)
    await stand.until(lambda: sum(p["verified"] for p in stand.app.pairs.state()) == 2)
    request = asyncio.create_task(stand.post(CHAT, chat(reasoning=VOTE | options)))
    await d0.expect(wire.Decode)
    return request, d0, d1


def states(reply: Any) -> list[tuple[int, str, str]]:
    found = [(s["index"], s["state"], s["answer"]) for s in reply.json()["reasoning"]["samples"]]
    return sorted(found)


async def test_another_worker_draws_the_lost_samples_by_their_numbers(stand: Stand) -> None:
    request, d0, d1 = await begun(stand, telling(1))
    await stand.until(lambda: stand.app.link.open_refs() != [])
    while not (fanouts := [d for d in _shares(stand) if d.told]):
        await asyncio.sleep(0.005)
    assert fanouts[0].left == [0, 2, 3]
    await d0.die()
    again = await d1.expect(wire.Decode)
    assert (again.first, msgspec.json.decode(again.body)["n"]) == (0, 4)
    assert again.ticket is not None
    reply = await request
    assert states(reply) == [
        (0, "finished", "5"),
        (1, "finished", "7"),
        (2, "finished", "5"),
        (3, "finished", "5"),
    ]
    assert (await d1.expect(wire.Cancel)).samples == (1,)
    report = reply.json()
    assert report["reasoning"]["samples_redrawn"] == 3
    assert report["usage"]["completion_tokens"] == 5 * 4
    assert stand.metric("braid_retries_total", stage="sample", reason="decode_lost") == 3


async def test_a_sample_is_drawn_at_most_twice(stand: Stand) -> None:
    request, d0, d1 = await begun(stand, telling(0))
    d1.script = telling(2)
    await stand.worker("decode", "d2", rest)
    while not any(share.told for share in _shares(stand)):
        await asyncio.sleep(0.005)
    await d0.die()
    lost = d1 if await _asked(d1) else None
    assert lost is d1
    while not any(2 in share.told for share in _shares(stand)):
        await asyncio.sleep(0.005)
    await d1.die()
    found = states(await request)
    assert [state for _, state, _ in found] == ["finished", "failed", "finished", "failed"]


async def test_a_hedged_straggler_counts_once_and_its_other_copy_is_cancelled(stand: Stand) -> None:
    request, d0, d1 = await begun(stand, telling(0, 1, 3), stragglers="hedge", straggler_factor=2.0)
    reply = await request
    assert [(i, state) for i, state, _ in states(reply)] == [(i, "finished") for i in range(4)]
    assert states(reply)[2][2] == "5"
    assert (await d1.expect(wire.Decode)).first == 2
    assert (await d0.expect(wire.Cancel)).samples == (2,)
    assert reply.json()["reasoning"]["samples_redrawn"] == 1


async def test_a_cut_straggler_is_not_waited_for(stand: Stand) -> None:
    async def slow(worker: FakeWorker, message: wire.Decode) -> None:
        for index in (0, 1, 3):
            await worker.send(sample(message, index, "The answer is 7."))
        cancel = await worker.expect(wire.Cancel)
        assert cancel.samples == (2,)
        await worker.send(wire.Sample(message.ref, 2, "cancelled", tokens=9), group_done(message, 4))

    request, _, d1 = await begun(stand, slow, stragglers="cut")
    reply = await request
    assert [state for _, state, _ in states(reply)] == ["finished", "finished", "stopped_early", "finished"]
    assert not d1.got(wire.Decode)


@pytest.mark.parametrize("told", [(0, 1, 2), ()], ids=["begun", "not begun"])
@pytest.mark.parametrize("on_failure", ["partial", "all"])
async def test_a_cancelled_sample_is_not_drawn_again(
    stand: Stand, told: tuple[int, ...], on_failure: str
) -> None:
    """The answer was decided, and waited for a whole new generation."""
    request, d0, d1 = await begun(stand, telling(*told), early_stop=True, on_failure=on_failure)
    if told:
        assert (await d0.expect(wire.Cancel)).samples == (3,)
    else:
        (share,) = _shares(stand)
        (fanout,) = _fanouts(share)
        fanout.cancel(range(4))
    await d0.die()
    reply = await request
    assert d1.got(wire.Decode) == []
    if told:
        assert [state for _, state, _ in states(reply)] == ["finished"] * 3 + ["stopped_early"]
        assert reply.json()["reasoning"]["stopped_early"] == "decided"


async def test_of_a_share_that_moves_what_was_cancelled_stays_cancelled(stand: Stand) -> None:
    request, d0, d1 = await begun(stand, silent)
    (share,) = _shares(stand)
    (fanout,) = _fanouts(share)
    fanout.cancel((1, 2))
    await d0.die()
    assert (await d1.expect(wire.Decode)).first == 0
    reply = await request
    assert (await d1.expect(wire.Cancel)).samples == (1, 2)
    assert [state for _, state, _ in states(reply)] == [
        "finished",
        "stopped_early",
        "stopped_early",
        "finished",
    ]


async def test_at_the_requests_own_deadline_the_tokens_are_counted(make_stand: MakeStand) -> None:
    """They are told when a share ends, which nobody waited for: an answer of two samples had cost nothing."""
    stand = await make_stand(request_timeout_s=1.0)
    await stand.workers(decode=telling(0, 2))
    reply = await stand.post(CHAT, chat(reasoning=VOTE))
    assert reply.status_code == 200
    assert reply.json()["reasoning"]["stopped_early"] == "deadline"
    usage = reply.json()["usage"]
    assert (usage["completion_tokens"], usage["prompt_tokens"] > 0) == (10, True)


async def test_at_the_deadline_the_answer_does_not_wait_for_a_slow_worker(stand: Stand) -> None:
    """The worker never answers the cancel, and the close of a group would wait five seconds for it."""
    loop = asyncio.get_running_loop()
    request, d0, _ = await begun(stand, telling(0, 2), deadline_s=1.0)
    since = loop.time()
    reply = await request
    assert loop.time() - since < 1.0 + 5.0
    assert reply.json()["reasoning"]["stopped_early"] == "deadline"
    assert [state for _, state, _ in states(reply)] == ["finished", "stopped_early"] * 2
    assert reply.json()["usage"]["completion_tokens"] == 10
    await d0.expect(wire.Cancel)


async def test_nothing_finished_by_the_deadline_is_a_504_that_says_so(stand: Stand) -> None:
    request, _, _ = await begun(stand, silent, deadline_s=0.2)
    reply = await request
    assert reply.status_code == 504
    assert "within deadline_s" in reply.json()["error"]["message"]


def _fanouts(share: Any) -> list[Any]:
    """The fan-outs that run a share."""
    return [one for one in gc.get_objects() if type(one) is Fanout and share in one.shares]


def _shares(stand: Stand) -> list[Any]:
    dispatches = stand.app.link._table.values()
    return [d.owner for d in dispatches if hasattr(d.owner, "told")]


async def _asked(worker: FakeWorker) -> bool:
    return (await worker.expect(wire.Decode)).mode == "samples"
