"""Several groups of one request on the workers: numbers, seeds, accounting; and the list of strategies."""

from __future__ import annotations

from typing import Any

import msgspec

from braid import wire
from decode_server.seeds import sample_seed
from router.sampler import GroupUsage, as_one
from tests.router.conftest import CHAT, MakeStand, Stand, chat
from tests.router.fake_worker import FakeWorker, group_done, sample
from tests.router.test_reasoning import votes

ESC = {"strategy": "early_stopping_consistency", "n": 10, "window": 5}
SPLIT = (7, 5, 6, 7, 8, 7, 7, 7, 7, 7)


def numbers(decodes: list[wire.Decode]) -> list[int]:
    return [d.first + i for d in decodes for i in range(msgspec.json.decode(d.body)["n"])]


async def test_samples_are_numbered_over_all_waves_and_workers(make_stand: MakeStand) -> None:
    stand = await make_stand(spread="spread")
    _, d0, d1 = await stand.workers(decode=votes(*SPLIT), decoders=2)
    body = (await stand.post(CHAT, chat(reasoning=ESC, seed=3))).json()
    decodes = [*d0.got(wire.Decode), *d1.got(wire.Decode)]
    assert sorted(numbers(decodes)) == list(range(10))
    assert [s["index"] for s in body["reasoning"]["samples"]] == list(range(10))
    assert (body["reasoning"]["answer"], body["reasoning"]["stopped_early"]) == ("7", None)
    assert len({d.request_id for d in decodes}) == 2, "one a wave"
    seeds = {sample_seed(3, number) for number in numbers(decodes)}
    assert seeds == {sample_seed(3, number) for number in range(10)}, "those of one group of ten"
    assert {msgspec.json.decode(d.body)["seed"] for d in decodes} == {3}


async def test_the_prompt_of_all_waves_counts_once_and_kv_adds_up(stand: Stand) -> None:
    await stand.workers(decode=votes(*SPLIT))
    body = (await stand.post(CHAT, chat(reasoning=ESC))).json()
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 50,
        "total_tokens": 57,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 45},
    }
    assert body["braid"]["kv_transfers"] == 2


async def test_a_share_of_a_later_wave_that_moves_keeps_its_numbers(stand: Stand) -> None:
    async def refuses_the_second(worker: FakeWorker, message: wire.Decode) -> None:
        if message.first >= 5:
            await worker.send(wire.GroupDone(message.ref, 503))
        else:
            await votes(*SPLIT)(worker, message)

    await stand.workers(decoders=0)
    d0 = await stand.worker("decode", "d0", refuses_the_second)
    d1 = await stand.worker("decode", "d1", refuses_the_second)
    await stand.until(lambda: sum(p["verified"] for p in stand.app.pairs.state()) == 2)
    body = (await stand.post(CHAT, chat(reasoning=ESC))).json()
    refused = [d for d in (*d0.got(wire.Decode), *d1.got(wire.Decode)) if d.first >= 5]
    assert [d.first for d in refused] == [5, 5], "both were asked for the same samples"
    report = body["reasoning"]
    assert [s["state"] for s in report["samples"]] == ["finished"] * 5 + ["failed"] * 5
    assert (report["answer"], report["stopped_early"]) == ("7", "failed")


async def test_a_sample_of_a_later_wave_is_cancelled_by_its_number(stand: Stand) -> None:
    async def script(worker: FakeWorker, message: wire.Decode) -> None:
        if message.first == 0:
            await votes(*SPLIT)(worker, message)
            return
        await worker.send(sample(message, 5, "The answer is 7."))
        cancel = await worker.expect(wire.Cancel)
        assert cancel.samples == (6, 7, 8, 9)
        await worker.send(*(wire.Sample(message.ref, i, "cancelled", tokens=1) for i in cancel.samples))
        await worker.send(msgspec.structs.replace(group_done(message, 1), choice_tokens=9))

    await stand.workers(decode=script)
    report = (await stand.post(CHAT, chat(reasoning={**ESC, "budget_tokens": 30}))).json()["reasoning"]
    assert [s["state"] for s in report["samples"]] == ["finished"] * 6 + ["stopped_early"] * 4
    assert (report["stopped_early"], report["tokens"]) == ("budget_tokens", 34)


async def test_another_prompt_of_the_request_counts_too(stand: Stand) -> None:
    await stand.workers(decode=votes(7, 7, 7))
    body = (await stand.post(CHAT, chat(reasoning={"strategy": "universal_consistency", "n": 2}))).json()
    assert body["usage"]["prompt_tokens"] == 14
    assert [s.get("role") for s in body["reasoning"]["samples"]] == [None, None, "selection"]


async def test_a_default_n_is_cut_to_the_routers_limit(make_stand: MakeStand) -> None:
    stand = await make_stand(max_n=6)
    await stand.workers(decode=votes(7, 5, 6, 8, 9, 7))
    report = (await stand.post(CHAT, chat(model="demo+early_stopping_consistency"))).json()["reasoning"]
    assert (report["n"], len(report["samples"])) == (6, 6)


async def test_a_stream_tells_of_every_wave(stand: Stand) -> None:
    await stand.workers(decode=votes(*SPLIT))
    events: list[dict[str, Any]] = []
    async with stand.http.stream("POST", CHAT, json=chat(reasoning=ESC, stream=True)) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                events.append(msgspec.json.decode(line[6:]).get("reasoning", {}))
    assert [e["index"] for e in events if e.get("event") == "sample"] == list(range(10))
    assert events[-1]["answer"] == "7"


async def test_strategies_are_listed_with_parameters_and_schema(make_stand: MakeStand) -> None:
    stand = await make_stand(trigger="Think hard.")
    reply = (await stand.http.get("/v1/strategies")).json()
    listed = {one["id"]: one for one in reply["data"]}
    assert reply["object"] == "list"
    assert {"direct", "adaptive_consistency", "mixture_of_agents"} <= listed.keys()
    adaptive = listed["adaptive_consistency"]
    assert "wave" in adaptive["description"].lower()
    parameters = {one["name"]: one for one in adaptive["parameters"]}
    assert (parameters["n"]["default"], parameters["tau"]["default"]) == (40, 0.95)
    assert parameters["trigger"]["default"] == "Think hard."
    assert adaptive["schema"]["properties"]["tau"]["exclusiveMinimum"] == 0.5
    assert (await stand.http.post("/v1/strategies")).status_code == 405


def test_usages_of_waves_are_one() -> None:
    remote = wire.KvRecord("remote", transfers=1, nbytes=10, blocks=2)
    cached = wire.KvRecord("remote", blocks_cached=2)
    waves = [
        GroupUsage(100, 20, 50, {"d0": remote}, "p0"),
        GroupUsage(100, 100, 30, {"d0": cached, "d1": remote}, ""),
        GroupUsage(0, 0, 5),
    ]
    one = as_one(waves)
    assert (one.prompt_tokens, one.cached_tokens, one.completion_tokens, one.prefill) == (100, 20, 85, "p0")
    assert (one.kv["d0"].nbytes, one.kv["d0"].blocks_cached, one.kv["d1"].nbytes) == (10, 2, 10)
    assert as_one(waves[:1]) is waves[0]


async def test_a_later_prompt_that_is_long_is_prefilled_remotely_though_the_first_was_not(
    make_stand: MakeStand,
) -> None:
    stand = await make_stand(remote_min_chars=200)
    p0, d0 = await stand.workers(decode=votes(7, 7, 7))
    reply = await stand.post(CHAT, chat(reasoning={"strategy": "universal_consistency", "n": 2}))
    assert reply.status_code == 200
    assert [d.reason for d in d0.got(wire.Decode)] == ["short", ""]
    await p0.expect(wire.Prefill)  # it may be read after the reply
    assert len(p0.got(wire.Prefill)) == 1
