"""An engine without a model: its utility calls and its ranks do what a test says."""

from __future__ import annotations

import asyncio
from typing import Any

from braid.worker.seats import DispatchFlow, Seats
from kvtransfer import wire as kv
from kvtransfer.plan import Blocking, needed_blocks

BLOCK_SIZE = 4


def open_seats(capacity: int = 1000) -> tuple[Seats, DispatchFlow]:
    """Seats of an engine, and a dispatch of a group that takes them."""
    return Seats(capacity, capacity, 0.0), DispatchFlow(group=True)


class FakeControl:
    """Ranks whose loads end when the test says so; it fails the test for overlapping lives.

    ``sent``: what every rank was told, by rank, of each load. ``held``: producers whose leases are kept, by
    rank, by key.
    """

    def __init__(self, journal: list[str]) -> None:
        self.sent: list[list[kv.Load]] = []
        self.loads: asyncio.Queue[kv.Load] = asyncio.Queue()
        self.unloads: asyncio.Queue[kv.Unload] = asyncio.Queue()
        self.held: dict[kv.Key, list[tuple[str, ...]]] = {}
        self.slow_unload = False
        self._journal = journal
        self._waiting: dict[object, asyncio.Future[list[kv.Event]]] = {}

    def expect(self, key: object) -> asyncio.Future[list[kv.Event]]:
        return self._waiting.setdefault(key, asyncio.get_running_loop().create_future())

    async def send(self, commands: list[kv.Command]) -> None:
        if isinstance(hold := commands[0], kv.Hold):
            held = [command.endpoints for command in commands if isinstance(command, kv.Hold)]
            self._journal.append(f"hold {hold.key.attempt}")
            if any(held):
                self.held[hold.key] = held
            else:
                del self.held[hold.key]
            return
        loads = [command for command in commands if isinstance(command, kv.Load)]
        assert len(loads) == len(commands)
        self.sent.append(loads)
        self._journal.append(f"load {loads[0].key.attempt}")
        self.loads.put_nowait(loads[0])

    async def broadcast(self, command: kv.Command) -> None:
        assert isinstance(command, kv.Unload)
        self.unloads.put_nowait(command)
        if not self.slow_unload:
            self.end(command.key, kv.Failed(command.key, command.reason))

    def end(self, key: kv.Key, *events: kv.Event) -> None:
        """A load ends on every rank: from here on nothing writes its blocks."""
        self._journal.append(f"ended {key.attempt}")
        self._waiting.pop(("load", key)).set_result(list(events))


class FakeEngine:
    """``cached``: blocks of each group the prefix cache has. ``full``: times the pool has no room."""

    def __init__(self, blocks: int = 100, *windows: int, ranks: int = 1, kv_heads: int = 2) -> None:
        self.groups = (Blocking(BLOCK_SIZE), *(Blocking(BLOCK_SIZE, window) for window in windows))
        self.ranks = ranks
        self.slots = 8
        self.by_priority = False
        self.max_model_len = 16 * BLOCK_SIZE
        self.chunk = 4 * BLOCK_SIZE
        self.kv_heads = kv_heads
        self.journal: list[str] = []
        self.control = FakeControl(self.journal)
        self.blocks = blocks
        self.block_size = BLOCK_SIZE
        self.fingerprint = "fp"
        self.cached = 0
        self.full = 0
        self.begun: dict[str, int] = {}

    async def call(self, method: str, *args: Any) -> Any:
        name = args[0]
        self.journal.append(f"{method.removeprefix('braid_')} {name}")
        await asyncio.sleep(0)
        if method == "braid_begin":
            if self.full:
                self.full -= 1
                return None
            needed = [needed_blocks(len(args[1]), group, BLOCK_SIZE) for group in self.groups]
            self.begun[name] = sum(len(blocks) for blocks in needed)
            spans = [
                (group, first := max(blocks.start, self.cached), [i + 1 for i in range(first, blocks.stop)])
                for group, blocks in enumerate(needed)
            ]
            return {"cached": self.cached * BLOCK_SIZE, "spans": spans}
        if method == "braid_release":
            self.begun.pop(name, None)
        return None

    def count(self, entry: str) -> int:
        return self.journal.count(entry)
