"""First tokens that a prefill worker drew, on vLLM's own processor of outputs."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from braid import wire
from braid.worker.source import Source
from tests.decode_server.fake_engine import open_seats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # importing vLLM can take minutes on a busy machine

DEADLINE_S = 60.0
PROMPT = [5, 6, 7]
EOS = 3
GREEDY = (0.0, 1.0, 0, 0.0)


def params(**fields: Any) -> Any:
    """As vLLM's layer has them when a request is handed to the engine."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    fields = {"temperature": 0.0, "max_tokens": 9, "output_kind": RequestOutputKind.DELTA, **fields}
    made = SamplingParams(**fields)
    made.update_from_generation_config({"eos_token_id": [EOS, 4]}, EOS)
    made.watermarking = False
    return made


def request(name: str = "r-0", **fields: Any) -> Any:
    from vllm.v1.engine import EngineCoreRequest

    made = EngineCoreRequest(
        f"{name}-internal", list(PROMPT), None, params(**fields), None, 0.0, None, None, None
    )
    made.external_req_id = name
    return made


class Desk:
    """A ``DecodeLLM`` without an engine: what its engine is asked for, and what its clients are told."""

    def __init__(self) -> None:
        from vllm.v1.engine.output_processor import OutputProcessor

        from decode_server.first import First
        from decode_server.llm import DecodeLLM, Job

        class Bare(DecodeLLM):
            """Without an engine to start or to end."""

            def __init__(self) -> None: ...

            def __del__(self) -> None: ...

        self.llm: Any = Bare()
        self.llm.output_processor = OutputProcessor(None, log_stats=True)
        self.llm.engine_core = SimpleNamespace(add_request_async=self._ask)
        self.llm.check_admission = lambda **_: None
        self.llm.log_requests = False
        self.llm.model_config = SimpleNamespace(logits_processors=None)
        self.asked: list[Any] = []
        self.told: list[Any] = []
        self.queue = SimpleNamespace(put=self.told.append)
        self.job = Job(Source(None, ""), SimpleNamespace(), SimpleNamespace(), 0, *open_seats())  # type: ignore[arg-type]
        self.roomy = True
        self.job.drawn, self.job.begins = First(lambda: self.roomy), "r-0"

    async def add(self, added: Any) -> None:
        from decode_server.llm import JOB

        token = JOB.set(self.job)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self.llm._add_request(added, "", None, 0, self.queue)
        finally:
            JOB.reset(token)

    async def _ask(self, asked: Any) -> None:
        self.asked.append((asked, [list(told.outputs[0].token_ids) for told in self.told]))

    def tell(self, token: int, *shape: float) -> None:
        assert self.job.drawn is not None
        self.job.drawn.tell(wire.First(1, token, shape or GREEDY))  # type: ignore[arg-type]

    def state(self, added: Any) -> Any:
        return self.llm.output_processor.request_states.get(added.request_id)


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


async def test_a_sample_begins_with_the_token_and_the_engine_goes_on_behind_it() -> None:
    desk, added = Desk(), request()
    desk.tell(8)
    await desk.add(added)
    ((asked, told_before),) = desk.asked
    assert told_before == [[8]]
    assert (asked.request_id, asked.prompt_token_ids) == (added.request_id, [*PROMPT, 8])
    assert (asked.sampling_params.max_tokens, added.sampling_params.max_tokens) == (8, 9)
    assert added.prompt_token_ids == PROMPT
    assert desk.told[0].prompt_token_ids == PROMPT, "the client's prompt is its own"


async def test_a_token_that_comes_later_is_waited_for() -> None:
    desk = Desk()
    task = asyncio.create_task(desk.add(request()))
    await asyncio.sleep(0)
    assert desk.asked == []
    desk.tell(8)
    desk.tell(9)
    await task
    assert [tokens(told) for told in desk.told] == [[8]]


async def test_a_token_that_does_not_come_costs_a_short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braid.worker.told.WAIT_S", 0.001)
    desk = Desk()
    await desk.add(request())
    ((asked, _),) = desk.asked
    assert (asked.prompt_token_ids, desk.told) == (PROMPT, [])


@pytest.mark.parametrize(
    ("fields", "token", "reason", "stop"),
    [
        ({}, EOS, "stop", None),
        ({}, 4, "stop", 4),
        ({"stop_token_ids": [8]}, 8, "stop", 8),
        ({"max_tokens": 1}, 8, "length", None),
        ({"max_tokens": 1}, EOS, "stop", None),
        ({"output_kind": 2}, EOS, "stop", None),
    ],
)
async def test_a_token_that_ends_the_sample_needs_no_engine(
    fields: dict[str, Any], token: int, reason: str, stop: int | None
) -> None:
    """As vLLM's own end (``check_stop``). To draw another one instead would make ends rarer than they are."""
    from vllm.sampling_params import RequestOutputKind

    if "output_kind" in fields:
        fields = {"output_kind": RequestOutputKind(fields["output_kind"])}
    desk, added = Desk(), request(**fields)
    desk.tell(token)
    await desk.add(added)
    (told,) = desk.told
    assert desk.asked == []
    assert (told.finished, tokens(told)) == (True, [token])
    assert (told.outputs[0].finish_reason, told.outputs[0].stop_reason) == (reason, stop)
    assert desk.state(added) is None
    assert not desk.llm.output_processor.external_req_ids


async def test_a_token_drawn_with_another_shape_is_not_taken() -> None:
    for temperature, computed in [(0.0, PROMPT), (1.0, [*PROMPT, 8])]:
        desk = Desk()
        desk.tell(8, 1.0, 1.0, 0, 0.0)
        await desk.add(request(temperature=temperature))
        ((asked, _),) = desk.asked
        assert asked.prompt_token_ids == computed


async def test_where_the_engine_is_full_no_stream_begins_before_it() -> None:
    desk = Desk()
    desk.roomy = False
    desk.tell(8)
    await desk.add(request())
    ((asked, _),) = desk.asked
    assert (asked.prompt_token_ids, desk.told) == (PROMPT, [])


async def test_an_engine_with_logits_processors_of_its_own_draws_itself() -> None:
    desk = Desk()
    desk.llm.model_config.logits_processors = ["mine"]
    desk.tell(8)
    await desk.add(request())
    ((asked, _),) = desk.asked
    assert asked.prompt_token_ids == PROMPT


async def test_a_request_that_can_not_be_added_leaves_nothing() -> None:
    async def refuse(asked: Any) -> None:
        raise RuntimeError("dead")

    desk, added = Desk(), request()
    desk.llm.engine_core.add_request_async = refuse
    desk.tell(8)
    with pytest.raises(RuntimeError, match="dead"):
        await desk.add(added)
    assert desk.state(added) is None


async def test_an_end_that_is_ignored_is_a_token() -> None:
    desk = Desk()
    desk.tell(EOS)
    await desk.add(request(ignore_eos=True))
    assert [tokens(told) for told in desk.told] == [[EOS]]


async def test_only_the_sample_that_the_token_is_for_begins_with_it() -> None:
    desk = Desk()
    desk.tell(8)
    await desk.add(request("r-0-lead"))
    desk.job.drawn = None
    await desk.add(request("r-0"))
    assert [asked.prompt_token_ids for asked, _ in desk.asked] == [PROMPT, PROMPT]


async def test_a_token_that_completes_a_stop_string_ends_the_sample_before_the_engine() -> None:
    desk, added = Desk(), request()
    processor = desk.llm.output_processor
    add = processor.add_request

    def stops_at_once(*args: Any) -> None:
        add(*args)
        desk.state(added).detokenizer.update = lambda *_: "stop"

    processor.add_request = stops_at_once
    desk.tell(8)
    await desk.add(added)
    assert desk.asked == []
    assert (desk.told[-1].finished, desk.told[-1].outputs[0].stop_reason) == (True, "stop")
    assert desk.state(added) is None


async def test_the_engines_first_output_still_tells_of_the_prompt() -> None:
    """vLLM counts a prompt's tokens, and what of them was cached, by a request's first output."""
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.metrics.stats import IterationStats, PrefillStats

    desk, added = Desk(), request()
    desk.tell(8)
    await desk.add(added)
    stats = IterationStats()
    prompt = PrefillStats(num_prompt_tokens=4, num_computed_tokens=1, num_cached_tokens=3)
    output = EngineCoreOutput(added.request_id, [9], prefill_stats=prompt)
    desk.llm.output_processor.process_outputs([output], 1.0, stats)
    assert (tokens(desk.told[-1]), desk.told[-1].num_cached_tokens) == ([9], 3)
    assert (stats.prompt_token_stats.total, len(stats.time_to_first_tokens_iter)) == (4, 1)
    assert desk.state(added).stats.num_generation_tokens == stats.num_generation_tokens == 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
        {"seed": 7},
        {"stop": ["x"], "stop_token_ids": [9], "ignore_eos": True, "include_stop_str_in_output": True},
        {
            "max_tokens": 2,
            "skip_special_tokens": False,
            "extra_args": {"kv_transfer_params": {"braid": "i0"}},
        },
    ],
)
def test_these_may_begin_with_a_token_drawn_elsewhere(fields: dict[str, Any]) -> None:
    from decode_server.first import drawable

    assert drawable(params(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0, "seed": 7},
        {"logprobs": 0},
        {"min_tokens": 1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"logit_bias": {5: 1.0}},
        {"allowed_token_ids": [5]},
        {"bad_words": ["x"]},
        {"extra_args": {"mine": 1}},
        {"thinking_token_budget": 4},
    ],
)
def test_these_draw_their_own(fields: dict[str, Any]) -> None:
    from decode_server.first import drawable

    assert not drawable(params(**fields))


def test_a_watermark_or_a_structure_is_drawn_where_it_is_known() -> None:
    from vllm.sampling_params import StructuredOutputsParams

    from decode_server.first import drawable

    marked = params()
    marked.watermarking = True
    assert not drawable(marked)
    assert not drawable(params(structured_outputs=StructuredOutputsParams(regex="a+")))


def test_every_field_of_vllms_parameters_is_known() -> None:
    """A field that a new vLLM brings makes requests that set it draw their own; a name gone is noticed."""
    import msgspec
    from vllm.sampling_params import SamplingParams

    from decode_server.first import _FREE

    assert {field.name for field in msgspec.structs.fields(SamplingParams)} >= _FREE


def test_the_wire_says_who_draws() -> None:
    assert not wire.Prefill(1, wire.Ticket(b"", 1, "p", 1, (), "f"), "/", b"", "r", 1.0).draw
    assert not wire.Decode(1, "/", b"", "r", 1.0).drawn
