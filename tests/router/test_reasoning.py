"""Strategies end to end: the request extension, the group on the workers, the reply."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from braid import wire
from tests.router.conftest import CHAT, COMPLETIONS, MakeStand, Stand, chat
from tests.router.fake_worker import (
    FakeWorker,
    decode_fails,
    group_done,
    sample,
    silent,
)

VOTE = {"strategy": "self_consistency", "n": 4, "early_stop": False}


def votes(*answers: int, hold: int = 0) -> Any:
    """A script whose samples answer these numbers; the last ``hold`` wait until they are cancelled."""

    async def script(worker: FakeWorker, message: wire.Decode) -> None:
        n = msgspec.json.decode(message.body)["n"]
        mine = list(enumerate(answers))[message.first : message.first + n]
        finished = mine[: len(mine) - hold]
        for index, answer in finished:
            await worker.send(sample(message, index, f"The answer is {answer}."))
        if hold:
            cancel = await worker.expect(wire.Cancel)
            for index in cancel.samples or ():
                await worker.send(wire.Sample(message.ref, index, "cancelled", tokens=2))
        await worker.send(
            msgspec.structs.replace(group_done(message, n), choice_tokens=5 * len(finished) + 2 * hold)
        )

    return script


async def test_a_vote_by_the_reasoning_field(stand: Stand) -> None:
    p0, d0 = await stand.workers(decode=votes(7, 5, 7, 7))
    reply = await stand.post(CHAT, chat(reasoning=VOTE))
    body = reply.json()
    assert "7" in body["choices"][0]["message"]["content"]
    assert (body["object"], len(body["choices"])) == ("chat.completion", 1)
    assert body["reasoning"]["strategy"] == "self_consistency"
    assert body["reasoning"]["votes"][0]["votes"] == 3
    assert body["usage"]["prompt_tokens"] == 7
    assert body["usage"]["completion_tokens"] == 20
    assert body["braid"]["decode"]["d0"]["path"] == "remote"
    assert reply.headers["x-braid-kv-transfers"] == "1"
    decode = await d0.expect(wire.Decode)
    assert (decode.mode, decode.ticket) == ("samples", (await p0.expect(wire.Prefill)).ticket)
    assert {"reasoning", "stream"}.isdisjoint(msgspec.json.decode(decode.body))


async def test_a_vote_by_the_models_name(stand: Stand) -> None:
    _, d0 = await stand.workers(decode=votes(7, 7, 7, 5))
    reply = await stand.openai().chat.completions.create(
        model="demo+self_consistency:4", messages=[{"role": "user", "content": "hi"}]
    )
    assert (reply.model_extra or {})["reasoning"]["n"] == 4
    body = msgspec.json.decode((await d0.expect(wire.Decode)).body)
    assert (body["model"], body["n"]) == ("demo", 4)


async def test_a_decided_vote_cancels_the_rest_and_counts_their_tokens(stand: Stand) -> None:
    _, d0 = await stand.workers(decode=votes(7, 7, 7, 1, hold=1))
    reply = await stand.post(CHAT, chat(reasoning={**VOTE, "early_stop": True}))
    assert (await d0.expect(wire.Cancel)).samples == (3,)
    states = [s["state"] for s in reply.json()["reasoning"]["samples"]]
    assert states == ["finished"] * 3 + ["stopped_early"]
    assert reply.json()["usage"]["completion_tokens"] == 17


async def test_a_group_over_two_workers_is_one_vote(make_stand: MakeStand) -> None:
    stand = await make_stand(spread="spread")
    await stand.workers(decode=votes(7, 7, 5, 7), decoders=2)
    body = (await stand.post(CHAT, chat(reasoning=VOTE))).json()
    assert [s["index"] for s in body["reasoning"]["samples"]] == [0, 1, 2, 3]
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 20,
        "total_tokens": 27,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 15},
    }
    assert body["braid"]["kv_transfers"] == 2


async def test_only_the_samples_of_a_lost_worker_fail_where_nobody_else_can_draw_them(
    make_stand: MakeStand,
) -> None:
    async def one_then_silence(worker: FakeWorker, message: wire.Decode) -> None:
        await worker.send(sample(message, message.first, "The answer is 7."))
        await silent(worker, message)

    stand = await make_stand(spread="spread")
    await stand.workers(decoders=0)
    d0 = await stand.worker("decode", "d0", one_then_silence)
    d1 = await stand.worker("decode", "d1", votes(7, 7, 7, 7))
    await stand.until(lambda: sum(p["verified"] for p in stand.app.pairs.state()) == 2)
    events = []
    body = chat(stream=True, reasoning=VOTE)
    async with stand.http.stream("POST", CHAT, json=body) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                events.append(msgspec.json.decode(line[6:]))
            if len(events) == 3:
                await d1.send(wire.Bye())
                await stand.until(lambda: len(stand.app.registry.ready("decode", "demo")) == 1)
                await d0.die()
    samples = events[-1]["reasoning"]["samples"]
    assert [s["state"] for s in samples] == ["finished", "failed", "finished", "finished"]


async def test_a_stream_tells_progress_then_the_winner_then_the_report(stand: Stand) -> None:
    await stand.workers(decode=votes(7, 5, 7, 7))
    stream = await stand.openai().chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"reasoning": VOTE},
    )
    chunks = [chunk async for chunk in stream]
    told = [(c.model_extra or {}).get("reasoning", {}) for c in chunks]
    assert [t["event"] for t in told if "event" in t] == ["sample"] * 4 + ["decided"]
    *_, text, finish, usage = chunks
    assert text.choices[0].delta.content == "The answer is 7."
    assert finish.choices[0].finish_reason == "stop"
    assert (finish.model_extra or {})["braid"]["path"] == "remote"
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 20


async def test_a_completion_takes_a_strategy_too(stand: Stand) -> None:
    await stand.workers(decode=votes(7, 7, 7, 7))
    reply = await stand.openai().completions.create(
        model="demo", prompt="hi", extra_body={"reasoning": {**VOTE, "cot": False}}
    )
    assert (reply.object, reply.choices[0].text) == ("text_completion", "The answer is 7.")


async def test_direct_is_a_plain_request(stand: Stand) -> None:
    _, d0 = await stand.workers()
    reply = await stand.post(CHAT, chat(reasoning={"strategy": "direct", "n": 2}))
    assert len(reply.json()["choices"]) == 2
    assert (await d0.expect(wire.Decode)).mode == "http"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"reasoning": 5}, "object"),
        ({"reasoning": {}}, "self_consistency"),
        ({"reasoning": {"strategy": "nope"}}, "self_consistency"),
        ({"reasoning": {"strategy": 5}}, "self_consistency"),
        ({"model": "demo+nope"}, "self_consistency"),
        ({"model": "demo+cot:x"}, "suffix"),
        ({"model": "demo+cot", "reasoning": {"strategy": "best_of_n"}}, "contradict"),
        ({"model": "demo+self_consistency:4", "n": 5}, "contradict"),
        ({"model": "demo+self_consistency:4", "reasoning": {"n": 5}}, "contradict"),
        ({"n": 3, "reasoning": VOTE}, "contradict"),
        ({"reasoning": {**VOTE, "n": 10**6}}, "n must be"),
        ({"reasoning": {**VOTE, "n": 0}}, "n must be"),
        ({"reasoning": {**VOTE, "n": True}}, "n must be"),
        ({"reasoning": {**VOTE, "what": 1}}, "option"),
        ({"reasoning": {**VOTE, "extractor": "nope"}}, "extractor"),
        ({"reasoning": {**VOTE, "deadline_s": -1}}, "deadline_s"),
        ({"temperature": 0, "reasoning": VOTE}, "temperature"),
    ],
)
async def test_a_bad_extension_is_refused(stand: Stand, fields: dict[str, Any], word: str) -> None:
    _, d0 = await stand.workers()
    reply = await stand.post(CHAT, chat(**fields))
    assert (reply.status_code, word in reply.json()["error"]["message"]) == (400, True)
    assert d0.got(wire.Decode) == []


async def test_several_prompts_take_no_strategy(stand: Stand) -> None:
    await stand.workers()
    reply = await stand.post(COMPLETIONS, {"model": "demo", "prompt": ["a", "b"], "reasoning": VOTE})
    assert reply.status_code == 400


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engines_refusal_is_the_answer(stand: Stand, stream: bool) -> None:
    await stand.workers(decode=decode_fails(400, "too long"))
    reply = await stand.post(CHAT, chat(reasoning=VOTE, stream=stream))
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "too long")


async def test_leaving_cancels_the_group(stand: Stand) -> None:
    p0, d0 = await stand.workers(prefill=silent, decode=silent)
    request = asyncio.create_task(stand.post(CHAT, chat(reasoning=VOTE)))
    await d0.expect(wire.Decode)
    request.cancel()
    assert (await d0.expect(wire.Cancel)).samples is None
    await p0.expect(wire.Cancel)


async def test_the_groups_deadline_is_kept_though_a_worker_is_silent(stand: Stand) -> None:
    _, d0 = await stand.workers(decode=votes(7, 7, 7, 1, hold=1))
    reply = await stand.post(CHAT, chat(reasoning={**VOTE, "deadline_s": 0.2}))
    assert reply.json()["reasoning"]["stopped_early"] == "deadline"
    assert (await d0.expect(wire.Cancel)).samples == (3,)


async def test_a_malformed_choice_is_a_failed_sample(stand: Stand) -> None:
    async def script(worker: FakeWorker, message: wire.Decode) -> None:
        for index in range(3):
            await worker.send(sample(message, index, "The answer is 7."))
        await worker.send(
            wire.Sample(message.ref, 3, "finished", b"nope"), wire.Sample(message.ref, 99, "finished")
        )
        await worker.send(group_done(message, 4))

    await stand.workers(decode=script)
    report = (await stand.post(CHAT, chat(reasoning=VOTE))).json()["reasoning"]
    assert [s["state"] for s in report["samples"]] == ["finished"] * 3 + ["failed"]


async def test_the_routers_trigger_is_the_default(make_stand: MakeStand) -> None:
    stand = await make_stand(trigger="Think hard.")
    _, d0 = await stand.workers(decode=votes(7))
    assert (await stand.post(CHAT, chat(reasoning={"strategy": "cot"}))).status_code == 200
    body = msgspec.json.decode((await d0.expect(wire.Decode)).body)
    assert body["messages"][-1]["content"].endswith("Think hard.")
