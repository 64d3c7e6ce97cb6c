"""The contract between a strategy and the rest of the router.

A strategy is a short async function over a :class:`Sampler`. It sees prompts, samples and scores and
nothing of workers, sockets or HTTP, so a scripted sampler tests it in microseconds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from braid.proof import merge
from braid.wire import KvRecord, Verdict, Watch

if TYPE_CHECKING:
    from router.retrievers import Retriever
    from router.verifiers import Verifier

State = Literal["finished", "stopped_early", "failed"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One ended sample of a group.

    Attributes:
        index: submission number in the request: of its first group from 0, of a later one from ``first``.
        state: ``finished``; ``stopped_early`` (cancelled by the strategy); ``failed``.
        text: the generated text (reasoning split off where the engine has a parser for it).
        finish_reason: OpenAI's (``stop``, ``length``, ``tool_calls``), empty unless finished.
        tokens: generated tokens, also of a sample that did not finish.
        logprob: sum of the sampled tokens' natural log-probabilities, None if unknown.
        choice: the OpenAI choice object as the engine's OpenAI layer made it.
        error: why it failed.
        confidence: what is measured of the samples of a group that is watched, None if it could not be.
        worker: name of the decode worker that made it.
        kept: what that worker knows its KV by, empty if it was not asked to keep it.
    """

    index: int
    state: State
    text: str = ""
    finish_reason: str = ""
    tokens: int = 0
    logprob: float | None = None
    choice: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    confidence: float | None = None
    worker: str = ""
    kept: str = ""

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability a token; -inf where it is unknown or nothing was generated."""
        if self.logprob is None or self.tokens == 0:
            return float("-inf")
        return self.logprob / self.tokens


@dataclass(slots=True)
class GroupUsage:
    """What a group cost, complete once it is closed.

    Attributes:
        prompt_tokens: tokens of the shared prompt, once.
        cached_tokens: of these, found in a cache.
        completion_tokens: every generated token, also of stopped and failed samples.
        kv: one record a decode worker, keyed by its name.
        prefill: name of the prefill worker, empty for path ``local``.
        continued_tokens: of the prompt's, the beginning that an earlier group of the request has told of: the
            prompt and the tokens of the sample that this group goes on from.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    kv: dict[str, KvRecord] = field(default_factory=dict)
    prefill: str = ""
    continued_tokens: int = 0


def as_one(usages: Sequence[GroupUsage]) -> GroupUsage:
    """The usage of several groups of one prompt (waves): the prompt counts once, with what the first of
    them found in a cache; generated tokens and KV records add up."""
    if len(usages) == 1:
        return usages[0]
    first = max(usages, key=lambda usage: usage.prompt_tokens)  # the first of the largest
    records: dict[str, list[KvRecord]] = {}
    for usage in usages:
        for worker, record in usage.kv.items():
            records.setdefault(worker, []).append(record)
    return GroupUsage(
        first.prompt_tokens,
        first.cached_tokens,
        sum(usage.completion_tokens for usage in usages),
        {worker: merge(of_one) for worker, of_one in records.items()},
        ",".join(dict.fromkeys(usage.prefill for usage in usages if usage.prefill)),
        first.continued_tokens,
    )


class Group(Protocol):
    """N samples of one prompt. An async context manager: leaving it cancels what still runs, waits
    until that has ended, and completes :attr:`usage`."""

    usage: GroupUsage

    def __aiter__(self) -> AsyncIterator[Sample]:
        """Ended samples in completion order, each submitted sample exactly once."""

    async def cancel(self, indices: tuple[int, ...] | None = None) -> None:
        """Stop these samples (all that run, if None). Idempotent. They are still yielded, with
        state ``stopped_early``, unless they had ended."""

    async def redraw(self, indices: tuple[int, ...]) -> None:
        """Draw samples that still run once more, each on another worker than its own if there is one: the
        first of the two to finish is yielded, the other is cancelled. No effect on those drawn twice."""

    async def __aenter__(self) -> Group: ...

    async def __aexit__(self, *exc: object) -> None: ...


class Sampler(Protocol):
    """What a strategy may ask for."""

    def group(
        self,
        body: Mapping[str, Any],
        n: int,
        first: int = 0,
        *,
        keep: bool = False,
        after: Sample | None = None,
        watch: Watch | Verdict | None = None,
    ) -> Group:
        """Open a group: ``n`` samples of the OpenAI chat or completion ``body`` (its ``n`` and
        ``stream`` are ignored), numbered from ``first``. Nothing runs before ``__aenter__``.

        With a seed, a sample is a function of body, seed and number: give each sample of a request a
        number of its own, and it is the same however the request is cut into groups.

        ``keep``: the workers hold on to the samples' KV until the request ends, as far as there is room,
        for groups that go on ``after`` one of them: ``body`` is complete in itself and repeats that
        sample's prompt and text, and runs where its KV is, so that only what is new is computed. If it is
        not there any more the group is a group like any other.

        ``watch``: the workers measure the samples' confidence as they grow, and end those that fall below
        its ``least``: their state is ``stopped_early``. Or they find the verdict of samples that verify.

        Raises (from ``__aenter__`` or iteration): a :class:`braid.errors.BraidError` when no sample
        could be produced."""

    def verifier(self, name: str) -> Verifier:
        """The operator's verifier of this name; raises :class:`braid.errors.BadRequest`, with the names that
        there are, if there is none."""

    def retriever(self, name: str | None) -> Retriever:
        """The operator's retriever of this name, the only one if None; raises as :meth:`verifier`."""


Progress = Callable[[Mapping[str, Any]], Awaitable[None]]
"""Reports a JSON-serialisable event (``{"event": "sample", ...}``) to a streaming client."""


@dataclass(slots=True)
class Answer:
    """What a strategy returns.

    Attributes:
        choice: the OpenAI choice returned to the client (its index is set to 0).
        report: JSON-serialisable fields of the reply's ``reasoning`` (votes, samples, confidence...).
        usages: of every group the strategy opened.
        tokens: generated tokens of the returned answer itself, None if unknown.
    """

    choice: Mapping[str, Any]
    report: dict[str, Any]
    usages: list[GroupUsage]
    tokens: int | None = None
