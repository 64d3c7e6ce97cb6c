"""Verifiers and retrievers end to end: named in a request, configured at the router, run on its workers."""

from __future__ import annotations

from typing import Any

import msgspec

from braid import wire
from braid.services import VERIFY, GenerativeVerifier, HttpVerifier, RetrieverSettings
from tests.router.conftest import CHAT, COMPLETIONS, MakeStand, chat
from tests.router.fake_worker import FakeWorker, group_done, sample
from tests.router.web import Web, always, http

ANSWERS = ("The answer is 4.", "The answer is 5.")
VERDICT = wire.Verdict(("yes",), ("no",), 20)
P_YES = {ANSWERS[0]: 0.25, ANSWERS[1]: 0.75}


async def engine(worker: FakeWorker, message: wire.Decode) -> None:
    """Answers as :data:`ANSWERS`, verifies as :data:`P_YES`."""
    body = msgspec.json.decode(message.body)
    asks = body["messages"][-1]["content"]
    for index in range(message.first, message.first + body["n"]):
        if asks != VERIFY:
            await worker.send(sample(message, index, ANSWERS[index]))
            continue
        assert message.watch == VERDICT
        told = sample(message, index, "Verification: Yes")
        p = P_YES[body["messages"][-2]["content"]]
        await worker.send(msgspec.structs.replace(told, confidence=p))
    await worker.send(group_done(message, body["n"]))


async def test_answers_are_verified_where_they_are(make_stand: MakeStand) -> None:
    stand = await make_stand(spread="spread")
    _, d0, d1 = await stand.workers(decode=engine, decoders=2)
    reply = (await stand.post(CHAT, chat(reasoning={"strategy": "genrm", "n": 2, "k": 3}))).json()
    report = reply["reasoning"]
    assert (report["answer"], report["chosen"], report["score"]) == ("5", 1, 0.75)
    assert [one.get("of") for one in report["samples"]] == [None, None, 0, 0, 0, 1, 1, 1]
    assert reply["usage"]["completion_tokens"] == report["tokens"] == 40
    for worker, answer in ((d0, ANSWERS[0]), (d1, ANSWERS[1])):
        first, second = await worker.expect(wire.Decode), await worker.expect(wire.Decode, 2)
        body = msgspec.json.decode(second.body)
        assert (body["messages"][-2]["content"], body["n"], "logprobs" in body) == (answer, 3, False)
        assert (first.keep, second.keep, bool(second.after)) == (True, False, True)
        assert second.ticket is None, "its KV is here: nothing is prefilled"


async def test_a_completion_is_verified_too(make_stand: MakeStand) -> None:
    async def script(worker: FakeWorker, message: wire.Decode) -> None:
        verifies = VERIFY in msgspec.json.decode(message.body)["prompt"]
        assert verifies == (message.watch == VERDICT)
        told = sample(message, message.first, "Verification: Yes" if verifies else " 4")
        await worker.send(msgspec.structs.replace(told, confidence=0.75 if verifies else None))
        await worker.send(group_done(message, 1))

    stand = await make_stand()
    await stand.workers(decode=script)
    reasoning = {"strategy": "best_of_n", "n": 1, "reward": "self", "cot": False}
    body = {"model": "demo", "prompt": "2+2=", "reasoning": reasoning}
    assert (await stand.post(COMPLETIONS, body)).json()["reasoning"]["reward"] == 0.75


async def test_another_model_verifies_on_its_own_workers(make_stand: MakeStand) -> None:
    judge = {"judge": GenerativeVerifier(model="judge")}
    stand = await make_stand(verifiers=judge, verify_pairs=False)
    d0 = await stand.worker("decode", "d0", engine)
    other = await stand.worker("decode", "d1", engine, models=("judge",))
    reasoning = {"strategy": "best_of_n", "n": 2, "reward": "judge"}
    report = (await stand.post(CHAT, chat(reasoning=reasoning))).json()["reasoning"]
    assert (report["chosen"], len(d0.got(wire.Decode)), len(other.got(wire.Decode))) == (1, 1, 2)
    assert msgspec.json.decode((await other.expect(wire.Decode)).body)["model"] == "judge"


async def test_a_service_scores_by_name(make_stand: MakeStand) -> None:
    async def grade(payload: Any) -> bytes:
        return http({"score": float(payload["extracted"] == "4")})

    async with Web(grade) as web:
        stand = await make_stand(verifiers={"grader": HttpVerifier(kind="http", url=web.url)})
        await stand.workers(decode=engine)
        reasoning = {"strategy": "best_of_n", "n": 2, "reward": "grader"}
        report = (await stand.post(CHAT, chat(reasoning=reasoning))).json()["reasoning"]
        assert (report["chosen"], [one["score"] for one in report["samples"]]) == (0, [1.0, 0.0])
        assert stand.metric("braid_service_calls_total", service="verifier:grader", outcome="ok") == 2


async def test_documents_reach_the_worker(make_stand: MakeStand) -> None:
    found = {"documents": [{"text": "Two and two make four."}]}
    async with Web(always(http(found))) as web:
        stand = await make_stand(retrievers={"wiki": RetrieverSettings(url=web.url)})
        _, d0 = await stand.workers(decode=engine)
        report = (await stand.post(CHAT, chat(reasoning={"strategy": "retrieval"}))).json()["reasoning"]
        assert (report["then"], report["retriever"], len(report["documents"])) == ("cot", "wiki", 1)
        asked = msgspec.json.decode((await d0.expect(wire.Decode)).body)["messages"][-1]["content"]
        assert "[1] Two and two make four.\n\nQuestion:\nhi\n" in asked


async def test_the_list_names_them_without_their_addresses(make_stand: MakeStand) -> None:
    url = "http://127.0.0.1:1/secret"
    stand = await make_stand(
        verifiers={"grader": HttpVerifier(kind="http", url=url)},
        retrievers={"wiki": RetrieverSettings(url=url)},
    )
    told = (await stand.http.get("/v1/strategies")).json()
    assert told["verifiers"] == [
        {"id": "self", "kind": "generative"},
        {"id": "arithmetic", "kind": "check"},
        {"id": "logprob", "kind": "logprob"},
        {"id": "grader", "kind": "http"},
    ]
    assert told["retrievers"] == [{"id": "wiki"}]
    assert "secret" not in str(told)


async def test_an_unknown_name_is_a_bad_request(make_stand: MakeStand) -> None:
    stand = await make_stand()
    _, d0 = await stand.workers()
    for reasoning in ({"strategy": "genrm", "verifier": "nope"}, {"strategy": "retrieval"}):
        reply = await stand.post(CHAT, chat(reasoning=reasoning))
        assert (reply.status_code, "there" in reply.text or "none" in reply.text) == (400, True)
    assert d0.got(wire.Decode) == []
