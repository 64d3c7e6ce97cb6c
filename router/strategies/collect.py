"""Running a group to its end: extraction, bounds, progress and report, the same for every strategy."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from braid.errors import BraidError, DeadlineExceeded, UpstreamFailed
from router.equivalence import canonical
from router.extract import extract, search
from router.sampler import Answer, Group, GroupUsage, Progress, Sample, Sampler
from router.strategies.options import Options


@dataclass(frozen=True, slots=True)
class Scored:
    """A sample with its answer and the answer's canonical key, both None if it has none."""

    sample: Sample
    answer: str | None = None
    key: str | None = None

    def report(self, with_text: bool) -> dict[str, Any]:
        """As in the reply."""
        sample = self.sample
        known = math.isfinite(sample.mean_logprob)
        entry: dict[str, Any] = {
            "index": sample.index,
            "state": sample.state,
            "answer": self.answer,
            "tokens": sample.tokens,
            "mean_logprob": round(sample.mean_logprob, 6) if known else None,
            "finish_reason": sample.finish_reason or None,
        }
        if sample.error:
            entry["error"] = sample.error
        if with_text:
            entry["text"] = sample.text
        return entry


@dataclass(slots=True)
class Run:
    """A group so far. ``stopped`` says why the rest was cancelled: ``decided``, ``budget_tokens``,
    ``deadline``."""

    n: int
    ended: list[Scored] = field(default_factory=list)
    stopped: str | None = None
    usage: GroupUsage = field(default_factory=GroupUsage)

    @property
    def outstanding(self) -> int:
        return self.n - len(self.ended)

    @property
    def finished(self) -> list[Scored]:
        return [scored for scored in self.ended if scored.sample.state == "finished"]

    @property
    def tokens(self) -> int:
        return sum(scored.sample.tokens for scored in self.ended)


Standing = Callable[[Run], dict[str, Any]]
"""What a strategy adds to each progress event: the votes, or the best sample, so far."""
Settled = Callable[[Run], bool]
"""Whether the samples still running can no longer matter."""


def nothing_yet(run: Run) -> dict[str, Any]:
    """The standing of a strategy that has none."""
    return {}


def never(run: Run) -> bool:
    """A strategy that hears every sample."""
    return False


async def collect(
    sampler: Sampler,
    body: Mapping[str, Any],
    options: Options,
    progress: Progress,
    standing: Standing = nothing_yet,
    settled: Settled = never,
) -> Run:
    """Draw ``options.n`` samples of ``body`` inside the options' bounds.

    Returns with every sample ended and the group closed; at least one has finished.

    Raises:
        BadRequest: the caller's pattern is refused.
        DeadlineExceeded: no sample finished in time.
        UpstreamFailed: every sample failed, or one did under ``on_failure: all``.
    """
    clock = asyncio.get_running_loop().time
    until = clock() + options.deadline_s if options.deadline_s else math.inf
    if options.pattern is not None:
        await search(options.pattern, "")  # an invalid one is refused before anything is generated
    run = Run(options.n)
    async with _opened(sampler.group(body, options.n), options) as group:
        run.usage = group.usage
        async with _stopping_at(until, group, run):
            async for sample in group:
                if sample.state == "failed" and options.on_failure == "all":
                    raise UpstreamFailed("a sample failed; on_failure 'partial' answers from the others")
                scored = await _score(sample, options, max(0.0, until - clock()))
                run.ended.append(scored)
                await progress(_event(scored) | standing(run))
                if run.stopped is None and run.outstanding > 0:
                    run.stopped = _reason(run, options, settled)
                    if run.stopped is not None:
                        await group.cancel()
    run.ended.sort(key=lambda scored: scored.sample.index)
    if not run.finished:
        raise _none_finished(run)
    return run


@contextlib.asynccontextmanager
async def _opened(group: Group, options: Options) -> AsyncIterator[Group]:
    async with contextlib.AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(options.deadline_s):
                entered = await stack.enter_async_context(group)
        except TimeoutError:
            raise _too_late() from None
        yield entered


@contextlib.asynccontextmanager
async def _stopping_at(until: float, group: Group, run: Run) -> AsyncIterator[None]:
    """Cancel the group at ``until``: its samples still come, so the loop over them ends by itself."""
    if until == math.inf:
        yield
        return

    async def stop() -> None:
        await asyncio.sleep(until - asyncio.get_running_loop().time())
        if run.stopped is None and run.outstanding > 0:
            run.stopped = "deadline"
        await group.cancel()

    timer = asyncio.create_task(stop())
    try:
        yield
    finally:
        timer.cancel()
        await asyncio.gather(timer, return_exceptions=True)


async def _score(sample: Sample, options: Options, left_s: float) -> Scored:
    if sample.state != "finished":
        return Scored(sample)
    truncated = sample.finish_reason == "length"
    answer = await extract(sample.text, options.extractor, options.pattern, truncated)
    return Scored(sample, answer, None if answer is None else await canonical(answer, min(10.0, left_s)))


def _event(scored: Scored) -> dict[str, Any]:
    sample = scored.sample
    return {
        "event": "sample",
        "index": sample.index,
        "state": sample.state,
        "answer": scored.answer,
        "tokens": sample.tokens,
    }


def _reason(run: Run, options: Options, settled: Settled) -> str | None:
    if settled(run):
        return "decided"
    if options.budget_tokens is not None and run.tokens >= options.budget_tokens:
        return "budget_tokens"
    return None


def _none_finished(run: Run) -> BraidError:
    if run.stopped == "deadline":
        return _too_late()
    if run.stopped is not None:
        return UpstreamFailed("no sample finished within budget_tokens: raise it, or lower max_tokens")
    return UpstreamFailed("every sample failed")


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded(
        "no sample finished within deadline_s: raise it, or lower max_tokens", param="reasoning.deadline_s"
    )


def most_confident(scored: Iterable[Scored]) -> Scored:
    """The sample with the highest mean log-probability; a tie goes to the lowest submission index."""
    return max(scored, key=lambda one: (one.sample.mean_logprob, -one.sample.index))


async def conclude(
    name: str, run: Run, options: Options, progress: Progress, chosen: Scored, **fields: Any
) -> Answer:
    """The answer that returns ``chosen``, told to a streaming client too. ``fields`` go into the report
    (``answer`` and ``votes`` unless they are the chosen sample's own)."""
    cancelled = sum(scored.sample.state == "stopped_early" for scored in run.ended)
    report: dict[str, Any] = {
        "strategy": name,
        "n": run.n,
        "samples": [scored.report(options.return_samples) for scored in run.ended],
        "votes": [],
        "answer": chosen.answer,
        "chosen": chosen.sample.index,
        "confidence": None,
        "stopped_early": run.stopped,
        "samples_cancelled": cancelled,
        "tokens": run.usage.completion_tokens,
        **fields,
    }
    told = ("answer", "confidence", "stopped_early", "samples_cancelled")
    await progress({"event": "decided", **{key: report[key] for key in told}})
    return Answer({**chosen.sample.choice, "index": 0}, report, [run.usage])
