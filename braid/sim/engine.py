"""A simulated engine: :class:`~braid.sim.scheduler.Scheduler` on asyncio's clock."""

from __future__ import annotations

import asyncio

from braid.sim.model import StepModel
from braid.sim.scheduler import Scheduler, Sequence, Step
from braid.worker.pace import Pace

MAX_DEBT_S = 0.25
"""A loop that is late makes up for at most this much; what is beyond counts as lost."""


class Engine:
    """Runs one step after another while there is work; asleep otherwise.

    Steps that end late (a busy event loop, coarse timers) are made up for by the next ones, so that simulated
    time keeps pace. ``lag_s``: the latest that a step ended; ``lost_s``: time that could not be made up.
    Figures of a run in which they are not small say nothing about the model.

    Args:
        time_scale: seconds that a simulated second takes.
    """

    def __init__(self, scheduler: Scheduler, model: StepModel, time_scale: float = 1.0) -> None:
        self.scheduler = scheduler
        self.steps = 0
        self.busy_s = 0.0
        self.lag_s = 0.0
        self.lost_s = 0.0
        self.time_scale = time_scale
        self.pace = Pace(asyncio.get_running_loop().time)
        self._model = model
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._due = 0.0
        self._changed: list[asyncio.Future[None]] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; all that one turn of the event loop adds is there for the same step."""
        self.scheduler.add(sequence)
        self.poke()

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now; its blocks are free when this returns. Idempotent."""
        self.scheduler.abort(sequence)
        self.poke()

    def poke(self) -> None:
        """Work has come, or blocks have become free."""
        changed, self._changed = self._changed, []
        for waiter in changed:
            if not waiter.done():
                waiter.set_result(None)
        if self._timer is None:
            self._due = self._loop.time()
            self._timer = self._loop.call_soon(self._begin)

    async def changed(self) -> None:
        """Wait until blocks may have become free."""
        waiter = self._loop.create_future()
        self._changed.append(waiter)
        await waiter

    def close(self) -> None:
        """Stop the clock. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self) -> None:
        step = self.scheduler.begin()
        if not step.work:
            self._timer = None
            return
        seconds = self._model.seconds(len(step.work), step.attended_tokens, step.prefill_tokens)
        self.busy_s += seconds
        if not step.prefill_tokens:
            self.pace.note(len(step.work), step.attended_tokens, seconds * self.time_scale)
        self._due += seconds * self.time_scale
        self._timer = self._loop.call_at(self._due, self._end, step)

    def _end(self, step: Step) -> None:
        late = self._loop.time() - self._due
        self.lag_s = max(self.lag_s, late)
        if late > MAX_DEBT_S:
            self.lost_s += late - MAX_DEBT_S
            self._due += late - MAX_DEBT_S
        self.steps += 1
        self._timer = self._loop.call_soon(self._begin)
        running = len(self.scheduler.running)
        self.scheduler.finish(step)
        if len(self.scheduler.running) < running:
            self.poke()
