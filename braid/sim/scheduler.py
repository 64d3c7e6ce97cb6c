"""Continuous batching over a paged KV cache, step by step. Pure state: no clock, no tasks.

As vLLM's scheduler: sequences that run come first, prompts are computed in chunks within a budget of tokens
a step, waiting ones are let in first come first served while there are blocks, and when a running sequence
finds none the last one let in is preempted: it loses its blocks and computes what it had again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from braid.sim.blocks import BlockPool
from braid.sim.draws import Draw
from braid.sim.tokens import Prompt, chain, root

Progress = Callable[["Sequence"], None]
"""Told after each step that computed something of a sequence; it may have ended (``sequence.ended``)."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and the sample that goes on from it.

    Attributes:
        draw: what it will say; ``generated`` tokens of it are out.
        on_progress: called after each step it takes part in, or only after its last one (``only_end``).
        ready: leading prompt tokens whose KV an import holds, beyond what the prefix cache has.
        computed: tokens whose KV is in ``blocks``; ``published`` of the blocks are in the prefix cache.
        cached: prompt tokens that it found there when it was first let in; -1 before that.
        keep: give the blocks to whoever asked for that when it ends, instead of freeing them.
    """

    prompt: Prompt
    draw: Draw
    on_progress: Progress
    only_end: bool = True
    ready: int = 0
    keep: bool = False
    generated: int = 0
    computed: int = 0
    published: int = 0
    cached: int = -1
    preemptions: int = 0
    blocks: list[int] = field(default_factory=list)
    ended: bool = False
    _links: list[bytes] = field(default_factory=list)

    @property
    def known(self) -> int:
        """Tokens there are: the prompt's and those generated."""
        return len(self.prompt) + self.generated

    def links(self, block_size: int) -> list[bytes]:
        """Links of all full blocks of the known tokens."""
        if not self._links:
            self._links = list(self.prompt.links(block_size))
        full = self.known // block_size
        if len(self._links) < full:
            at = len(self._links) * block_size
            link = self._links[-1] if self._links else root(self.prompt.salt)
            self._links += chain(link, self.tokens(at, full * block_size), block_size)
        return self._links

    def tokens(self, first: int, last: int) -> list[int]:
        """Ids of the known tokens ``[first, last)``."""
        prompt = len(self.prompt)
        found = list(self.prompt.tokens[first : min(last, prompt)])
        if last > prompt:
            found += self.draw.ids(last - prompt)[max(0, first - prompt) :]
        return found


@dataclass(slots=True)
class Step:
    """What one step computes: (sequence, tokens of it), and what the step's duration depends on."""

    work: list[tuple[Sequence, int]]
    attended_tokens: int = 0
    prefill_tokens: int = 0


class Scheduler:
    """Owns the sequences between :meth:`add` and their end, and their blocks.

    Call :meth:`begin`, let the step's time pass, call :meth:`finish`, and again. Between the two, sequences
    may be added and aborted: an aborted one's blocks are free at once.

    Args:
        pool: may also be used by others, who hold blocks of their own.
        slots: most sequences that run at the same time.
        budget: most tokens of a step.
    """

    def __init__(self, pool: BlockPool, *, block_size: int, slots: int, budget: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.preempted = 0
        self._slots = slots
        self._budget = budget

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; :meth:`blocks_for` all its tokens must not be over the pool's size."""
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now: it says nothing more, and its blocks are free. Idempotent."""
        if sequence.ended:
            return
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._end(sequence)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def begin(self) -> Step:
        """Choose the next step's work and take the blocks for it; without work the step is empty."""
        step = Step([])
        preempted = self.preempted
        left = self._schedule_running(step, self._budget)
        if self.preempted == preempted:
            self._schedule_waiting(step, left)
        return step

    def finish(self, step: Step) -> None:
        """The step's time is over: what it computed is there, and who listens is told."""
        for sequence, count in step.work:
            if sequence.ended:
                continue
            sequence.computed += count
            if sequence.computed == sequence.known:
                sequence.generated += 1
            if sequence.generated == sequence.draw.tokens:
                self.running.remove(sequence)
                self._end(sequence)
                sequence.on_progress(sequence)
            elif not sequence.only_end:
                sequence.on_progress(sequence)

    def check_integrity(self, others: Iterable[list[int]] = ()) -> None:
        """Assert that blocks and states agree. ``others``: blocks that are held by others."""
        self.pool.check_integrity([*(s.blocks for s in self.running), *others])
        assert not any(s.ended for s in (*self.running, *self.waiting))
        assert not any(s.blocks or s.computed for s in self.waiting)
        assert len(self.running) <= self._slots
        for sequence in self.running:
            assert sequence.computed < sequence.known <= len(sequence.prompt) + sequence.draw.tokens
            assert len(sequence.blocks) >= self.blocks_for(sequence.computed)

    def _schedule_running(self, step: Step, left: int) -> int:
        """Every running sequence, as far as the budget goes; returns what is left of it."""
        at = 0
        while at < len(self.running) and left:
            sequence = self.running[at]
            count = min(sequence.known - sequence.computed, left)
            if not self._grow(sequence, count):
                continue  # somebody was preempted: the place may hold nobody any more
            self._take(step, sequence, count)
            left -= count
            at += 1
        return left

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Blocks for ``count`` tokens more. False if one sequence had to be preempted first."""
        missing = self.blocks_for(sequence.computed + count) - len(sequence.blocks)
        if missing > self.pool.free_blocks:
            self._preempt(self.running.pop())
            return False
        if missing > 0:
            sequence.blocks += self.pool.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preempted += 1
        sequence.preemptions += 1
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _schedule_waiting(self, step: Step, left: int) -> None:
        while self.waiting and left and len(self.running) < self._slots:
            sequence = self.waiting[0]
            count = self._let_in(sequence, left)
            if not count:
                return
            self.running.append(self.waiting.popleft())
            self._take(step, sequence, count)
            left -= count

    def _let_in(self, sequence: Sequence, left: int) -> int:
        """Blocks for a sequence's first chunk; returns its tokens, 0 if there are not enough blocks.

        At least its last token is computed, for its logits: the block that it lies in is never shared.
        """
        whole = (sequence.known - 1) // self.block_size
        shared = self.pool.cached(sequence.links(self.block_size)[:whole])
        computed = max(len(shared) * self.block_size, min(sequence.ready, sequence.known - 1))
        count = min(sequence.known - computed, left)
        missing = self.blocks_for(computed + count) - len(shared)
        if not self.pool.can_take(shared, missing):
            return 0
        self.pool.share(shared)
        sequence.blocks = [*shared, *self.pool.allocate(missing)]
        sequence.computed, sequence.published = computed, len(shared)
        if sequence.cached < 0:
            sequence.cached = computed
        return count

    def _take(self, step: Step, sequence: Sequence, count: int) -> None:
        """Enter a sequence into a step. What it fills is in the prefix cache at once, for its siblings."""
        end = sequence.computed + count
        step.work.append((sequence, count))
        step.attended_tokens += count * (sequence.computed + end + 1) // 2
        if sequence.computed < len(sequence.prompt):
            step.prefill_tokens += count
        links = sequence.links(self.block_size)
        for i in range(sequence.published, end // self.block_size):
            self.pool.publish(sequence.blocks[i], links[i])
            sequence.published = i + 1

    def _end(self, sequence: Sequence) -> None:
        sequence.ended = True
        if not (sequence.keep and sequence.generated == sequence.draw.tokens):
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.published = [], 0, 0
