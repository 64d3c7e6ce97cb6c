"""Dispatches of a decode worker: one terminal answer each. The engine is a fake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from braid import wire
from braid.settings import DecodeSettings
from tests.decode_server.fake_engine import FakeEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # importing vLLM can take minutes on a busy machine

DEADLINE_S = 60.0
GREEDY = (0.0, 1.0, 0, 0.0)
Handler = Callable[[Any, Any, Any], Awaitable[None]]


class FakeChoices:
    """Stands for vLLM's making of choices."""

    def __init__(self, *args: Any) -> None: ...

    async def make(self, output: Any) -> tuple[bytes, str]:
        await asyncio.sleep(0)
        return b"{}", output.outputs[0].text


class Stand:
    """A service over an application that a test writes: ``handler(job, receive, send)``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from decode_server import service

        monkeypatch.setattr(service, "ChoiceMaker", FakeChoices)
        self.handler: Handler = answer
        self.aborted: list[list[str]] = []
        self.sent: list[Any] = []
        engine = FakeEngine()
        engine.app = self  # type: ignore[attr-defined]
        self.state = None
        engine.llm = SimpleNamespace(abort=self._abort, errored=False)  # type: ignore[attr-defined]
        settings = DecodeSettings(model="m", _cli_parse_args=False)  # type: ignore[call-arg]
        self.service = service.DecodeService(engine, self.sent.append, settings)  # type: ignore[arg-type]

    def start(self, mode: Any = "http", deadline_s: float = DEADLINE_S, first: int = 0) -> Any:
        message = wire.Decode(1, "/v1/completions", b'{"stream": true}', "r", deadline_s, mode, first)
        self.service.start(message)
        return self.service._running[1].job

    async def idle(self) -> list[Any]:
        """All that was sent, once nothing runs."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.service.idle():
                await asyncio.sleep(0)
        return self.sent

    async def _abort(self, names: list[str]) -> None:
        self.aborted.append(names)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from decode_server.llm import JOB

        await self.handler(JOB.get(), receive, send)


async def start(send: Any, status: int = 200) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"4"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def say(send: Any, *chunks: bytes) -> None:
    for chunk in chunks:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def answer(job: Any, receive: Any, send: Any) -> None:
    await start(send)
    await say(send, b"a", b"b")


async def hang(job: Any, receive: Any, send: Any) -> None:
    await start(send)
    await say(send, b"a")
    while (await receive())["type"] != "http.disconnect":
        pass


@pytest.fixture
async def stand(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stand]:
    stand = Stand(monkeypatch)
    yield stand
    stand.service.cancel_all("test ended")
    await stand.idle()
    terminal = [m for m in stand.sent if isinstance(m, wire.GroupDone) or getattr(m, "end", False)]
    assert len(terminal) <= 1, "one terminal answer a dispatch"
    assert not terminal or stand.sent[-1] is terminal[0], "and nothing after it"


async def test_a_response_is_a_head_its_bytes_and_an_end(stand: Stand) -> None:
    stand.start()
    local = wire.KvRecord("local")
    assert await stand.idle() == [
        wire.Head(1, 200, (("content-type", "text/plain"),), local),
        wire.Body(1, b"a"),
        wire.Body(1, b"b"),
        wire.Body(1, b"", end=True, kv=local),
    ]


async def test_a_response_without_a_body_has_a_head(stand: Stand) -> None:
    async def empty(job: Any, receive: Any, send: Any) -> None:
        await start(send, 204)

    stand.handler = empty
    stand.start()
    head, end = await stand.idle()
    assert (head.status, end.end) == (204, True)


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancel_at_any_turn_cuts_the_response_once(stand: Stand, turns: int) -> None:
    stand.handler = hang
    stand.start()
    for _ in range(turns):
        await asyncio.sleep(0)
    for _ in range(2):
        stand.service.cancel(wire.Cancel(1))
    assert (await stand.idle())[-1] == wire.Body(1, b"", end=True, cut="cancelled")


async def test_a_response_past_its_deadline_is_cut(stand: Stand) -> None:
    stand.handler = hang
    stand.start(deadline_s=0.05)
    assert "deadline" in (await stand.idle())[-1].cut


async def test_an_application_that_fails_cuts_the_response(stand: Stand) -> None:
    async def fail(job: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    stand.handler = fail
    stand.start()
    assert await stand.idle() == [wire.Body(1, b"", end=True, cut="ZeroDivisionError")]


async def test_a_group_without_samples_passes_the_refusal_on(stand: Stand) -> None:
    async def refuse(job: Any, receive: Any, send: Any) -> None:
        await start(send, 400)
        await say(send, b'{"error": 1}')

    stand.handler = refuse
    stand.start("samples")
    (done,) = await stand.idle()
    assert (done.status, done.body) == (400, b'{"error": 1}')


async def test_a_refusal_is_passed_on_though_a_sample_was_cancelled_before(stand: Stand) -> None:
    async def refuse(job: Any, receive: Any, send: Any) -> None:
        job.on_sample(0, None, "")
        job.refused = True
        await start(send, 400)
        await say(send, b'{"error": 1}')

    stand.handler = refuse
    stand.start("samples")
    sample, done = await stand.idle()
    assert (sample.state, done.status, done.body) == ("cancelled", 400, b'{"error": 1}')


def completion(text: str, reason: str = "stop") -> Any:
    part = SimpleNamespace(text=text, finish_reason=reason, token_ids=[1, 2], cumulative_logprob=-0.5)
    return SimpleNamespace(outputs=[part])


async def test_each_sample_is_reported_and_then_the_group(stand: Stand) -> None:
    async def samples(job: Any, receive: Any, send: Any) -> None:
        job.generated.update({4: 2, 5: 2, 6: 1, 7: 0})
        job.on_sample(4, completion("four"), "")
        job.on_sample(5, completion("five", "abort"), "")
        job.on_sample(6, None, "ValueError: broken")
        job.on_sample(7, None, "")
        await answer(job, receive, send)

    stand.handler = samples
    stand.start("samples", first=4)
    *reports, done = await stand.idle()
    assert {r.index: (r.state, r.text, r.error) for r in reports} == {
        4: ("finished", "four", ""),
        5: ("cancelled", "five", ""),
        6: ("failed", "", "ValueError: broken"),
        7: ("cancelled", "", ""),
    }
    assert (done.status, done.choice_tokens) == (200, 5)


async def test_a_sample_whose_choice_cannot_be_made_fails_alone(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share ended with 500, and its counts and its KV record were lost."""

    async def make(self: Any, output: Any) -> tuple[bytes, str]:
        if output.outputs[0].text == "odd":
            raise RuntimeError("a token that the grammar refuses")
        return b"{}", output.outputs[0].text

    async def samples(job: Any, receive: Any, send: Any) -> None:
        job.generated.update({0: 2, 1: 2})
        job.on_sample(0, completion("odd", "error"), "")
        job.on_sample(1, completion("even"), "")
        await answer(job, receive, send)

    monkeypatch.setattr(FakeChoices, "make", make)
    stand.handler = samples
    stand.start("samples")
    *reports, done = await stand.idle()
    assert {r.index: (r.state, r.tokens, r.error) for r in reports} == {
        0: ("failed", 2, "RuntimeError: a token that the grammar refuses"),
        1: ("finished", 2, ""),
    }
    assert (done.status, done.choice_tokens, done.kv is None) == (200, 4, False)


async def test_a_cancelled_group_says_so(stand: Stand) -> None:
    stand.handler = hang
    stand.start("samples")
    stand.service.cancel(wire.Cancel(1))
    assert [m.status for m in await stand.idle()] == [499]


async def test_single_samples_are_aborted_by_their_engine_request(stand: Stand) -> None:
    stand.handler = hang
    job = stand.start("samples")
    job.samples.update({0: "r-0", 1: "r-1"})
    stand.service.cancel(wire.Cancel(1, (1, 5)))
    await asyncio.sleep(0)
    assert stand.aborted == [["r-1"]]
    assert job.cancelled == {1, 5}, "also those that have not begun"


async def test_unknown_and_repeated_dispatches_are_ignored(stand: Stand) -> None:
    stand.service.cancel(wire.Cancel(99))
    stand.service.lost(wire.Lost(99, "gone"))
    stand.service.first(wire.First(99, 8, GREEDY))
    job = stand.start()
    assert stand.start() is job
    ticket = wire.Ticket(b"t", 1, "p0", 1, (), "fp")
    stand.service.start(wire.Prefill(2, ticket, "/", b"", "r", 1.0))
    assert len([m for m in await stand.idle() if isinstance(m, wire.Head)]) == 1


async def test_a_lost_producer_changes_the_jobs_source(stand: Stand) -> None:
    stand.handler = hang
    job = stand.start()
    ticket = wire.Ticket(b"t", 2, "p1", 1, (), "fp")
    stand.service.lost(wire.Lost(1, "gone", ticket))
    assert (job.source.ticket, job.source.reason) == (ticket, "gone")


@pytest.mark.parametrize("by_priority", [False, True])
async def test_a_priority_reaches_only_an_engine_that_orders_by_it(stand: Stand, by_priority: bool) -> None:
    stand.service._engine.by_priority = by_priority  # type: ignore[misc]
    body = b'{"stream": true}'
    stand.service.start(wire.Decode(1, "/v1/completions", body, "r", DEADLINE_S, priority=-3))
    job = stand.service._running[1].job
    assert (job.priority, job.flow.priority) == (-3 if by_priority else 0, -3)
    await stand.idle()


async def test_a_first_token_is_told_to_the_job_that_waits_for_it(stand: Stand) -> None:
    from vllm.sampling_params import SamplingParams

    stand.handler = hang
    stand.service.start(wire.Decode(1, "/v1/completions", b"{}", "r", DEADLINE_S, drawn=True))
    stand.service.first(wire.First(1, 8, GREEDY))
    drawn = stand.service._running[1].job.drawn
    assert drawn is not None
    assert await drawn.of(SamplingParams(temperature=0.0)) == 8


async def test_a_first_token_that_nobody_waits_for_is_ignored(stand: Stand) -> None:
    stand.handler = hang
    job = stand.start()
    stand.service.first(wire.First(1, 8, GREEDY))
    assert job.drawn is None


async def test_what_a_lost_prefill_worker_drew_is_void(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.sampling_params import SamplingParams

    monkeypatch.setattr("braid.worker.told.WAIT_S", 0.001)
    stand.handler = hang
    stand.service.start(wire.Decode(1, "/v1/completions", b"{}", "r", DEADLINE_S, drawn=True))
    drawn = stand.service._running[1].job.drawn
    assert drawn is not None
    stand.service.first(wire.First(1, 8, GREEDY))
    stand.service.lost(wire.Lost(1, "prefill_lost", wire.Ticket(b"t", 2, "p1", 1, (), "fp")))
    assert await drawn.of(SamplingParams(temperature=0.0)) is None
    stand.service.first(wire.First(1, 9, GREEDY))
    assert await drawn.of(SamplingParams(temperature=0.0)) == 9
