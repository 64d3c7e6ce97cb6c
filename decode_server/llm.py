"""The engine of a decode worker: one prompt, one import, n separate samples."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
from vllm.v1.engine.async_llm import AsyncLLM

from braid import wire
from braid.proof import merge
from braid.worker.pace import Pace
from braid.worker.prompt import shareable
from braid.worker.seats import DispatchFlow, Seat, Seats
from braid.worker.source import Source
from decode_server import beams
from decode_server.confidence import Confidence
from decode_server.first import First, begin, following
from decode_server.kept import KeptSamples, splice
from decode_server.logprobs import lighten
from decode_server.pieces import Pieces
from decode_server.prefix import Held, Prefixes
from decode_server.seeds import sample_seed
from decode_server.verdicts import probability
from kvtransfer.adapter.options import KEEP, PARAM

Ended = Callable[[int, RequestOutput | None, str], None]
"""Called once a sample: its number in the group, its last output (None: cancelled or failed), error."""


@dataclass(slots=True)
class Job:
    """One ``Decode``: what :meth:`DecodeLLM.generate` needs to know beyond vLLM's arguments.

    Attributes:
        first: number of the share's first sample in the group.
        seats, flow: where its samples take their seats, and as whose.
        on_sample: set in mode ``samples``: every sample is reported when it ends.
        refused: the engine does not take what the body asks for; the reply says why, not the samples.
        ref: of the dispatch, which tells its samples from those of another with the same request id.
        keep: whether samples are to be kept.
        after: name of the kept sample that the body goes on from; empty if none.
        held: one entry a prompt of the body, as they come.
        samples: engine request ids of the running samples, by their number in the group.
        cancelled: numbers of samples that the router no longer wants, also of those not yet begun.
        generated: tokens generated so far, by sample number, also of cancelled samples.
        watch: what is measured of the samples, None if nothing is.
        confidence: what it gave, by sample number.
        unspelled: nobody is told the tokens of the samples' log-probabilities.
        beams: engine request ids of the running steps of a beam search; None if it is none.
        searches: beam searches of the body, one a prompt; roots: the prompts of those that have begun.
        drawn: the first token, where a prefill worker draws it.
        begins: engine request id of the sample that may begin with it; begun: it has.
        priority: the engine's own, 0 where it knows none.
        pace: of the worker; its samples are measured by it.
    """

    source: Source
    prefixes: Prefixes
    kept: KeptSamples
    first: int
    seats: Seats
    flow: DispatchFlow
    on_sample: Ended | None = None
    refused: bool = False
    ref: int = 0
    keep: bool = False
    after: str = ""
    parts: int = 0
    held: list[Held] = field(default_factory=list)
    samples: dict[int, str] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    generated: dict[int, int] = field(default_factory=dict)
    watch: wire.Watch | wire.Verdict | None = None
    confidence: dict[int, float] = field(default_factory=dict)
    unspelled: bool = False
    beams: set[str] | None = None
    searches: int = 0
    roots: list[tuple[list[int], Held]] = field(default_factory=list)
    drawn: First | None = None
    begins: str = ""
    begun: bool = False
    priority: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    pace: Pace = field(default_factory=Pace)
    _taken: dict[int, Seat] = field(default_factory=dict)
    _getting: dict[asyncio.Task[Held], range] = field(default_factory=dict)

    async def seat(self, number: int) -> bool:
        """Wait for a sample's seat; False if nobody wants the sample any more. Pairs with
        :meth:`stand_up`, also where it is cancelled."""
        if number in self.cancelled:
            return False
        seated = await self.seats.sit(self.flow, lambda seat: self._taken.update({number: seat}))
        return seated and number not in self.cancelled  # it may have been, between the turn and this line

    def has_asked(self, number: int) -> bool:
        """Whether a sample waits for its seat or has it."""
        return number in self._taken

    def stand_up(self, number: int, tokens: int) -> None:
        """End a sample that generated ``tokens``, with or without a seat. Idempotent."""
        if (seat := self._taken.pop(number, None)) is not None:
            self.seats.leave(seat, tokens)

    def leave(self) -> None:
        """End all samples that have not been ended, as the dispatch has."""
        for number in list(self._taken):
            self.stand_up(number, self.generated.get(number, 0))

    def give_up(self, numbers: Iterable[int]) -> None:
        """End the wait of samples, cancelled by now, that have no seat yet; and what is got for none but
        those that are cancelled."""
        for number in numbers:
            if (seat := self._taken.get(number)) is not None and seat.entry is not None:
                self.seats.leave(seat)

        for task, wanted_by in self._getting.items():
            if self.cancelled.issuperset(wanted_by) and not task.cancelling():
                task.cancel()

    async def unless_cancelled(self, numbers: range, work: Coroutine[Any, Any, Held]) -> Held | None:
        """What ``work`` gets for these samples. None, and it is cancelled, once nobody wants any of them."""
        task = asyncio.ensure_future(work)
        if self.cancelled.issuperset(numbers):
            task.cancel()
        self._getting[task] = numbers
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if (caller is not None and caller.cancelling()) or not self.cancelled.issuperset(numbers):
                raise
            return None
        finally:
            del self._getting[task]

    def root_of(self, tokens: list[int]) -> str | None:
        """The import of the search whose beam this is, if it has one."""
        mine = [(len(root), held) for root, held in self.roots if tokens[: len(root)] == root]
        return max(mine, key=lambda root: root[0])[1].name if mine else None

    def name_of(self, number: int) -> str:
        """What a sample is kept as; empty if it is not."""
        return wire.kept_name(self.ref, number) if self.keep else ""

    def record(self) -> wire.KvRecord:
        """The transfers of all prompts, summed; the path is the worst of them."""
        return merge(held.record for held in self.held)


JOB: contextvars.ContextVar[Job | None] = contextvars.ContextVar("job", default=None)
"""The job that the running task serves; set around the call of vLLM's OpenAI application."""


class DecodeLLM(AsyncLLM):
    """``AsyncLLM`` whose ``generate`` imports the prompt's KV first and runs n requests of one sample.

    vLLM's own children of an ``n`` request can't be cancelled one by one and derive adjacent seeds.
    """

    @functools.cached_property
    def pieces(self) -> Pieces:
        """The text of the model's tokens."""
        tokenizer = self.renderer.tokenizer
        return Pieces(lambda token: convert_ids_list_to_tokens(tokenizer, [token])[0], tokenizer.decode)

    async def _add_request(self, request: Any, prompt: Any, parent_req: Any, index: int, queue: Any) -> None:
        """vLLM's own, but a sample whose first token was drawn elsewhere begins with it.

        Then the log-probabilities of a sample are not spelled out if only we read them.
        """
        job = JOB.get()
        token = None if job is None else await self._first_of(job, request)
        if token is None:
            await super()._add_request(request, prompt, parent_req, index, queue)
        else:
            await self._add_begun(request, prompt, queue, token)
        state = self.output_processor.request_states.get(request.request_id)
        if job is not None and job.unspelled and state is not None:
            lighten(state, sum_only=job.watch is None)

    async def _first_of(self, job: Job, request: Any) -> int | None:
        """The token that a request begins with, if a prefill worker has drawn it."""
        if job.drawn is None or request.external_req_id != job.begins or self.model_config.logits_processors:
            return None
        token = await job.drawn.of(request.sampling_params)
        job.begun = token is not None
        return token

    async def _add_begun(self, request: Any, prompt: Any, queue: Any, token: int) -> None:
        """Add a request whose first token is there."""
        self.check_admission(request_id=request.request_id)
        self.output_processor.add_request(request, prompt, None, 0, queue)
        try:
            if begin(self.output_processor, request, token):
                await self.engine_core.add_request_async(following(request, token))
        except BaseException:
            self.output_processor.abort_requests([request.request_id], internal=True)
            raise

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        job = JOB.get()
        if job is None:
            async for output in super().generate(prompt, sampling_params, request_id, **options):
                yield output
            return
        # Clients choose their ids, and vLLM aborts all requests that have the same.
        request_id = f"{request_id}-{job.ref:x}"
        if job.beams is not None:
            async for output in self._beam_step(job, prompt, sampling_params, request_id, options):
                yield output
            return
        part, job.parts = job.parts, job.parts + 1
        if job.after:
            prompt = self._continued(job, prompt)
        first = job.first + part * sampling_params.n
        numbers = range(first, first + sampling_params.n)
        getting = self._acquire(job, part, prompt, sampling_params, request_id, options)
        held = await job.unless_cancelled(numbers, getting)
        if held is None:
            if job.on_sample is not None:
                for number in numbers:
                    job.on_sample(number, None, "")
            return
        try:
            run = _Samples(self, job, part, held, prompt, sampling_params, request_id, options)
            async with contextlib.aclosing(run.outputs()) as outputs:
                async for output in outputs:
                    yield output
        finally:
            job.prefixes.release(held)

    async def _beam_step(
        self, job: Job, prompt: Any, params: SamplingParams, request_id: str, options: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        """One token of one beam.

        The first step of a search is of the bare prompt, alone: it imports it, and then takes the one seat of
        the dispatch. The service gives both back with the dispatch. Of a body with several prompts vLLM
        begins all searches, in order, before any goes on.
        """
        tokens = list(prompt.get("prompt_token_ids") or ())
        if job.parts < job.searches:
            part, job.parts = job.parts, job.parts + 1
            getting = self._acquire(job, part, prompt, params, request_id, options)
            held = await job.unless_cancelled(range(job.first, job.first + 1), getting)
            if held is not None:
                job.roots.append((tokens, held))
                job.prompt_tokens += len(tokens)
                job.cached_tokens += held.cached
                if not job.has_asked(job.first):
                    await job.seat(job.first)
        assert job.beams is not None
        if job.cancelled:
            yield beams.aborted(request_id, prompt)
            return
        if (name := job.root_of(tokens)) is not None:
            params = params.clone()
            params.extra_args = {"kv_transfer_params": {PARAM: name}}
        job.beams.add(request_id)
        try:
            async for output in self.plain(prompt, params, request_id, **options):
                made = len(output.outputs[0].token_ids)
                job.generated[job.first] = job.generated.get(job.first, 0) + made
                yield output
        finally:
            job.beams.discard(request_id)

    def _continued(self, job: Job, prompt: Any) -> Any:
        """The prompt with the own tokens of the sample that it goes on from, if that one is still there."""
        tokens = job.kept.tokens(job.after)
        if tokens is None or shareable(prompt, None) is None:
            job.after = ""
            return prompt
        own = splice(tokens, prompt["prompt_token_ids"], self.renderer.tokenizer)
        return {**prompt, "prompt_token_ids": own}

    async def _acquire(
        self,
        job: Job,
        part: int,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        options: dict[str, Any],
    ) -> Held:
        shared = shareable(prompt, options.get("lora_request"))
        if shared is None or params.prompt_logprobs is not None or shared.adapter:
            held = Held(None, wire.KvRecord("local", reason="unshareable"))
        else:
            waits = job.beams is None or part == 0  # a dispatch holds the imports of all its searches
            held = await job.prefixes.acquire(shared, part, job.source, waits)
            if held.name is None and not job.after and job.beams is None:
                held = await job.prefixes.computed(
                    shared, params.n, held.record, lambda name: self._lead(job, prompt, request_id, name)
                )
        job.held.append(held)
        return held

    async def _lead(self, job: Job, prompt: Any, request_id: str, name: str) -> int:
        """Run a prompt for one token, in a seat, and keep it; how many of its tokens were cached."""
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        params.extra_args = {"kv_transfer_params": {KEEP: name}}
        flow = DispatchFlow(group=job.flow.group, priority=job.flow.priority, most=1)
        taken: list[Seat] = []
        cached = 0
        try:
            await job.seats.sit(flow, taken.append)
            async for output in self.plain(prompt, params, f"{request_id}-lead", priority=job.priority):
                cached = output.num_cached_tokens or 0
        finally:
            for seat in taken:
                job.seats.leave(seat, 1)
        return cached

    def plain(self, *args: Any, **options: Any) -> AsyncGenerator[RequestOutput, None]:
        """vLLM's own ``generate``."""
        outputs: AsyncGenerator[RequestOutput, None] = super().generate(*args, **options)
        return outputs


class _Samples:
    """The n requests of one prompt. Leaving :meth:`outputs` aborts those that still run."""

    def __init__(
        self,
        llm: DecodeLLM,
        job: Job,
        part: int,
        held: Held,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        options: dict[str, Any],
    ) -> None:
        self._llm = llm
        self._job = job
        self._held = held
        self._prompt = prompt
        self._params = params
        self._request_id = request_id
        self._options = {**options, "priority": job.priority} if job.priority else options
        self._base = job.first + part * params.n
        job.flow.most = params.max_tokens
        job.unspelled = params.logprobs is None and job.on_sample is not None
        self._queue: asyncio.Queue[RequestOutput | BaseException | None] = asyncio.Queue()

    async def outputs(self) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of all samples as they come, or one with all of them if only the final is wanted."""
        tasks = [asyncio.create_task(self._sample(i)) for i in range(self._params.n)]
        final = self._params.output_kind == RequestOutputKind.FINAL_ONLY
        finals: list[RequestOutput] = []
        running = len(tasks)
        try:
            while running:
                output = await self._queue.get()
                if isinstance(output, BaseException):
                    raise output
                if output is None:
                    running -= 1
                elif final:
                    finals.append(output)
                else:
                    yield output
            if finals:
                yield _merge(finals if self._job.on_sample is None else [_hollow(one) for one in finals])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample(self, i: int) -> None:
        """Run one sample; its end is ``None`` in the queue, or the exception that fails the request.

        An aborted sample ends with an output too (finish reason ``abort``).
        """
        number, last, error, began = self._base + i, None, "", None
        job = self._job
        job.generated[number] = 0
        engine_id = f"{self._request_id}-{number}"
        try:
            if await job.seat(number):
                job.samples[number] = engine_id
                job.begins = engine_id if self._held.name is not None else ""
                stream = self._llm.plain(self._prompt, self._child_params(i), engine_id, **self._options)
                began = job.pace.begin(len(self._prompt.get("prompt_token_ids") or ()))
                watched = Confidence(job.watch) if isinstance(job.watch, wire.Watch) else None
                async for output in stream:
                    self._account(output, number)
                    output.outputs[0].index = i
                    last = output if output.finished else last
                    if watched and watched.falls(output.outputs[0]):
                        job.cancelled.add(number)
                        await self._llm.abort([engine_id])
                    if output.finished or not watched:
                        self._queue.put_nowait(output)
                self._measured(number, watched, last)
                error = "" if last is not None else "no output"
            self._queue.put_nowait(None)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            job.refused = job.refused or isinstance(failure, VLLMClientError)
            self._queue.put_nowait(failure if job.on_sample is None or job.refused else None)
        finally:
            job.samples.pop(number, None)
            job.stand_up(number, job.generated[number])
            if began is not None:
                job.pace.end(began, job.generated[number] - job.begun)
            self._keep(number, last)
            if job.on_sample is not None and not job.refused:
                job.on_sample(number, last, error)

    def _measured(self, number: int, watched: Confidence | None, last: RequestOutput | None) -> None:
        watch, told = self._job.watch, watched.lowest if watched else None
        if isinstance(watch, wire.Verdict) and last is not None:
            told = probability(last.outputs[0], watch, self._llm.pieces)
        if told is not None:
            self._job.confidence[number] = told

    def _keep(self, number: int, last: RequestOutput | None) -> None:
        """Remember a sample that the engine has kept, or have it let go of one that nobody wants."""
        job = self._job
        if not job.keep:
            return
        if last is None or number in job.cancelled:
            job.kept.release(job.name_of(number))
        else:
            tokens = [*(last.prompt_token_ids or ()), *last.outputs[0].token_ids]
            job.kept.add(job.name_of(number), tokens)

    def _account(self, output: RequestOutput, number: int) -> None:
        job, completion = self._job, output.outputs[0]
        delta = self._params.output_kind == RequestOutputKind.DELTA
        before = job.generated[number] if delta else 0
        job.generated[number] = before + len(completion.token_ids)
        if self._held.name is not None:  # vLLM counts the imported blocks as cached
            output.num_cached_tokens = self._held.cached
        if number == self._base:
            job.prompt_tokens = len(output.prompt_token_ids or ()) or job.prompt_tokens
            job.cached_tokens = output.num_cached_tokens or 0

    def _child_params(self, i: int) -> SamplingParams:
        params = self._params.clone()
        params.n = 1
        params.seed = sample_seed(self._params.seed, self._base + i)
        extra = dict(params.extra_args or {})
        extra.pop("kv_transfer_params", None)
        transfer = {PARAM: self._held.name or self._job.after, KEEP: self._job.name_of(self._base + i)}
        if any(transfer.values()):
            extra["kv_transfer_params"] = {key: name for key, name in transfer.items() if name}
        params.extra_args = extra or None
        if (watch := self._job.watch) is not None:
            params.logprobs = max(watch.top, params.logprobs or 0)
            if isinstance(watch, wire.Watch):
                params.output_kind = RequestOutputKind.CUMULATIVE  # every token is seen as it comes
        if self._job.on_sample is not None and params.logprobs is None:
            params.logprobs = 0  # of the sampled token: strategies weigh by it
        return params


def _hollow(final: RequestOutput) -> RequestOutput:
    """A sample that has been reported, without what it says: the joint reply is not read, and making it
    costs as much again as making the samples' own choices."""
    hollow, completion = copy.copy(final), copy.copy(final.outputs[0])
    completion.text, completion.token_ids = "", []
    completion.logprobs = None if completion.logprobs is None else []
    hollow.outputs = [completion]
    return hollow


def _merge(finals: list[RequestOutput]) -> RequestOutput:
    """One output with every sample's completion, in index order."""
    completions: list[CompletionOutput] = sorted((f.outputs[0] for f in finals), key=lambda c: c.index)
    merged = copy.copy(finals[0])  # the sample's own output is still to be reported
    merged.outputs = completions
    return merged
