"""Several prompts drawn at the same time, as one group: the next steps of many partial answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from braid.errors import BraidError
from braid.proof import merge
from braid.wire import KvRecord, Verdict, Watch
from router.sampler import Group, GroupUsage, Sample, Sampler
from router.strategies.continuation import limit_of, limited

_BRANCHES = "branches"
_CLOSE_S = 5.0
COMPLETION_TOKENS = 16
"""What OpenAI's completions generate where ``max_tokens`` is not given."""


@dataclass(frozen=True, slots=True)
class Branch:
    """``n`` samples of ``body``; ``after`` as :meth:`router.sampler.Sampler.group` takes it."""

    body: Mapping[str, Any]
    n: int = 1
    after: Sample | None = None


def fork(branches: Sequence[Branch]) -> dict[str, Any]:
    """A body for :class:`Forking`: all of ``branches`` at once, numbered in their order."""
    return {_BRANCHES: tuple(branches)}


def capped(body: Mapping[str, Any], most: int) -> Mapping[str, Any]:
    """``body``, or a :func:`fork` of some, with no sample of more than ``most`` tokens. One that says less
    stays as it is; a completion that says nothing is given 16 by the API."""
    if _BRANCHES in body:
        return fork([replace(branch, body=capped(branch.body, most)) for branch in body[_BRANCHES]])
    limit = limit_of(body)
    if limit is None and "messages" not in body:
        limit = COMPLETION_TOKENS
    return body if limit is not None and limit <= most else limited(body, most)


class Forking:
    """A Sampler over another, whose groups may be of a :func:`fork`.

    So a :class:`router.strategies.run.Run` bounds, cancels and accounts for all branches as for one group.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

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
        """As :meth:`router.sampler.Sampler.group`; ``n`` of a fork is the sum of its branches'."""
        branches: tuple[Branch, ...] | None = body.get(_BRANCHES)
        if branches is None:
            return self._sampler.group(body, n, first, keep=keep, after=after, watch=watch)
        groups = []
        for branch in branches:
            group = self._sampler.group(
                branch.body, branch.n, first, keep=keep, after=branch.after, watch=watch
            )
            groups.append(_Open(group, set(range(first, first + branch.n))))
            first += branch.n
        return ForkedGroup(groups)


@dataclass(slots=True)
class _Open:
    """A branch's group and the numbers of its samples that have not ended."""

    group: Group
    outstanding: set[int]
    error: BraidError | None = None


class ForkedGroup:
    """A :class:`router.sampler.Group` of groups. A branch that can't be served is its samples' failure;
    if none can, its error is the group's."""

    def __init__(self, groups: Sequence[_Open]) -> None:
        self.usage = GroupUsage()
        self._groups = groups
        self._entered: list[_Open] = []
        self._queue: asyncio.Queue[Sample | None] = asyncio.Queue()
        self._readers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> ForkedGroup:
        try:
            for one in self._groups:
                try:
                    await one.group.__aenter__()
                    self._entered.append(one)
                except BraidError as error:
                    one.error = error
        except BaseException as failure:
            await self._leave((type(failure), failure, failure.__traceback__))
            raise
        if not self._entered:
            raise self._first_error()
        self._readers = [asyncio.create_task(self._read(one)) for one in self._entered]
        return self

    async def __aexit__(self, *exc: object) -> None:
        failure: Sequence[object] = exc
        try:
            if not isinstance(exc[1], asyncio.CancelledError):
                await self.cancel()
                with contextlib.suppress(TimeoutError):  # a group has one reader: it must end before the exit
                    async with asyncio.timeout(_CLOSE_S):
                        await asyncio.gather(*self._readers, return_exceptions=True)
        except BaseException as error:  # nobody waits any more: the branches are left at once
            failure = (type(error), error, error.__traceback__)
            raise
        finally:
            for reader in self._readers:
                reader.cancel()
            await asyncio.gather(*self._readers, return_exceptions=True)
            await self._leave(failure)
            _sum_into(self.usage, [one.group.usage for one in self._groups])

    async def __aiter__(self) -> AsyncIterator[Sample]:
        running, produced = len(self._readers), False
        while running:
            sample = await self._queue.get()
            if sample is None:
                running -= 1
            else:
                produced = True
                yield sample
        await asyncio.gather(*self._readers)  # raises what is no error of a branch
        if not produced and any(one.error for one in self._groups):
            raise self._first_error()
        for one in self._groups:
            message = one.error.message if one.error else "The branch ended without this sample."
            for index in sorted(one.outstanding):
                yield Sample(index, "failed", error=message)

    async def cancel(self, indices: tuple[int, ...] | None = None) -> None:
        for one in self._entered:
            mine = None if indices is None else tuple(one.outstanding.intersection(indices))
            if one.outstanding and mine != ():
                await one.group.cancel(mine)

    async def redraw(self, indices: tuple[int, ...]) -> None:
        for one in self._entered:
            if mine := tuple(one.outstanding.intersection(indices)):
                await one.group.redraw(mine)

    async def _read(self, one: _Open) -> None:
        try:
            async for sample in one.group:
                one.outstanding.discard(sample.index)
                self._queue.put_nowait(sample)
        except BraidError as error:
            one.error = error
        finally:
            self._queue.put_nowait(None)

    async def _leave(self, exc: Sequence[object]) -> None:
        left = [one.group.__aexit__(*exc) for one in self._entered]
        for result in await asyncio.gather(*left, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    def _first_error(self) -> BraidError:
        return next(one.error for one in self._groups if one.error is not None)


def _sum_into(total: GroupUsage, usages: Sequence[GroupUsage]) -> None:
    records: dict[str, list[KvRecord]] = {}
    for usage in usages:
        total.prompt_tokens += usage.prompt_tokens
        total.cached_tokens += usage.cached_tokens
        total.continued_tokens += usage.continued_tokens
        total.completion_tokens += usage.completion_tokens
        for worker, record in usage.kv.items():
            records.setdefault(worker, []).append(record)
    total.kv.update({worker: merge(of_one) for worker, of_one in records.items()})
    total.prefill = ",".join(dict.fromkeys(usage.prefill for usage in usages if usage.prefill))
