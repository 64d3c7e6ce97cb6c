"""Two models behind one router: each runs on its own workers, and strategies run over both."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from braid import wire
from tests.router.conftest import CHAT, MakeStand, Stand, chat
from tests.router.fake_worker import FakeWorker, answer_samples, decode_fails, group_done, sample

BOTH = ["small", "demo"]


def says(answer: int) -> Callable[[FakeWorker, wire.Decode], Awaitable[None]]:
    async def script(worker: FakeWorker, message: wire.Decode) -> None:
        n = msgspec.json.decode(message.body)["n"]
        for index in range(message.first, message.first + n):
            await worker.send(sample(message, index, f"The answer is {answer}."))
        await worker.send(group_done(message, n))

    return script


@pytest.fixture
async def two(stand: Stand) -> dict[str, FakeWorker]:
    """A prefill and a decode worker of each model; the small one's prompts are computed apart."""
    found = {}
    for model, fingerprint, answer in (("demo", "f", 7), ("small", "s", 4)):
        which: dict[str, Any] = {"models": (model,), "fingerprint": fingerprint}
        found[f"p-{model}"] = await stand.worker("prefill", f"p-{model}", **which)
        found[f"d-{model}"] = await stand.worker("decode", f"d-{model}", says(answer), **which)
    await stand.until(lambda: stand.app.pairs.ready())
    return found


async def test_pairs_are_of_one_model_and_each_models_readiness_is_told(
    stand: Stand, two: dict[str, FakeWorker]
) -> None:
    state = (await stand.http.get("/cluster")).json()
    assert state["models_ready"] == {"demo": True, "small": True}
    assert {(p["prefill"], p["decode"]) for p in state["pairs"]} == {
        ("p-demo", "d-demo"),
        ("p-small", "d-small"),
    }
    listed = (await stand.http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["demo", "small"]


async def test_a_request_without_a_model_is_refused_with_the_list(
    stand: Stand, two: dict[str, FakeWorker]
) -> None:
    reply = await stand.post(CHAT, {"messages": [{"role": "user", "content": "hi"}]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")
    assert "demo, small" in reply.json()["error"]["message"]


async def test_each_models_share_has_a_ticket_of_its_own_prefill_worker(
    stand: Stand, two: dict[str, FakeWorker]
) -> None:
    strategy = {"strategy": "ensemble", "n": 2, "models": BOTH, "early_stop": False}
    reply = (await stand.post(CHAT, chat(reasoning=strategy))).json()
    for model in BOTH:
        share = await two[f"d-{model}"].expect(wire.Decode)
        assert share.ticket is not None
        assert share.ticket.producer == f"p-{model}"
        assert msgspec.json.decode(share.body)["model"] == model
    assert [(m["model"], m["tokens"]) for m in reply["reasoning"]["models"]] == [("small", 10), ("demo", 10)]
    assert [reply["usage"][f"{kind}_tokens"] for kind in ("prompt", "completion", "total")] == [14, 20, 34]
    assert reply["braid"]["kv_transfers"] == 2


async def test_a_cascade_asks_the_dear_model_only_where_it_must(
    stand: Stand, two: dict[str, FakeWorker]
) -> None:
    strategy = {"strategy": "cascade", "n": 4, "models": BOTH}
    reply = (await stand.post(CHAT, chat(reasoning=strategy))).json()
    assert (reply["reasoning"]["answer"], reply["reasoning"]["model"]) == ("4", "small")
    assert not two["d-demo"].got(wire.Decode)


async def test_a_model_that_is_not_served_is_refused_with_the_list(
    stand: Stand, two: dict[str, FakeWorker]
) -> None:
    strategy = {"strategy": "cascade", "models": ["small", "none"]}
    reply = await stand.post(CHAT, chat(reasoning=strategy))
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (404, "reasoning.models", "model_not_found")
    assert "demo, small" in error["message"]


async def test_models_are_named_by_the_client_or_by_the_operator(make_stand: MakeStand) -> None:
    stand = await make_stand()
    await stand.workers()
    none: list[list[str] | None] = [None, []]
    for models in none:
        reply = await stand.post(CHAT, chat(reasoning={"strategy": "cascade", "models": models}))
        assert reply.status_code == 400
        assert "model_order" in reply.json()["error"]["message"]
    ordered = await make_stand(model_order=("demo",))
    await ordered.workers(decode=says(4))
    reply = await ordered.post(CHAT, chat(model="demo+cascade"))
    assert [m["model"] for m in reply.json()["reasoning"]["models"]] == ["demo"]
    listed = (await ordered.http.get("/v1/strategies")).json()["data"]
    (cascade,) = [one for one in listed if one["id"] == "cascade"]
    assert cascade["schema"]["properties"]["models"]["default"] == ["demo"]


@pytest.mark.parametrize("models", [7, ["demo", 7], "demo"])
async def test_models_that_are_no_list_of_names_are_refused(stand: Stand, models: object) -> None:
    await stand.workers()
    reply = await stand.post(CHAT, chat(reasoning={"strategy": "ensemble", "models": models}))
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("reasoning.models")


async def test_a_model_that_is_gone_is_passed_over(stand: Stand, two: dict[str, FakeWorker]) -> None:
    await two["d-small"].die()
    await stand.until(lambda: stand.app.registry.models() == ["demo"])
    reply = (await stand.post(CHAT, chat(reasoning={"strategy": "cascade", "models": BOTH}))).json()
    assert (reply["reasoning"]["answer"], reply["reasoning"]["model"]) == ("7", "demo")
    assert "decode worker" in reply["reasoning"]["models"][0]["error"]


async def test_a_prompt_too_long_for_the_small_model_goes_to_the_large_one(stand: Stand) -> None:
    await stand.worker("decode", "d-small", decode_fails(400), models=("small",))
    await stand.worker("decode", "d-demo", says(7), models=("demo",))
    reply = (await stand.post(CHAT, chat(reasoning={"strategy": "cascade", "models": BOTH}))).json()
    assert (reply["reasoning"]["answer"], reply["reasoning"]["model"]) == ("7", "demo")


async def test_a_model_without_prefill_workers_by_design_is_ready_with_a_decode_worker(
    make_stand: MakeStand,
) -> None:
    stand = await make_stand(local_models=("small",))
    await stand.workers()
    await stand.worker("decode", "d-small", answer_samples, models=("small",), fingerprint="s")
    assert stand.app.pairs.ready_models() == {"demo": True, "small": True}
    reply = await stand.post(CHAT, chat(model="small", reasoning={"strategy": "self_consistency", "n": 2}))
    assert reply.headers["x-braid-path"] == "local"
    other = await make_stand()
    await other.workers()
    await other.worker("decode", "d-small", models=("small",), fingerprint="s")
    assert other.app.pairs.ready_models() == {"demo": True, "small": False}


async def test_a_verifier_of_another_model_runs_on_its_workers(make_stand: MakeStand) -> None:
    judge = {"kind": "generative", "model": "small", "k": 1}
    stand = await make_stand(verifiers={"judge": judge})
    await stand.workers(decode=says(7))
    small = await stand.worker("decode", "d-small", says(4), models=("small",), fingerprint="s")
    strategy = {"strategy": "best_of_n", "n": 2, "reward": "judge"}
    assert (await stand.post(CHAT, chat(reasoning=strategy))).status_code == 200
    asked = await small.expect(wire.Decode)
    assert (asked.after, msgspec.json.decode(asked.body)["model"]) == ("", "small")
