"""What an engine and its transfer ends hold, as last read."""

from __future__ import annotations

from braid import wire
from braid.worker import told
from braid.worker.engine import Engine
from kvtransfer.wire import Stats


class Counters:
    """Read every heartbeat (:meth:`refresh`), so that a beat never waits for the engine.

    Attributes:
        core: EngineCore's: ``blocks`` of the pool, ``free`` ones, requests ``running`` and ``waiting``,
            ``requests`` the scheduler holds, ``imports``.
        kv: the transfer ends', summed over the ranks.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.core: dict[str, int] = {}
        self.kv = Stats()

    async def refresh(self) -> None:
        self.core = await self._engine.call("braid_stats")
        self.kv = await self._engine.control.stats()

    def roomy(self) -> bool:
        """Whether the engine begins at once with what it is given."""
        return told.roomy(self.core.get("waiting", 0), self.core.get("free", 1), self.core.get("blocks", 1))

    def beat(self) -> wire.Beat:
        """The worker's heartbeat; ``tickets`` are leases held or loads in flight."""
        blocks = self.core.get("blocks", 1)
        return wire.Beat(
            running=self.core.get("running", 0),
            waiting=self.core.get("waiting", 0),
            kv_usage=1 - self.core.get("free", blocks) / blocks,
            staging_bytes=self.kv.staging_bytes,
            tickets=self.kv.leases + self.kv.loads,
            engine_ok=not self._engine.llm.errored,
            free_blocks=self.core.get("free"),
        )
