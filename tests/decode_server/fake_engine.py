"""An engine without a model: its utility calls and its ranks do what a test says."""

from __future__ import annotations

import asyncio
from typing import Any

from kvtransfer import wire as kv

BLOCK_SIZE = 4


class FakeControl:
    """One rank whose loads end when the test says so; it fails the test for overlapping lives."""

    def __init__(self, journal: list[str]) -> None:
        self.ranks = {b"0": None}
        self.loads: asyncio.Queue[kv.Load] = asyncio.Queue()
        self.unloads: asyncio.Queue[kv.Unload] = asyncio.Queue()
        self.slow_unload = False
        self._journal = journal
        self._waiting: dict[object, asyncio.Future[list[kv.Event]]] = {}

    def expect(self, key: object) -> asyncio.Future[list[kv.Event]]:
        return self._waiting.setdefault(key, asyncio.get_running_loop().create_future())

    async def send(self, commands: list[kv.Command]) -> None:
        (command,) = commands
        assert isinstance(command, kv.Load)
        self._journal.append(f"load {command.key.attempt}")
        self.loads.put_nowait(command)

    async def broadcast(self, command: kv.Command) -> None:
        assert isinstance(command, kv.Unload)
        self.unloads.put_nowait(command)
        if not self.slow_unload:
            self.end(command.key, kv.Failed(command.key, command.reason))

    def end(self, key: kv.Key, event: kv.Event) -> None:
        """A load ends: from here on nothing writes its blocks."""
        self._journal.append(f"ended {key.attempt}")
        self._waiting.pop(("load", key)).set_result([event])


class FakeEngine:
    """``cached``: blocks the prefix cache has. ``full``: times the pool has no room."""

    def __init__(self, blocks: int = 100) -> None:
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
            count = -(-len(args[1]) // BLOCK_SIZE)
            self.begun[name] = count
            return {"cached": self.cached, "blocks": list(range(1, count + 1))}
        if method == "braid_release":
            self.begun.pop(name, None)
        return None

    def count(self, entry: str) -> int:
        return self.journal.count(entry)
