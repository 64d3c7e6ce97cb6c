"""A group's id: in replies, on its way to the workers, in logs, and to find it again."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from braid import wire
from braid.log import JsonFormatter
from router.history import Entry, History
from router.http import Call
from tests.router.conftest import CHAT, MakeStand, Stand, chat
from tests.router.fake_worker import answer_at_gate, answer_decode, decode_fails, prefill_fails, silent
from tests.router.test_reasoning import VOTE, votes

LAST = {
    (CHAT, True): b"data: [DONE]",
    (CHAT, False): b"chat.completion",
    ("/v1/responses", True): b"event: response.completed",
    ("/v1/responses", False): b'"object":"response"',
}
"""What the last bytes of a reply have in them and no others."""
MINE = {"x-braid-group": "exam-7.a_B"}


async def test_the_clients_id_is_in_reply_report_and_dispatches(stand: Stand) -> None:
    p0, d0 = await stand.workers(decode=votes(7, 5, 7, 7))
    reply = await stand.http.post(CHAT, json=chat(reasoning=VOTE), headers=MINE)
    body = reply.json()
    assert reply.headers["x-braid-group"] == "exam-7.a_B"
    assert body["reasoning"]["group"] == body["braid"]["group"] == "exam-7.a_B"
    decode = await d0.expect(wire.Decode)
    assert {decode.group, (await p0.expect(wire.Prefill)).group} == {"exam-7.a_B"}
    assert "x-braid-group" not in dict(decode.headers)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_plain_request_gets_an_id_too(stand: Stand, stream: bool) -> None:
    _, d0 = await stand.workers()
    reply = await stand.post(CHAT, chat(stream=stream))
    group = reply.headers["x-braid-group"]
    assert (await d0.expect(wire.Decode)).group == group
    assert f'"group":"{group}"' in reply.text.replace(": ", ":")
    view = (await stand.http.get(f"/v1/groups/{group}")).json()
    assert (view["state"], view["strategy"], view["decode"]) == ("completed", None, ["d0"])


async def test_every_event_of_a_stream_names_the_group(stand: Stand) -> None:
    await stand.workers(decode=votes(7, 5, 7, 7))
    reply = await stand.http.post(CHAT, json=chat(reasoning=VOTE, stream=True), headers=MINE)
    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    told = [chunk["reasoning"]["group"] for chunk in chunks if "reasoning" in chunk]
    assert told == ["exam-7.a_B"] * 6


async def test_a_failed_group_is_found_by_its_reply(stand: Stand) -> None:
    await stand.workers(decode=decode_fails(500))
    reply = await stand.post(CHAT, chat(reasoning=VOTE))
    assert reply.status_code == 502
    view = (await stand.http.get("/v1/groups/" + reply.headers["x-braid-group"])).json()
    assert (view["state"], view["strategy"]) == ("failed", "self_consistency")


@pytest.mark.parametrize("bad", ["", "a" * 65, "a b", "a/b", "ü"])
async def test_an_unusable_id_is_refused(stand: Stand, bad: str) -> None:
    _, d0 = await stand.workers()
    reply = await stand.http.post(CHAT, json=chat(), headers=[(b"x-braid-group", bad.encode())])
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "X-Braid-Group")
    assert "x-braid-group" not in reply.headers
    assert d0.got(wire.Decode) == []


async def test_a_group_is_seen_while_it_runs_and_after(stand: Stand) -> None:
    _, d0 = await stand.workers(decode=answer_at_gate)
    request = asyncio.create_task(stand.http.post(CHAT, json=chat(reasoning=VOTE), headers=MINE))
    await stand.until(lambda: stand.metric("braid_requests_accepted_total", endpoint="chat") == 1)
    running = (await stand.http.get("/v1/groups/exam-7.a_B")).json()
    assert (running["state"], running["n"], running["samples"]) == ("running", 4, {})
    d0.gate.set()
    assert (await request).status_code == 200
    view = (await stand.http.get("/v1/groups/exam-7.a_B")).json()
    assert view["state"] == "completed"
    assert view["samples"] == {"finished": 4}
    assert [vote["votes"] for vote in view["votes"]] == [2, 2]
    assert (view["tokens"], view["usage"]["prompt_tokens"], view["prefill"]) == (20, 7, "p0")
    assert view["seconds"] > 0


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reasoning", [None, {"strategy": "direct"}, VOTE])
async def test_who_has_the_last_bytes_finds_the_group_ended(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool, reasoning: dict[str, Any] | None
) -> None:
    """A client may ask on another connection before the router has come to the end of its work."""
    await stand.workers(decode=votes(7, 5, 7, 7) if reasoning is VOTE else answer_decode)
    views: list[dict[str, Any]] = []
    deliver = Call._deliver

    async def look(call: Call, message: Any) -> None:
        if call.entry is not None and LAST[path, stream] in message.get("body", b""):
            views.append(call.entry.view())
        await deliver(call, message)

    monkeypatch.setattr(Call, "_deliver", look)
    body = chat(stream=stream) | ({"reasoning": reasoning} if reasoning else {})
    if path != CHAT:
        body["input"] = body.pop("messages")
    elif stream and reasoning is not VOTE:  # else it is the prefill worker that tells, now or a moment later
        body["stream_options"] = {"include_usage": True}
    assert (await stand.post(path, body)).status_code == 200
    (view,) = views
    assert (view["state"], view["usage"]["prompt_tokens"]) == ("completed", 7)


async def test_who_left_is_told_as_cancelled(stand: Stand) -> None:
    _, d0 = await stand.workers(decode=silent)
    request = asyncio.create_task(stand.http.post(CHAT, json=chat(reasoning=VOTE), headers=MINE))
    await d0.expect(wire.Decode)
    request.cancel()
    await d0.expect(wire.Cancel)
    entry = stand.app.history.find("", "exam-7.a_B")
    assert entry is not None
    await stand.until(lambda: not entry.running)
    assert entry.view()["state"] == "cancelled"


async def test_groups_are_seen_with_their_own_key_only(make_stand: MakeStand, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    stand = await make_stand(api_keys_file=tmp_path / "keys")
    await stand.workers()
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    assert (await stand.http.post(CHAT, json=chat(), headers={**one, **MINE})).status_code == 200
    codes = [
        (await stand.http.get("/v1/groups/exam-7.a_B", headers=key)).status_code for key in (one, two, {})
    ]
    assert codes == [200, 404, 401]


async def test_every_log_line_of_a_request_has_its_group(stand: Stand) -> None:
    lines: list[dict[str, Any]] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonFormatter("router").format(record)))

    handler = Lines()
    logger = logging.getLogger("braid.router")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        await stand.workers(prefill=prefill_fails(500))
        await stand.http.post(CHAT, json=chat(), headers=MINE)
        await stand.post("/tokenize", {"model": "demo", "prompt": "x"})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    requests = [line for line in lines if line["event"] == "request"]
    assert [line.get("group") for line in requests] == ["exam-7.a_B", None]


def test_the_oldest_groups_are_forgotten() -> None:
    history = History(2)
    for number in range(4):
        entry = Entry(f"g{number}", "r", "chat", "demo", 1)
        entry.end("completed")
        history.begin("t", f"g{number}", entry)
    history.check_integrity(idle=True)
    assert [history.find("t", f"g{number}") is not None for number in range(4)] == [False, False, True, True]
    again = Entry("g3", "r2", "chat", "demo", 1)
    history.begin("t", "g3", again)
    assert history.find("t", "g3") is again
    assert history.find("t", "g2") is not None
    assert history.find("u", "g3") is None
