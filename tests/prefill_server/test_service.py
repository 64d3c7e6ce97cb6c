"""Dispatches of a prefill worker: one answer each, and leases that end. The engine is a fake."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from braid import wire
from braid.worker.prompt import Prompt
from kvtransfer import wire as kv
from kvtransfer.plan import CHAIN_TOKENS, Blocking

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # importing vLLM can take minutes on a busy machine

DEADLINE_S = 60.0
EPOCH = 7
PROMPT = Prompt([1, 2, 3, 4, 5], "", "")
App = Callable[[Any], Awaitable[int]]


class FakeControl:
    """One rank that opens every lease unless told otherwise, and closes it when asked."""

    def __init__(self) -> None:
        self.sent: list[kv.Command] = []
        self.refuse = False
        self.silent = False
        self._waiting: dict[object, asyncio.Future[list[kv.Event]]] = {}

    def expect(self, key: object) -> asyncio.Future[list[kv.Event]]:
        return self._waiting.setdefault(key, asyncio.get_running_loop().create_future())

    def forget(self, key: object) -> None:
        self._waiting.pop(key, None)

    async def send(self, commands: list[kv.Command]) -> None:
        self.sent += commands[1:]
        await self.broadcast(commands[0])

    async def broadcast(self, command: kv.Command) -> None:
        self.sent.append(command)
        if isinstance(command, kv.Close) or self.refuse:
            self.closed(command.key)  # type: ignore[union-attr]
        elif not self.silent:
            self._answer(("open", command.key), kv.Opened(command.key))  # type: ignore[union-attr]

    def closed(self, key: kv.Key) -> None:
        self._answer(("closed", key), kv.Closed(key, "done"))

    def _answer(self, key: object, event: kv.Event) -> None:
        if (future := self._waiting.pop(key, None)) is not None:
            future.set_result([event])

    def closes(self) -> list[str]:
        return [command.reason for command in self.sent if isinstance(command, kv.Close)]


class Stand:
    """A service over an application that stands for vLLM's: ``app`` gets the job, returns a status."""

    def __init__(self) -> None:
        from prefill_server.service import PrefillService

        self.control = FakeControl()
        self.app: App = prefilled
        self.bodies: list[bytes] = []
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.engine = SimpleNamespace(
            app=self._serve,
            control=self.control,
            epoch=EPOCH,
            block_size=4,
            fingerprint="fp",
            groups=(Blocking(4), Blocking(4, 2)),
            kv_heads=2,
            ranks=1,
        )
        self.service = PrefillService(self.engine, self.sent.put_nowait)  # type: ignore[arg-type]

    def start(
        self,
        ref: int = 1,
        *,
        epoch: int = EPOCH,
        deadline_s: float = DEADLINE_S,
        consumers: tuple[int, ...] = (1, 2),
    ) -> None:
        ticket = wire.Ticket(b"t" * 16, 1, "p0", epoch, ("tcp://p:1",), "fp", consumers)
        body = b'{"prompt": "x", "n": 4, "seed": 1, "max_tokens": 9, "stream": true}'
        self.service.start(wire.Prefill(ref, ticket, "/v1/completions", body, "r", deadline_s))

    async def done(self) -> wire.PrefillDone:
        message = await asyncio.wait_for(self.sent.get(), DEADLINE_S)
        assert isinstance(message, wire.PrefillDone)
        return message

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds():
                await asyncio.sleep(0)

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        from prefill_server.llm import JOB

        self.bodies.append((await receive())["body"])
        work = asyncio.ensure_future(self.app(JOB.get()))
        gone = asyncio.ensure_future(receive())
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        for task in (work, gone):
            task.cancel()
        (status, _) = await asyncio.gather(work, gone, return_exceptions=True)
        if isinstance(status, Exception):
            raise status
        if isinstance(status, int):
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b'{"error": "bad"}'})


async def lease(job: Any) -> None:
    key = kv.Key(job.ticket_id, job.attempt, job.parts)
    job.parts += 1
    await job.staging.open(key, PROMPT)


async def prefilled(job: Any) -> int:
    await lease(job)
    job.done, job.prompt_tokens = 1, 5
    return 200


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    stand = Stand()
    yield stand
    stand.service.cancel_all("test ended")
    await stand.until(lambda: not stand.service._jobs)
    assert stand.sent.empty(), "one answer a dispatch"


async def test_each_rank_waits_for_the_ranks_that_read_from_it(stand: Stand) -> None:
    stand.engine.ranks, stand.engine.kv_heads = 2, 4
    stand.start(consumers=(1, 2, 8))
    await stand.done()
    assert [o.subscribers for o in stand.control.sent if isinstance(o, kv.Open)] == [1 + 1 + 4] * 2


async def test_ranks_that_would_leave_a_copy_unread_are_refused(stand: Stand) -> None:
    stand.engine.ranks, stand.engine.kv_heads = 2, 1
    stand.start(consumers=(1,))
    assert (await stand.done()).status == 422
    assert not stand.control.sent


async def test_losing_the_router_ends_the_leases_of_finished_prompts_too(stand: Stand) -> None:
    stand.start()
    assert (await stand.done()).status == 200
    assert stand.control.closes() == []
    stand.service.cancel_all("router_gone")
    await stand.until(lambda: stand.control.closes() == ["router_gone"])


async def test_a_prompt_is_prefilled_once_under_a_lease_for_its_subscribers(stand: Stand) -> None:
    stand.start()
    done = await stand.done()
    assert (done.ref, done.status, done.prompt_tokens) == (1, 200, 5)
    (opened,) = stand.control.sent
    assert isinstance(opened, kv.Open)
    assert (opened.tokens, opened.spans, opened.subscribers) == (5, (kv.Want(0, 0, 2), kv.Want(1, 0, 2)), 3)
    assert opened.chain == PROMPT.chain(CHAIN_TOKENS)


async def test_sampling_fields_do_not_reach_the_engine(stand: Stand) -> None:
    stand.start()
    await stand.done()
    assert json.loads(stand.bodies[0]) == {"prompt": "x", "max_tokens": 1}


async def test_a_worker_is_idle_only_after_its_leases(stand: Stand) -> None:
    assert stand.service.idle()
    stand.start()
    await stand.done()
    assert not stand.service.idle(), "decode workers still pull"
    stand.control.closed(stand.control.sent[0].key)  # type: ignore[union-attr]
    await stand.until(stand.service.idle)


async def test_a_ticket_of_another_epoch_is_refused(stand: Stand) -> None:
    stand.start(epoch=EPOCH + 1)
    assert (await stand.done()).status == 410
    assert stand.control.sent == []


async def test_a_refusal_of_the_application_is_passed_on(stand: Stand) -> None:
    async def refuse(job: Any) -> int:
        return 400

    stand.app = refuse
    stand.start()
    done = await stand.done()
    assert (done.status, done.body) == (400, b'{"error": "bad"}')


async def test_a_lease_that_is_refused_is_422(stand: Stand) -> None:
    stand.control.refuse = True
    stand.start()
    assert (await stand.done()).status == 422
    await stand.until(stand.service.idle)


async def test_a_prefill_that_fails_ends_its_lease(stand: Stand) -> None:
    async def fail(job: Any) -> int:
        await lease(job)
        raise RuntimeError

    stand.app = fail
    stand.start()
    assert (await stand.done()).status == 422
    await stand.until(stand.service.idle)
    assert stand.control.closes() == ["prefill_422"]


async def test_a_prefill_past_its_deadline_ends_its_lease(stand: Stand) -> None:
    async def hang(job: Any) -> int:
        await lease(job)
        return await asyncio.Event().wait()

    stand.app = hang
    stand.start(deadline_s=0.05)
    assert (await stand.done()).status == 504
    await stand.until(stand.service.idle)


@pytest.mark.parametrize("turns", range(10))
async def test_a_cancel_at_any_turn_answers_once_and_leaves_no_lease(stand: Stand, turns: int) -> None:
    async def hang(job: Any) -> int:
        await lease(job)
        return await asyncio.Event().wait()

    stand.app = hang
    stand.start()
    for _ in range(turns):
        await asyncio.sleep(0)
    for _ in range(2):
        stand.service.cancel(wire.Cancel(1))
    assert (await stand.done()).status == 499
    await stand.until(stand.service.idle)


async def test_a_cancel_while_staging_is_full_leaves_no_lease(stand: Stand) -> None:
    stand.control.silent = True
    stand.start()
    await stand.until(lambda: bool(stand.control.sent))
    stand.service.cancel(wire.Cancel(1))
    assert (await stand.done()).status == 499
    await stand.until(stand.service.idle)


async def test_a_cancel_after_the_answer_ends_the_lease(stand: Stand) -> None:
    stand.start()
    await stand.done()
    stand.service.cancel(wire.Cancel(1))
    await stand.until(stand.service.idle)
    assert stand.control.closes() == ["cancelled"]


async def test_unknown_and_repeated_dispatches_are_ignored(stand: Stand) -> None:
    stand.start()
    stand.start()
    stand.service.start(wire.Decode(2, "/", b"", "r", 1.0))
    stand.service.cancel(wire.Cancel(99))
    assert (await stand.done()).ref == 1


@pytest.mark.parametrize("body", [b"", b"[1]", b"nonsense", b"\xff", b"null"])
def test_a_body_that_is_no_object_is_left_to_vllm(body: bytes) -> None:
    from prefill_server.service import _prompt_only

    assert _prompt_only(body) == body


def bare() -> Any:
    """A ``PrefillLLM`` without an engine to start or to end."""
    from prefill_server.llm import PrefillLLM

    class Bare(PrefillLLM):
        model_config = SimpleNamespace(logits_processors=None)

        def __init__(self) -> None: ...

        def __del__(self) -> None: ...

    return Bare()


async def test_the_engine_samples_one_token_whatever_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    from prefill_server.llm import JOB, Job

    asked: list[SamplingParams] = []

    async def generate(self: Any, prompt: Any, params: Any, *args: Any, **options: Any) -> AsyncIterator[Any]:
        asked.append(params)
        yield SimpleNamespace(finished=True, num_cached_tokens=4)

    async def opened(key: kv.Key, prompt: Prompt) -> None:
        assert asked == [], "staging is there before the engine computes"

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    job = Job(b"t" * 16, 1, SimpleNamespace(open=opened))
    JOB.set(job)
    client = SamplingParams(n=4, seed=1, min_tokens=3, max_tokens=9, stop=["x"], temperature=1.0)
    prompt = {"type": "token", "prompt_token_ids": [1, 2, 3]}
    assert len([o async for o in bare().generate(prompt, client, "r")]) == 1
    (params,) = asked
    assert (params.n, params.max_tokens, params.min_tokens, params.seed) == (1, 1, 0, None)
    assert params.extra_args == {"kv_transfer_params": {"braid": [b"t" * 16, 1, 0]}}
    assert (job.done, job.prompt_tokens, job.cached_tokens) == (1, 3, 4)


@pytest.mark.parametrize("draw", [False, True])
async def test_the_first_token_is_told_before_the_answer_where_it_is_wanted(stand: Stand, draw: bool) -> None:
    async def draws(job: Any) -> int:
        await lease(job)
        assert (job.on_first is not None) == draw
        if draw:
            job.on_first(8, (0.0, 1.0, 0, 0.0))
        job.done = 1
        return 200

    stand.app = draws
    ticket = wire.Ticket(b"t" * 16, 1, "p0", EPOCH, ("tcp://p:1",), "fp", (1,))
    stand.service.start(wire.Prefill(1, ticket, "/v1/completions", b"{}", "r", DEADLINE_S, draw=draw))
    if draw:
        assert await asyncio.wait_for(stand.sent.get(), DEADLINE_S) == wire.First(1, 8, (0.0, 1.0, 0, 0.0))
    assert (await stand.done()).status == 200


async def test_a_wanted_token_is_drawn_as_the_client_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    from prefill_server.llm import JOB, Job

    asked: list[SamplingParams] = []
    told: list[object] = []

    async def generate(self: Any, prompt: Any, params: Any, *args: Any, **options: Any) -> AsyncIterator[Any]:
        asked.append(params)
        drawn = SimpleNamespace(token_ids=[8])
        yield SimpleNamespace(finished=True, num_cached_tokens=4, outputs=[drawn])

    async def opened(key: kv.Key, prompt: Prompt) -> None: ...

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    job = Job(b"t" * 16, 1, SimpleNamespace(open=opened), on_first=lambda *drawn: told.append(drawn))
    JOB.set(job)
    client = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=1.0, max_tokens=1
    )
    prompt = {"type": "token", "prompt_token_ids": [1, 2, 3]}
    assert len([o async for o in bare().generate(prompt, client, "r")]) == 1
    (params,) = asked
    shape = (params.temperature, params.top_p, params.top_k, params.min_p)
    assert shape == (0.7, 0.9, 5, 0.1)
    assert (params.max_tokens, params.presence_penalty, params.detokenize) == (1, 0.0, False)
    assert params.extra_args == {"kv_transfer_params": {"braid": [b"t" * 16, 1, 0]}}
    assert told == [(8, (0.7, 0.9, 5, 0.1))]
