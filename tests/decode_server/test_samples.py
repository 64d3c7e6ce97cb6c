"""The n requests of one prompt, over a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from braid import wire
from decode_server.kept import KeptSamples
from tests.decode_server.fake_engine import open_seats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # importing vLLM can take minutes on a busy machine

DEADLINE_S = 60.0
BLOCK = 4
PROMPT = {"prompt_token_ids": list(range(9))}


class ScriptedLLM:
    """Its ``plain`` plays a sample's script: numbers are tokens, events are waited for, errors raised.

    ``scripts`` is by engine request id; ``asked`` notes the sampling parameters it got.
    """

    def __init__(self, scripts: dict[str, list[Any]] | None = None) -> None:
        self.scripts = scripts or {}
        self.asked: dict[str, Any] = {}
        self.ended: list[str] = []

    async def plain(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        from vllm.sampling_params import RequestOutputKind

        self.asked[request_id] = params
        tokens: list[int] = []
        final = params.output_kind == RequestOutputKind.FINAL_ONLY
        try:
            for part in self.scripts.get(request_id, [1, 2]):
                if isinstance(part, asyncio.Event):
                    await part.wait()
                elif isinstance(part, Exception):
                    raise part
                else:
                    tokens.append(part)
                    if not final:
                        yield output(request_id, [part], finished=False)
            yield output(request_id, tokens if final else [], finished=True)
        finally:
            self.ended.append(request_id)


def output(request_id: str, tokens: list[int], finished: bool) -> Any:
    from vllm.outputs import CompletionOutput, RequestOutput

    reason = "stop" if finished else None
    text = f"{request_id}:{tokens}"
    completion = CompletionOutput(0, text, tokens, 0.0, None, finish_reason=reason)
    return RequestOutput(request_id, None, list(range(9)), None, [completion], finished, num_cached_tokens=8)


class Run:
    """One prompt's samples: what they need, and what came of them."""

    def __init__(
        self, llm: ScriptedLLM, n: int, *, final: bool, first: int = 0, report: bool = False, **params: Any
    ) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        from braid.worker.source import Source
        from decode_server.llm import Job, _Samples
        from decode_server.prefix import Held

        kind = RequestOutputKind.FINAL_ONLY if final else RequestOutputKind.DELTA
        self.params = SamplingParams(n=n, output_kind=kind, **params)
        self.reports: list[tuple[int, Any, str]] = []
        self.released: list[str] = []
        self.kept = KeptSamples(100, lambda tokens: tokens // BLOCK + 1, self.released.append)
        self.job = Job(Source(None, ""), SimpleNamespace(), self.kept, first, *open_seats())  # type: ignore[arg-type]
        if report:
            self.job.on_sample = lambda *what: self.reports.append(what)
        self.held = Held("i0", wire.KvRecord("remote", blocks_cached=1), cached=BLOCK)
        self.samples = _Samples(llm, self.job, 0, self.held, PROMPT, self.params, "r", {})  # type: ignore[arg-type]

    async def outputs(self) -> list[Any]:
        async with asyncio.timeout(DEADLINE_S):
            return [o async for o in self.samples.outputs()]


def texts(output: Any) -> list[tuple[int, str]]:
    return [(c.index, c.text) for c in output.outputs]


async def test_the_final_output_has_every_sample_in_order() -> None:
    later = asyncio.Event()
    llm = ScriptedLLM({"r-0": [later, 5], "r-1": [6], "r-2": [7]})
    task = asyncio.create_task(Run(llm, 3, final=True).outputs())
    while len(llm.ended) < 2:
        await asyncio.sleep(0)
    later.set()
    (merged,) = await task
    assert texts(merged) == [(0, "r-0:[5]"), (1, "r-1:[6]"), (2, "r-2:[7]")]


async def test_kept_samples_are_remembered_with_their_tokens_and_others_let_go() -> None:
    llm = ScriptedLLM({"r-3": [5, 6], "r-4": [7], "r-5": [RuntimeError("no room")]})
    run = Run(llm, 3, final=True, first=3, report=True)
    run.job.ref, run.job.keep = 31, True
    run.job.cancelled.add(4)
    await run.outputs()
    assert run.kept.tokens("1f-3") == [*range(9), 5, 6]
    assert len(run.kept) == 1
    assert sorted(run.released) == ["1f-4", "1f-5"]
    assert llm.asked["r-3"].extra_args["kv_transfer_params"] == {"braid": "i0", "braid_keep": "1f-3"}


async def test_nothing_is_kept_unasked() -> None:
    llm = ScriptedLLM()
    run = Run(llm, 2, final=True)
    await run.outputs()
    assert (len(run.kept), run.released) == (0, [])
    assert llm.asked["r-0"].extra_args["kv_transfer_params"] == {"braid": "i0"}


async def test_what_goes_on_from_a_kept_sample_names_it_to_the_engine() -> None:
    llm = ScriptedLLM()
    run = Run(llm, 1, final=True)
    run.job.after, run.held.name = "g-3", None
    await run.outputs()
    assert llm.asked["r-0"].extra_args["kv_transfer_params"] == {"braid": "g-3"}


@pytest.mark.parametrize(("imported", "begins"), [("i0", "r-0"), (None, "")])
async def test_only_a_sample_whose_kv_has_come_may_begin_elsewhere(imported: str | None, begins: str) -> None:
    run = Run(ScriptedLLM(), 1, final=True)
    run.held.name = imported
    await run.outputs()
    assert run.job.begins == begins


async def test_deltas_come_as_they_are_made_under_their_index() -> None:
    later = asyncio.Event()
    llm = ScriptedLLM({"r-0": [later, 5], "r-1": [6]})
    run = Run(llm, 2, final=False)
    outputs = run.samples.outputs()
    first = await anext(outputs)
    assert texts(first) == [(1, "r-1:[6]")]
    later.set()
    rest = [text for o in [o async for o in outputs] for text in texts(o)]
    assert sorted(rest) == [(0, "r-0:[5]"), (0, "r-0:[]"), (1, "r-1:[]")]
    assert run.job.generated == {0: 1, 1: 1}


async def test_a_sample_begins_when_it_has_a_seat_and_leaves_it_when_it_ends() -> None:
    gates = [asyncio.Event() for _ in range(3)]
    llm = ScriptedLLM({f"r-{i}": [gate, 5] for i, gate in enumerate(gates)})
    run = Run(llm, 3, final=True, report=True)
    seats = run.job.seats
    seats.capacity = 1
    task = asyncio.create_task(run.outputs())
    for begun in range(3):
        while len(llm.asked) <= begun:
            await asyncio.sleep(0)
        assert (sorted(llm.asked), seats.waiting) == ([f"r-{i}" for i in range(begun + 1)], 2 - begun)
        gates[begun].set()
    await task
    seats.check_integrity(idle=True)
    assert run.job.flow.tokens == 3


async def test_a_sample_that_is_cancelled_before_its_seat_never_enters_the_engine() -> None:
    gate = asyncio.Event()
    llm = ScriptedLLM({"r-0": [gate, 5]})
    run = Run(llm, 3, final=True, report=True)
    run.job.seats.capacity = 1
    task = asyncio.create_task(run.outputs())
    while not llm.asked:
        await asyncio.sleep(0)
    run.job.cancelled.update((1, 2))
    run.job.give_up((0, 1, 2))
    gate.set()
    await task
    assert list(llm.asked) == ["r-0"]
    assert sorted((number, last is None, error) for number, last, error in run.reports) == [
        (0, False, ""),
        (1, True, ""),
        (2, True, ""),
    ]
    run.job.seats.check_integrity(idle=True)


async def test_a_sample_that_is_cancelled_while_it_takes_its_seat_never_enters_the_engine() -> None:
    """It had its seat and no engine request yet: nobody looked at the cancel again."""
    llm = ScriptedLLM({"r-0": [asyncio.Event()]})
    run = Run(llm, 2, final=True, report=True)
    run.job.seats.capacity = 1
    task = asyncio.create_task(run.outputs())
    while not llm.asked:
        await asyncio.sleep(0)
    run.job.seats.leave(run.job._taken[0])  # from here to the end in one turn of the event loop
    run.job.cancelled.add(1)
    run.job.give_up((1,))
    while not run.reports:
        await asyncio.sleep(0)
    assert [(number, last, error) for number, last, error in run.reports] == [(1, None, "")]
    assert list(llm.asked) == ["r-0"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    run.job.seats.check_integrity(idle=True)


async def test_a_request_that_is_cancelled_leaves_no_seat_behind() -> None:
    llm = ScriptedLLM({"r-0": [asyncio.Event()]})
    run = Run(llm, 3, final=True)
    run.job.seats.capacity = 1
    task = asyncio.create_task(run.outputs())
    while not llm.asked:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(llm.asked) == ["r-0"]
    run.job.seats.check_integrity(idle=True)


async def test_each_sample_is_a_request_of_its_own() -> None:
    from decode_server.seeds import sample_seed
    from kvtransfer.adapter.options import PARAM

    llm = ScriptedLLM()
    await Run(llm, 2, final=True, first=3, seed=11, extra_args={"kv_transfer_params": "x", "a": 1}).outputs()
    assert sorted(llm.asked) == ["r-3", "r-4"]
    for name, params in llm.asked.items():
        assert params.n == 1
        assert params.seed == sample_seed(11, int(name[2:]))
        assert params.extra_args == {"a": 1, "kv_transfer_params": {PARAM: "i0"}}


async def test_seeds_do_not_depend_on_how_the_group_is_split() -> None:
    whole, parts = ScriptedLLM(), ScriptedLLM()
    await Run(whole, 4, final=True, seed=11).outputs()
    await Run(parts, 1, final=True, seed=11).outputs()
    await Run(parts, 3, final=True, seed=11, first=1).outputs()
    seeds = [{name: params.seed for name, params in llm.asked.items()} for llm in (whole, parts)]
    assert seeds[0] == seeds[1]


async def test_a_failed_sample_fails_a_plain_request_and_ends_its_siblings() -> None:
    llm = ScriptedLLM({"r-0": [asyncio.Event()], "r-1": [1, ValueError("broken")]})
    run = Run(llm, 2, final=True)
    with pytest.raises(ValueError, match="broken"):
        await run.outputs()
    assert sorted(llm.ended) == ["r-0", "r-1"]
    assert run.job.samples == {}


async def test_a_failed_sample_of_a_group_is_reported_and_its_siblings_go_on() -> None:
    llm = ScriptedLLM({"r-0": [ValueError("broken")], "r-1": [5]})
    run = Run(llm, 2, final=True, report=True)
    (merged,) = await run.outputs()
    assert [one.index for one in merged.outputs] == [1]
    assert sorted((number, error) for number, _, error in run.reports) == [(0, "ValueError: broken"), (1, "")]


async def test_a_group_whose_samples_all_fail_has_no_output() -> None:
    llm = ScriptedLLM({f"r-{i}": [ValueError("broken")] for i in range(2)})
    run = Run(llm, 2, final=True, report=True)
    assert await run.outputs() == []
    assert [last for _, last, _ in run.reports] == [None, None]


async def test_a_body_that_the_engine_refuses_fails_as_a_whole() -> None:
    """It was told as n failed samples, and the reason was lost."""
    from vllm.exceptions import VLLMValidationError

    refusal = VLLMValidationError("logit_bias is out of vocabulary")
    llm = ScriptedLLM({"r-0": [refusal], "r-1": [refusal], "r-2": [asyncio.Event()]})
    run = Run(llm, 3, final=True, report=True)
    with pytest.raises(VLLMValidationError):
        await run.outputs()
    assert (run.reports, run.job.refused) == ([], True)


async def test_a_sample_cancelled_before_it_began_never_runs() -> None:
    llm = ScriptedLLM()
    run = Run(llm, 3, final=True, first=4, report=True)
    run.job.cancelled.add(5)
    (merged,) = await run.outputs()
    assert sorted(llm.asked) == ["r-4", "r-6"]
    assert [index for index, _ in texts(merged)] == [0, 2]
    assert (5, None, "") in run.reports


async def test_leaving_ends_the_samples_that_run() -> None:
    llm = ScriptedLLM({"r-0": [1, asyncio.Event()], "r-1": [2, asyncio.Event()]})
    run = Run(llm, 2, final=False)
    outputs = run.samples.outputs()
    await anext(outputs)
    await outputs.aclose()
    assert sorted(llm.ended) == ["r-0", "r-1"]
    assert run.job.samples == {}


async def test_a_reported_sample_is_itself_whichever_ended_first() -> None:
    """The joint output is made of the samples' outputs while these are still being reported."""
    llm = ScriptedLLM({"r-0": [5], "r-1": [6]})
    llm.scripts["r-0"].insert(0, second := asyncio.Event())
    run = Run(llm, 2, final=True, report=True)
    note = run.job.on_sample
    assert note is not None

    def on_sample(number: int, last: Any, error: str) -> None:
        note(number, last, error)
        second.set()

    run.job.on_sample = on_sample
    await run.outputs()
    assert {number: texts(last) for number, last, _ in run.reports} == {
        0: [(0, "r-0:[5]")],
        1: [(1, "r-1:[6]")],
    }


@pytest.mark.parametrize(("report", "logprobs"), [(True, 0), (False, None)])
async def test_reported_samples_carry_their_log_probability(report: bool, logprobs: int | None) -> None:
    llm = ScriptedLLM()
    await Run(llm, 1, final=True, report=report).outputs()
    assert llm.asked["r-0"].logprobs == logprobs


async def test_what_has_been_reported_is_not_said_again_in_the_joint_output() -> None:
    """Making the reply of a group of samples with their log-probabilities once more held up heartbeats."""
    run = Run(ScriptedLLM(), 2, final=True, report=True)
    (merged,) = await run.outputs()
    assert [(c.index, c.text, list(c.token_ids)) for c in merged.outputs] == [(0, "", []), (1, "", [])]
    assert sorted((number, one.outputs[0].text) for number, one, _ in run.reports) == [
        (0, "r-0:[1, 2]"),
        (1, "r-1:[1, 2]"),
    ]


@pytest.mark.parametrize(("report", "logprobs"), [(True, None), (True, 2), (False, None)])
async def test_log_probabilities_that_nobody_asked_for_are_not_spelled(report: bool, logprobs: Any) -> None:
    run = Run(ScriptedLLM(), 1, final=True, report=report, logprobs=logprobs)
    await run.outputs()
    assert run.job.unspelled == (report and logprobs is None)


async def test_a_verdict_is_looked_for_in_the_final_output() -> None:
    from vllm.sampling_params import RequestOutputKind

    llm = ScriptedLLM()
    run = Run(llm, 1, final=True, report=True)
    run.job.watch = wire.Verdict(("r",), ("no",), 7)
    await run.outputs()
    assert (llm.asked["r-0"].logprobs, llm.asked["r-0"].output_kind) == (7, RequestOutputKind.FINAL_ONLY)
    assert run.job.confidence == {}, "it says none"


async def test_cached_tokens_are_those_that_were_not_transferred() -> None:
    run = Run(ScriptedLLM(), 1, final=True)
    (merged,) = await run.outputs()
    assert merged.num_cached_tokens == run.job.cached_tokens == BLOCK
    assert run.job.prompt_tokens == 9


class FakePrefixes:
    """Prefixes whose loads end in the order that a test chooses."""

    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.gates: dict[int, asyncio.Event] = {}

    async def acquire(self, prompt: Any, part: int, source: Any, waits: bool) -> Any:
        from decode_server.prefix import Held

        await self.gates.setdefault(part, asyncio.Event()).wait()
        return Held(f"i{part}", wire.KvRecord("remote"))

    async def computed(self, prompt: Any, n: int, record: Any, compute: Any) -> Any:
        from decode_server.prefix import Held

        return Held(None, record)

    def release(self, held: Any) -> None:
        self.journal.append("released")


class FakeLocal(FakePrefixes):
    """Prefixes that no transfer brings: each sample computes them."""

    async def acquire(self, prompt: Any, part: int, source: Any, waits: bool) -> Any:
        from decode_server.prefix import Held

        return Held(None, wire.KvRecord("local", reason=source.reason))


class LocalPrefixes(FakeLocal):
    """And here they are computed once before."""

    async def computed(self, prompt: Any, n: int, record: Any, compute: Any) -> Any:
        from decode_server.prefix import Held

        return Held("i0", record, cached=await compute("i0"))


@pytest.fixture
def generate() -> Callable[..., Any]:
    """``DecodeLLM.generate`` for a job, over a scripted engine."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    from braid.worker.source import Source
    from decode_server.llm import JOB, DecodeLLM, Job

    def make(llm: Any, prefixes: FakePrefixes, prompts: int = 1, **params: Any) -> list[Any]:
        kept = KeptSamples(100, lambda tokens: tokens // BLOCK + 1, lambda name: None)
        JOB.set(Job(Source(None, ""), prefixes, kept, 0, *open_seats()))  # type: ignore[arg-type]
        llm._acquire = lambda *args: DecodeLLM._acquire(llm, *args)
        llm._lead = lambda *args: DecodeLLM._lead(llm, *args)
        fields = {"n": 2, "output_kind": RequestOutputKind.DELTA, **params}
        return [
            DecodeLLM.generate(
                llm, {"type": "token", "prompt_token_ids": [part]}, SamplingParams(**fields), f"r{part}"
            )
            for part in range(prompts)
        ]

    return make


@pytest.mark.parametrize("there", [True, False])
async def test_a_prompt_that_goes_on_is_written_with_the_samples_own_tokens(
    there: bool,
) -> None:
    from vllm.sampling_params import SamplingParams

    from braid.worker.source import Source
    from decode_server.llm import JOB, DecodeLLM, Job

    class Letters:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [ord(c) for c in text]

        def decode(self, ids: Any, *, skip_special_tokens: bool) -> str:
            return "".join("ab" if i == 1 else chr(i) for i in ids)

    llm: Any = ScriptedLLM()
    prompts: list[Any] = []

    async def plain(prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        prompts.append((prompt["prompt_token_ids"], params.extra_args))
        yield output(request_id, [2], finished=True)

    llm.plain, llm.renderer = plain, SimpleNamespace(tokenizer=Letters())
    llm._continued = lambda *args: DecodeLLM._continued(llm, *args)
    llm._acquire = lambda *args: DecodeLLM._acquire(llm, *args)
    kept = KeptSamples(100, lambda tokens: tokens // BLOCK + 1, lambda name: None)
    if there:
        kept.add("g-3", [ord("x"), 1])
    JOB.set(Job(Source(None, "continued"), FakeLocal([]), kept, 0, *open_seats()))  # type: ignore[arg-type]
    job = JOB.get()
    assert job is not None
    job.after = "g-3"
    rendered = {"type": "token", "prompt_token_ids": [ord(c) for c in "xaby"]}
    outputs = DecodeLLM.generate(llm, rendered, SamplingParams(n=1), "r")
    async for _ in outputs:
        pass
    ((tokens, extra),) = prompts
    assert tokens == ([ord("x"), 1, ord("y")] if there else rendered["prompt_token_ids"])
    assert extra == ({"kv_transfer_params": {"braid": "g-3"}} if there else None)


async def test_samples_fork_from_a_prompt_that_was_computed_for_them(generate: Callable[..., Any]) -> None:
    from decode_server.llm import JOB

    llm, prefixes = ScriptedLLM(), LocalPrefixes([])
    (outputs,) = generate(llm, prefixes, n=3, temperature=1.0, max_tokens=9, seed=1)
    job = JOB.get()
    assert job is not None
    last = [o async for o in outputs][-1]
    lead, *samples = llm.asked.values()
    assert list(llm.asked) == ["r0-0-lead", "r0-0-0", "r0-0-1", "r0-0-2"]
    assert (lead.max_tokens, lead.n) == (1, 1)
    assert lead.extra_args == {"kv_transfer_params": {"braid_keep": "i0"}}
    assert [s.extra_args for s in samples] == [{"kv_transfer_params": {"braid": "i0"}}] * 3
    assert last.num_cached_tokens == 8  # what the lead found, not what it left for the samples
    assert prefixes.journal == ["released"]
    job.seats.check_integrity(idle=True)


async def test_requests_of_one_id_have_engine_requests_of_their_own(generate: Callable[..., Any]) -> None:
    """Clients choose their ids, and vLLM aborts all requests of a name: what one cancels ends another's."""
    from decode_server.llm import JOB

    llm, names = ScriptedLLM(), list[set[str]]()
    for ref in (1, 2):
        (outputs,) = generate(llm, LocalPrefixes([]), n=2)
        job = JOB.get()
        assert job is not None
        job.ref = ref
        async for _ in outputs:
            pass
        names.append(set(llm.asked))
        llm.asked.clear()
    assert len(names[0]) == len(names[1]) == 3
    assert not names[0] & names[1]


async def test_prompts_of_a_body_keep_their_seeds_whichever_is_loaded_first(
    generate: Callable[..., Any],
) -> None:
    llm, prefixes = ScriptedLLM(), FakePrefixes([])

    async def drain(outputs: Any) -> None:
        async for _ in outputs:
            pass

    tasks = [asyncio.create_task(drain(o)) for o in generate(llm, prefixes, prompts=2, seed=3)]
    while len(prefixes.gates) < 2:
        await asyncio.sleep(0)
    for part in (1, 0):
        prefixes.gates[part].set()
        await asyncio.wait_for(tasks[part], DEADLINE_S)
    assert sorted(llm.asked) == ["r0-0-0", "r0-0-1", "r1-0-2", "r1-0-3"]
    assert len({params.seed for params in llm.asked.values()}) == 4


async def test_an_import_is_released_after_its_samples_have_ended(generate: Callable[..., Any]) -> None:
    llm = ScriptedLLM({"r0-0": [1, asyncio.Event()], "r0-1": [asyncio.Event()]})
    prefixes = FakePrefixes(llm.ended)
    prefixes.gates[0] = asyncio.Event()
    prefixes.gates[0].set()
    (outputs,) = generate(llm, prefixes)
    await anext(outputs)
    await outputs.aclose()
    assert llm.ended[-1] == "released"
    assert sorted(llm.ended[:-1]) == ["r0-0-0", "r0-0-1"]


class Waiting:
    """What ``generate`` needs of :class:`decode_server.llm.DecodeLLM`, over an import that never ends."""

    def __init__(self) -> None:
        self.getting = self.cleaned = 0

    async def _acquire(self, *args: Any) -> Any:
        self.getting += 1
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.cleaned += 1


def begin(llm: Waiting, run: Run) -> asyncio.Task[list[Any]]:
    from decode_server.llm import JOB, DecodeLLM

    async def all_of_it() -> list[Any]:
        JOB.set(run.job)
        stream = DecodeLLM.generate(llm, PROMPT, run.params, "r")  # type: ignore[arg-type]
        return [output async for output in stream]

    return asyncio.create_task(all_of_it())


async def test_an_import_that_no_sample_wants_any_more_ends_at_once() -> None:
    """A decided vote waited for it, a minute at most, or for room."""
    llm, run = Waiting(), Run(ScriptedLLM(), 2, final=True, first=4, report=True)
    task = begin(llm, run)
    while not llm.getting:
        await asyncio.sleep(0)
    for number in (4, 5):
        assert not task.done()
        run.job.cancelled.add(number)
        run.job.give_up((number,))
        await asyncio.sleep(0)
    assert await asyncio.wait_for(task, DEADLINE_S) == []
    assert run.reports == [(4, None, ""), (5, None, "")]
    assert llm.cleaned == 1


async def test_samples_that_were_cancelled_before_import_nothing() -> None:
    llm, run = Waiting(), Run(ScriptedLLM(), 1, final=True, report=True)
    run.job.cancelled.add(0)
    assert await asyncio.wait_for(begin(llm, run), DEADLINE_S) == []
    assert (run.reports, llm.getting) == ([(0, None, "")], 0)


async def test_the_end_of_a_dispatch_ends_its_import() -> None:
    llm, run = Waiting(), Run(ScriptedLLM(), 1, final=True, report=True)
    task = begin(llm, run)
    while not llm.getting:
        await asyncio.sleep(0)
    run.job.cancelled.add(0)  # and yet it is the dispatch that ends
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (run.reports, llm.cleaned) == ([], 1)
