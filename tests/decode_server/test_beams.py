"""Beam search in one dispatch: steps over one import, one sample as the answer. The engine is a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from braid import wire
from tests.decode_server.fake_engine import open_seats
from tests.decode_server.test_service import DEADLINE_S, Stand, say, stand, start  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # importing vLLM can take minutes on a busy machine

BODY = {"prompt": "x", "n": 1, "use_beam_search": True, "vllm_xargs": {"beam_width": 2, "other": 1}}
REPLY = {
    "choices": [
        {
            "text": "a b",
            "finish_reason": "stop",
            "logprobs": {"tokens": ["a", " b"], "token_logprobs": [-0.5, -0.25]},
        },
        {"text": "c", "finish_reason": "length", "logprobs": None},
    ]
}


@pytest.mark.parametrize(
    ("body", "yes"),
    [
        (b'{"use_beam_search": true}', True),
        (b'{"use_beam_search": "yes", "prompt": "x"}', True),
        (b'{"use_beam_search": true, "prompt": [1, 2, 3]}', True),
        (b'{"use_beam_search": false}', False),
        (b'{"use_beam_search": "no"}', False),
        (b'{"use_beam_search": "perhaps"}', False),
        (b'{"use_beam_search": null}', False),
        (b'{"prompt": "use_beam_search"}', False),
        (b'["use_beam_search"]', False),
        (b"use_beam_search", False),
        (b"{}", False),
    ],
)
def test_a_body_asks_for_a_search_or_not(body: bytes, yes: bool) -> None:
    from decode_server.beams import searches

    assert searches(body) == yes


@pytest.mark.parametrize("prompts", [["a", "b", "c"], [[1], [2, 3], [4]]])
def test_each_prompt_is_searched(prompts: Any) -> None:
    from decode_server.beams import searches

    assert searches(json.dumps({"prompt": prompts, "use_beam_search": True}).encode()) == 3


def test_the_width_becomes_vllm_s_n() -> None:
    from decode_server.beams import widened

    sent = json.loads(widened(json.dumps({**BODY, "stream": True}).encode()))
    assert (sent["n"], sent["vllm_xargs"], sent["stream"]) == (2, {"other": 1}, False)
    plain = {"n": 3, "use_beam_search": True}
    assert json.loads(widened(json.dumps(plain).encode()))["n"] == 3


def test_the_best_beam_is_the_sample_and_tells_of_the_others() -> None:
    from decode_server.beams import best

    made = best(5, 7, json.dumps(REPLY).encode(), 40)
    assert (made.ref, made.index, made.state, made.text, made.tokens) == (5, 7, "finished", "a b", 40)
    assert made.finish_reason == "stop"
    assert json.loads(made.choice)["beams"] == [
        {"text": "a b", "logprob": -0.75, "tokens": 2, "finish_reason": "stop"},
        {"text": "c", "logprob": None, "tokens": 0, "finish_reason": "length"},
    ]
    chat = {"choices": [{"message": {"content": None}, "finish_reason": "abort"}]}
    made = best(5, 7, json.dumps(chat).encode(), 4)
    assert (made.state, made.text) == ("cancelled", "")


# The dispatch


def begin(stand: Stand, body: Any = BODY, mode: Any = "samples") -> Any:  # noqa: F811
    raw = json.dumps(body).encode()
    stand.service.start(wire.Decode(1, "/v1/completions", raw, "r", DEADLINE_S, mode, first=3))
    return stand.service._running[1].job


async def test_a_search_is_answered_with_one_sample(stand: Stand) -> None:  # noqa: F811
    async def search(job: Any, receive: Any, send: Any) -> None:
        asked = json.loads((await receive())["body"])
        assert (asked["n"], asked["vllm_xargs"]) == (2, {"other": 1})
        job.generated[3], job.prompt_tokens, job.cached_tokens = 12, 9, 8
        await start(send)
        await say(send, json.dumps(REPLY).encode())

    stand.handler = search
    begin(stand)
    made, done = await stand.idle()
    assert (made.index, made.text, made.tokens) == (3, "a b", 12)
    assert (done.status, done.prompt_tokens, done.cached_tokens, done.choice_tokens) == (200, 9, 8, 12)


async def test_a_search_that_is_refused_is_the_group_s_error(stand: Stand) -> None:  # noqa: F811
    async def refuse(job: Any, receive: Any, send: Any) -> None:
        await start(send, 400)
        await say(send, b"why")

    stand.handler = refuse
    begin(stand)
    (done,) = await stand.idle()
    assert (done.status, done.body) == (400, b"why")


async def test_a_cancelled_search_aborts_its_steps(stand: Stand) -> None:  # noqa: F811
    begun, go = asyncio.Event(), asyncio.Event()

    async def search(job: Any, receive: Any, send: Any) -> None:
        job.beams.update({"s1"})
        begun.set()
        await go.wait()
        await start(send)
        await say(send, json.dumps({"choices": [{"text": "a", "finish_reason": "abort"}]}).encode())

    stand.handler = search
    job = begin(stand)
    await begun.wait()
    stand.service.cancel(wire.Cancel(1, (3,)))
    await asyncio.sleep(0)
    assert (stand.aborted, job.cancelled) == ([["s1"]], {3})
    go.set()
    made, done = await stand.idle()
    assert (made.state, made.text, done.status) == ("cancelled", "a", 200)


async def test_a_plain_request_s_search_passes_through(stand: Stand) -> None:  # noqa: F811
    job = begin(stand, {"use_beam_search": True, "n": 2}, "http")
    assert job.beams == set()
    assert (await stand.idle())[0].status == 200
    stand.sent.clear()
    assert begin(stand, {"n": 2}, "http").beams is None
    await stand.idle()


# The steps


class Engine:
    """What a step needs of :class:`decode_server.llm.DecodeLLM`."""

    def __init__(self, *held: Any) -> None:
        self.held = held
        self.acquired: list[list[int]] = []
        self.asked: list[Any] = []

    async def _acquire(self, job: Any, part: int, prompt: Any, params: Any, *options: Any) -> Any:
        self.acquired.append(prompt["prompt_token_ids"])
        job.held.append(self.held[part])
        await asyncio.sleep(0)
        return self.held[part]

    async def plain(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        from tests.decode_server.test_samples import output

        self.asked.append(params.extra_args)
        yield output(request_id, [5], finished=True)


async def step(engine: Engine, job: Any, tokens: list[int], request_id: str) -> list[Any]:
    from vllm.sampling_params import SamplingParams

    from decode_server.llm import DecodeLLM

    prompt = {"type": "token", "prompt_token_ids": tokens}
    run = DecodeLLM._beam_step(engine, job, prompt, SamplingParams(max_tokens=1), request_id, {})  # type: ignore[arg-type]
    return [one async for one in run]


def job_of(first: int = 0, searches: int = 1) -> Any:
    from braid.worker.source import Source
    from decode_server.llm import Job

    job = Job(Source(None, ""), SimpleNamespace(), SimpleNamespace(), first, *open_seats())  # type: ignore[arg-type]
    job.beams, job.searches = set(), searches
    return job


async def test_the_prompt_is_imported_once_and_every_step_uses_it() -> None:
    from decode_server.prefix import Held

    engine, job = Engine(Held("i1", wire.KvRecord("remote"), 3, cached=4)), job_of(first=2)
    await step(engine, job, [1, 2, 3], "r-0")
    await asyncio.gather(*(step(engine, job, [1, 2, 3, tail], f"r-{tail}") for tail in (7, 8)))
    assert engine.acquired == [[1, 2, 3]]
    assert engine.asked == [{"kv_transfer_params": {"braid": "i1"}}] * 3
    assert (job.generated, job.prompt_tokens, job.cached_tokens) == ({2: 3}, 3, 4)
    assert job.beams == set()


async def test_each_prompt_of_a_body_is_imported_and_its_steps_use_its_own() -> None:
    """Searches that began side by side imported the first prompt's KV twice, which never ended, and the
    second used the first's."""
    from decode_server.prefix import Held

    held = [Held(f"i{part}", wire.KvRecord("remote"), 3, cached=4) for part in range(3)]
    engine, job = Engine(*held), job_of(searches=3)
    prompts = [[1, 2, 3], [9, 2], [1, 2, 3, 7]]
    await asyncio.gather(*(step(engine, job, tokens, f"r-{tokens}") for tokens in prompts))
    assert engine.acquired == prompts
    engine.asked.clear()
    for tokens in ([9, 2, 5], [1, 2, 3, 5], [1, 2, 3, 7, 5], [1, 2, 3, 5, 7]):
        await step(engine, job, tokens, f"r-{tokens}")
    used = [asked["kv_transfer_params"]["braid"] for asked in engine.asked]
    assert used == ["i1", "i0", "i2", "i0"]
    assert (job.prompt_tokens, job.cached_tokens) == (9, 12)


async def test_without_an_import_steps_are_plain() -> None:
    from decode_server.prefix import Held

    engine, job = Engine(Held(None, wire.KvRecord("local"))), job_of()
    await step(engine, job, [1, 2], "r-0")
    assert engine.asked == [None]


async def test_a_search_that_is_no_longer_wanted_begins_no_step() -> None:
    from decode_server.prefix import Held

    engine, job = Engine(Held(None, wire.KvRecord("local"))), job_of()
    job.cancelled.add(0)
    (told,) = await step(engine, job, [1, 2], "r-0")
    assert (told.outputs[0].finish_reason, told.finished, engine.asked) == ("abort", True, [])


async def waiting() -> tuple[Engine, Any, Any, Any, asyncio.Task[list[Any]]]:
    """A search that has its prompt and waits for the one seat, which another has."""
    from decode_server.prefix import Held

    seats, flow = open_seats(1)
    held = Held("i1", wire.KvRecord("remote"), 3, cached=4)
    engine, job = Engine(held, held), job_of(searches=2)
    job.seats = seats
    other = seats.ask(flow, lambda seated: None)
    searching = asyncio.create_task(step(engine, job, [1, 2, 3], "r-0"))
    while not seats.stats()["seats_waiting"]:
        await asyncio.sleep(0)
    return engine, job, seats, other, searching


async def test_a_search_has_room_for_its_prompt_before_it_takes_a_seat() -> None:
    """Samples take their seats last: a search that waited for room in a seat waited for those whose samples
    waited for that seat."""
    engine, job, seats, other, searching = await waiting()
    assert (seats.stats(), engine.asked) == ({"seats_held": 1, "seats_waiting": 1}, [])
    seats.leave(other)
    await searching
    assert len(engine.asked) == 1
    await step(engine, job, [5, 6], "r-1")  # of another prompt of the body, which began beside the first
    await step(engine, job, [1, 2, 3, 4], "r-2")
    assert seats.stats() == {"seats_held": 1, "seats_waiting": 0}, "one for the whole search"
    job.leave()
    seats.check_integrity(idle=True)


async def test_a_search_that_is_cancelled_before_its_seat_begins_no_step() -> None:
    engine, job, seats, other, searching = await waiting()
    job.cancelled.add(0)
    job.give_up((0,))
    (told,) = await searching
    assert (told.outputs[0].finish_reason, engine.asked) == ("abort", [])
    seats.leave(other)
    job.leave()
    seats.check_integrity(idle=True)


async def test_a_search_that_is_cancelled_during_its_import_ends_at_once() -> None:
    engine, job = Engine(), job_of()
    never = asyncio.Event()

    async def acquire(*args: Any) -> Any:
        engine.acquired.append([])
        await never.wait()

    engine._acquire = acquire  # type: ignore[method-assign, assignment]
    searching = asyncio.create_task(step(engine, job, [1, 2, 3], "r-0"))
    while not engine.acquired:
        await asyncio.sleep(0)
    job.cancelled.add(0)
    job.give_up((0,))
    (told,) = await asyncio.wait_for(searching, 10)
    assert (told.outputs[0].finish_reason, engine.asked) == ("abort", [])


@pytest.mark.parametrize("mode", ["samples", "http"])
async def test_the_seat_of_a_search_is_left_with_its_dispatch(stand: Stand, mode: str) -> None:  # noqa: F811
    async def search(job: Any, receive: Any, send: Any) -> None:
        assert await job.seat(job.first)
        assert stand.service.seats.held == 1
        await start(send)
        await say(send, json.dumps(REPLY).encode())

    stand.handler = search
    begin(stand, mode=mode)
    await stand.idle()
    stand.service.seats.check_integrity(idle=True)


# vLLM's own search over these steps

A, B, EOS = 18, 19, 2
NEXT: dict[tuple[int, ...], dict[int, float]] = {
    (): {A: 0.6, B: 0.4},
    (A,): {A: 0.5, EOS: 0.5},
    (B,): {EOS: 0.95, A: 0.05},
    (A, A): {EOS: 1.0},
}
"""A model: greedy takes A first, yet B and the end are the more probable text."""
PROMPT = [30, 31, 32]


async def test_vllm_s_search_runs_over_the_steps_of_one_import(monkeypatch: pytest.MonkeyPatch) -> None:
    import math

    from transformers import AutoTokenizer
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import BeamSearchParams

    from decode_server.llm import JOB, DecodeLLM
    from decode_server.prefix import Held

    llm = object.__new__(DecodeLLM)
    llm.input_processor = SimpleNamespace(resolve_watermarking=lambda params: None)  # type: ignore[assignment]
    engine, asked = Engine(Held("i1", wire.KvRecord("remote"), 1, cached=2)), list[tuple[int, ...]]()

    async def plain(prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        assert params.extra_args == {"kv_transfer_params": {"braid": "i1"}}
        so_far = tuple(prompt["prompt_token_ids"][len(PROMPT) :])
        asked.append(so_far)
        following = NEXT.get(so_far, {EOS: 1.0})
        logprobs = {token: Logprob(math.log(p)) for token, p in following.items()}
        made = CompletionOutput(
            0, "", [max(following, key=following.__getitem__)], None, [logprobs], finish_reason="length"
        )
        yield RequestOutput(request_id, None, prompt["prompt_token_ids"], None, [made], True)

    monkeypatch.setattr(llm, "plain", plain, raising=False)
    monkeypatch.setattr(llm, "_acquire", engine._acquire, raising=False)

    class Serving(BeamSearchOnlineMixin):  # type: ignore[misc]
        renderer: Any = SimpleNamespace(get_tokenizer=lambda: AutoTokenizer.from_pretrained("demo/model"))
        engine_client: Any = llm

    job = job_of(first=5)
    token = JOB.set(job)
    try:
        prompt: Any = {"type": "token", "prompt_token_ids": PROMPT}
        params = BeamSearchParams(beam_width=2, max_tokens=3, temperature=0.0, length_penalty=0.0)
        (told,) = [one async for one in Serving().beam_search(prompt, "r", params)]
    finally:
        JOB.reset(token)
    best = told.outputs[0]
    assert (list(best.token_ids), best.finish_reason) == ([B], "stop")
    assert best.cumulative_logprob == pytest.approx(math.log(0.4 * 0.95))
    assert engine.acquired == [PROMPT], "the prompt is imported once"
    assert asked[:3] == [(), (A,), (B,)]
    assert job.generated == {5: len(asked)}


# Bodies of strategies as vLLM reads them


@pytest.mark.parametrize("target", ["chat", "completions"])
def test_vllm_reads_what_the_strategies_send(target: str) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    from decode_server.beams import widened
    from router.strategies.confidence import with_top
    from router.strategies.continuation import continued, limited, stopping

    question: dict[str, Any] = {"messages": [{"role": "user", "content": "2+2?"}]}
    kind: Any = ChatCompletionRequest
    if target == "completions":
        question, kind = {"prompt": "2+2="}, CompletionRequest
    step = stopping(limited(continued(question, "One.\n\n"), 40), "\n\n", skip_separator=True)
    read = kind.model_validate(with_top(step, 5))
    params = read.to_sampling_params(40, {})
    assert (params.stop, params.min_tokens, params.max_tokens, params.logprobs) == (["\n\n"], 1, 40, 5)
    search = {**with_top(question, 0), "use_beam_search": True, "vllm_xargs": {"beam_width": 3}, "n": 1}
    read = kind.model_validate_json(widened(json.dumps(search).encode()))
    assert read.use_beam_search
    assert read.to_beam_search_params(9, {}).beam_width == 3
