"""Simulated workers behind the real router: every way a request can go."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from braid import wire
from braid.keys import make_keys
from tests.router.conftest import CHAT, COMPLETIONS
from tests.sim.conftest import Fleet

pytestmark = pytest.mark.slow

BLOCK_BYTES = 32 * 4096
SLOW = {"sim_time_scale": 20.0}
"""A hundred milliseconds a step and more."""
LONG = "count the eggs in the basket " * 40


def ask(text: str = "How many eggs? [sim answer=42]", **fields: Any) -> dict[str, Any]:
    return {"model": "sim", "messages": [{"role": "user", "content": text}], **fields}


def texts(reply: httpx.Response) -> list[str]:
    assert reply.status_code == 200, reply.text
    return [choice["message"]["content"] for choice in reply.json()["choices"]]


async def test_a_reply_says_that_it_is_simulated_and_how_its_kv_came(fleet: Fleet) -> None:
    await fleet.pairs()
    reply = await fleet.stand.post(CHAT, ask(LONG, seed=1))
    body = reply.json()
    assert body["model"] == "sim"
    assert body["system_fingerprint"].startswith("sim-")
    blocks = -(-body["usage"]["prompt_tokens"] // 32)
    assert reply.headers["x-braid-path"] == "remote"
    assert reply.headers["x-braid-kv-bytes"] == str(blocks * BLOCK_BYTES)
    assert reply.headers["x-braid-kv-transport"] == "counted"
    record = body["braid"]["decode"]["d0"]
    assert (record["blocks"], record["blocks_cached"]) == (blocks, 0)
    cluster = (await fleet.stand.http.get("/cluster")).json()
    assert {worker["vllm_version"] for worker in cluster["workers"]} == {"simulated"}


async def test_blocks_that_decode_has_are_not_moved_again(fleet: Fleet) -> None:
    await fleet.pairs()
    first = (await fleet.stand.post(CHAT, ask(LONG))).json()
    second = (await fleet.stand.post(CHAT, ask(LONG))).json()
    record = second["braid"]["decode"]["d0"]
    assert record["blocks_cached"] == first["braid"]["decode"]["d0"]["blocks"] - 1
    assert (record["blocks"], record["kv_bytes"]) == (1, BLOCK_BYTES)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 32 * record["blocks_cached"]


async def test_a_stream_is_the_same_text_as_a_whole_reply(fleet: Fleet) -> None:
    await fleet.pairs()
    whole = await fleet.stand.post(CHAT, ask(seed=3, n=3))
    client = fleet.stand.openai()
    streamed = {0: "", 1: "", 2: ""}
    finished: dict[int, str] = {}
    messages: Any = ask()["messages"]
    async for chunk in await client.chat.completions.create(
        model="sim", messages=messages, seed=3, n=3, stream=True, stream_options={"include_usage": True}
    ):
        assert chunk.system_fingerprint is not None
        assert chunk.system_fingerprint.startswith("sim-")
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                finished[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert [streamed[i] for i in range(3)] == texts(whole)
    assert finished == {0: "stop", 1: "stop", 2: "stop"}
    assert usage is not None
    assert usage.completion_tokens == whole.json()["usage"]["completion_tokens"]


async def test_completions_take_several_prompts_and_give_logprobs(fleet: Fleet) -> None:
    await fleet.pairs()
    body = {"model": "sim", "prompt": ["one", "two two two"], "n": 2, "max_tokens": 6, "logprobs": 2}
    reply = (await fleet.stand.post(COMPLETIONS, body)).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    for choice in reply["choices"]:
        assert choice["finish_reason"] == "length"
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert len(choice["logprobs"]["token_logprobs"]) == 6


async def test_samples_do_not_depend_on_where_they_run(make_fleet: Any) -> None:
    packed: Fleet = await make_fleet()
    await packed.pairs(decode=1)
    spread: Fleet = await make_fleet(spread="spread")
    await spread.pairs(decode=3)
    body = ask(seed=5, n=7)
    one, three = await packed.stand.post(CHAT, body), await spread.stand.post(CHAT, body)
    assert texts(one) == texts(three)
    assert len(set(texts(one))) == 7
    assert len(three.json()["braid"]["decode"]) == 3


async def test_a_group_votes_for_the_right_answer(make_fleet: Any) -> None:
    fleet: Fleet = await make_fleet(spread="spread")
    await fleet.pairs(decode=2)
    body = ask("[sim answer=42 accuracy=0.8]", seed=1, reasoning={"strategy": "self_consistency", "n": 16})
    replies = [await fleet.stand.post(CHAT, body) for _ in range(2)]
    reports = [reply.json()["reasoning"] for reply in replies]
    assert [str(report["answer"]) for report in reports] == ["42", "42"]
    finished = [[s for s in r["samples"] if s["state"] == "finished"] for r in reports]
    for sample in finished[0]:
        same = [other for other in finished[1] if other["index"] == sample["index"]]
        assert not same or same[0]["answer"] == sample["answer"]


async def test_a_strategy_of_several_calls_runs(fleet: Fleet) -> None:
    await fleet.pairs()
    body = ask(seed=1, reasoning={"strategy": "self_refine", "rounds": 1})
    assert (await fleet.stand.post(CHAT, body)).status_code == 200


async def test_kept_samples_are_let_go_after_the_reply(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    await fleet.pairs()
    link = fleet.stand.app.link
    send, held = link.send, list[tuple[Any, wire.ToWorker]]()

    def late(worker: Any, message: wire.ToWorker) -> None:
        if isinstance(message, wire.Forget):
            held.append((worker, message))
        else:
            send(worker, message)

    monkeypatch.setattr(link, "send", late)
    body = ask(seed=1, reasoning={"strategy": "self_refine", "rounds": 1})
    assert (await fleet.stand.post(CHAT, body)).status_code == 200
    stats = fleet.workers[1].stats()
    assert held
    assert stats["kept"]
    assert stats["free"] < stats["blocks"]
    for one in held:
        asyncio.get_running_loop().call_later(0.1, send, *one)
    await fleet.settled()


@pytest.mark.parametrize("group", [False, True])
async def test_a_client_that_leaves_frees_every_block(fleet: Fleet, group: bool) -> None:
    await fleet.pairs()
    _, d0 = fleet.workers
    body = ask("[sim tokens=4000]", n=8) if not group else ask("[sim tokens=4000]")
    if group:
        body["reasoning"] = {"strategy": "self_consistency", "n": 8}
    request = asyncio.create_task(fleet.stand.post(CHAT, body))
    await fleet.until(lambda: len(d0.engine.scheduler.running) == 8)
    request.cancel()
    await fleet.until(lambda: not d0.engine.scheduler.running)
    await fleet.settled()


async def test_a_client_that_leaves_during_the_transfer_frees_its_blocks(fleet: Fleet) -> None:
    p0 = await fleet.add("prefill", "p0", **SLOW)
    d0 = await fleet.add("decode", "d0")
    await fleet.paired()
    request = asyncio.create_task(fleet.stand.post(CHAT, ask(LONG * 5)))
    await fleet.until(lambda: d0.stats()["imports"] == 1 and bool(p0.engine.scheduler.running))
    assert d0.stats()["free"] < d0.stats()["blocks"]
    request.cancel()
    await fleet.settled()


async def test_a_cluster_with_keys(make_fleet: Any, tmp_path: Path) -> None:
    make_keys(tmp_path)
    fleet: Fleet = await make_fleet(keys_dir=tmp_path)
    await fleet.pairs(keys_dir=tmp_path)
    assert (await fleet.stand.post(CHAT, ask(LONG))).headers["x-braid-path"] == "remote"


async def test_staging_that_is_full_makes_prompts_wait(fleet: Fleet) -> None:
    await fleet.add("prefill", "p0", staging_bytes=12 * BLOCK_BYTES)
    await fleet.add("decode", "d0")
    await fleet.paired()
    bodies = [ask(f"{i} {LONG}") for i in range(6)]  # ten blocks each
    replies = await asyncio.gather(*(fleet.stand.post(CHAT, body) for body in bodies))
    assert [reply.headers["x-braid-path"] for reply in replies] == ["remote"] * 6
    big = await fleet.stand.post(CHAT, ask(LONG * 2))
    assert big.headers["x-braid-path"] == "recomputed"


async def test_a_decided_vote_cancels_the_rest(fleet: Fleet) -> None:
    await fleet.pairs(sim_time_scale=1.0)
    body = ask("[sim answer=7 accuracy=1]", seed=2, reasoning={"strategy": "self_consistency", "n": 12})
    report = (await fleet.stand.post(CHAT, body)).json()["reasoning"]
    assert report["stopped_early"] == "decided"
    states = Counter(sample["state"] for sample in report["samples"])
    assert states["stopped_early"] >= 1


async def test_a_prefill_worker_killed_midway_leaves_the_prompt_to_decode(fleet: Fleet) -> None:
    p0 = await fleet.add("prefill", "p0", **SLOW)
    d0 = await fleet.add("decode", "d0")
    await fleet.paired()
    request = asyncio.create_task(fleet.stand.post(CHAT, ask(LONG * 5, seed=1)))
    await fleet.until(lambda: bool(p0.engine.scheduler.running) and not d0.service.idle())
    await p0.kill()
    reply = await request
    assert reply.status_code == 200
    assert reply.headers["x-braid-path"] == "recomputed"
    assert reply.json()["braid"]["decode"]["d0"]["reason"] == "prefill_lost"


async def test_a_killed_prefill_worker_is_replaced_by_another(fleet: Fleet) -> None:
    p0 = await fleet.add("prefill", "p0", **SLOW)
    await fleet.add("decode", "d0")
    await fleet.paired()
    request = asyncio.create_task(fleet.stand.post(CHAT, ask(LONG * 5, seed=1)))
    await fleet.until(lambda: bool(p0.engine.scheduler.running))
    await fleet.add("prefill", "p1")
    await fleet.paired(2)
    await p0.kill()
    reply = await request
    assert (reply.headers["x-braid-path"], reply.headers["x-braid-prefill"]) == ("remote", "p1")


async def test_a_decode_worker_killed_before_its_answer_is_replaced_unseen(fleet: Fleet) -> None:
    await fleet.add("prefill", "p0")
    d0 = await fleet.add("decode", "d0", **SLOW)
    await fleet.paired()
    request = asyncio.create_task(fleet.stand.post(CHAT, ask(seed=4)))
    await fleet.until(lambda: bool(d0.engine.scheduler.running))
    await fleet.add("decode", "d1")
    await fleet.paired(2)
    await d0.kill()
    reply = await request
    assert (reply.status_code, reply.headers["x-braid-decode"]) == (200, "d1")


async def test_a_deadline_ends_a_request_and_frees_its_blocks(make_fleet: Any) -> None:
    fleet: Fleet = await make_fleet(request_timeout_s=1.0)
    await fleet.pairs()
    reply = await fleet.stand.post(CHAT, ask("[sim tokens=8000]", n=4, ignore_eos=True, max_tokens=8000))
    assert reply.status_code == 504


async def test_a_worker_that_drains_ends_what_it_has(fleet: Fleet) -> None:
    _, d0 = await fleet.pairs()
    request = asyncio.create_task(fleet.stand.post(CHAT, ask("[sim tokens=200]")))
    await fleet.until(lambda: bool(d0.engine.scheduler.running))
    await d0.drain(60)
    assert (await request).status_code == 200
    assert (await fleet.stand.post(CHAT, ask())).status_code == 503


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": [{"role": "user", "content": "x" * 40_000}]}, "maximum context length is 8192"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "no tools"),
        ({"response_format": {"type": "json_object"}}, "no response_format"),
    ],
)
async def test_what_it_can_not_do_is_refused(fleet: Fleet, fields: dict[str, Any], says: str) -> None:
    await fleet.pairs()
    reply = await fleet.stand.post(CHAT, {**ask(), **fields})
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]
    grouped = {**ask(), **fields, "reasoning": {"strategy": "self_consistency", "n": 4}}
    assert (await fleet.stand.post(CHAT, grouped)).status_code == 400


async def test_a_prompt_is_counted_in_tokens_of_four_characters(fleet: Fleet) -> None:
    await fleet.pairs()
    reply = (await fleet.stand.post("/tokenize", {"model": "sim", "prompt": "abcdefghi"})).json()
    assert (reply["count"], reply["max_model_len"]) == (3, 8192)


async def test_work_is_queued_and_preempted_where_blocks_are_few(fleet: Fleet) -> None:
    _, d0 = await fleet.pairs(sim_blocks=40, sim_max_model_len=640)
    body = ask("[sim tokens=300]", n=16, seed=1)
    replies = await asyncio.gather(*(fleet.stand.post(CHAT, {**body, "seed": i}) for i in range(2)))
    assert all(len(texts(reply)) == 16 for reply in replies)
    assert d0.stats()["preempted"] > 0


@pytest.mark.slow
async def test_real_ends_move_synthetic_blocks(fleet: Fleet) -> None:
    pytest.importorskip("torch")
    await fleet.add("prefill", "p0", sim_kv="moved", staging_bytes=64 * 1024 * 1024)
    await fleet.add("decode", "d0", sim_kv="moved")
    await fleet.paired()
    reply = await fleet.stand.post(CHAT, ask(LONG, n=3))
    assert reply.headers["x-braid-path"] == "remote"
    assert reply.headers["x-braid-kv-transport"] == "shm"
    assert int(reply.headers["x-braid-kv-bytes"]) % BLOCK_BYTES == 0
    again = (await fleet.stand.post(CHAT, ask(LONG, n=3))).json()
    assert again["braid"]["decode"]["d0"]["blocks_cached"] > 0


async def test_a_group_on_four_decode_workers_is_gathered_once(
    make_fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from braid.sim import moved

    gathered, fill = list[bytes](), moved.fill

    def counted(out: Any, links: Sequence[bytes]) -> None:
        gathered.extend(links)
        fill(out, links)

    monkeypatch.setattr(moved, "fill", counted)
    fleet: Fleet = await make_fleet(spread="spread")
    await fleet.add("prefill", "p0", sim_kv="moved", staging_bytes=64 * 1024 * 1024)
    for i in range(4):
        await fleet.add("decode", f"d{i}", sim_kv="moved")
    await fleet.paired(4)
    gathered.clear()  # each pair's probe
    body = (await fleet.stand.post(CHAT, ask(LONG, n=16))).json()
    blocks = -(-body["usage"]["prompt_tokens"] // 32)
    told = body["braid"]["decode"]
    assert {name: record["blocks"] for name, record in told.items()} == dict.fromkeys(
        ("d0", "d1", "d2", "d3"), blocks
    )
    assert len(gathered) == len(set(gathered)) == blocks


async def test_workers_that_move_kv_differently_are_not_paired(fleet: Fleet) -> None:
    await fleet.add("prefill", "p0")
    await fleet.add("decode", "d0", sim_kv_bytes=8192)
    pairs = fleet.stand.app.pairs.state()
    assert pairs[0]["error"] == "bytes a token: 4096 on prefill, 8192 on decode"


async def test_many_workers_of_one_process_share_the_work(make_fleet: Any) -> None:
    fleet: Fleet = await make_fleet(max_inflight=2000, queue_limit=2000)
    await fleet.pairs(prefill=2, decode=16)
    bodies = [ask(f"question {i} [sim tokens=40]", n=1 + i % 4) for i in range(64)]
    replies = await asyncio.gather(*(fleet.stand.post(CHAT, body) for body in bodies))
    used = Counter(reply.headers["x-braid-decode"] for reply in replies)
    assert {reply.headers["x-braid-path"] for reply in replies} == {"remote"}
    assert len(used) == 16
    assert max(used.values()) <= 12
