"""NIXL over UCX, as vLLM's NixlConnector uses it: one READ of each block in each layer, memory to memory.

Runs in the environment that has `nixl`; which of UCX's transports it takes is in UCX's own variables.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config  # type: ignore[import-not-found, unused-ignore]

from benchmarks.kv_layout import Evictor, Pool, layout_of, now

WAIT_S = 30.0


class Agent:
    """An agent with its pool registered and its descriptors prepared, one a layer and block.

    Args:
        filled: whether the pool holds random bytes: the side that is read.
        threads: UCX worker threads of the agent, 0 for none but the progress thread.
    """

    def __init__(self, layout: dict[str, int], name: str, filled: bool, threads: int) -> None:
        self._layout = layout_of(layout)
        self._pool = Pool(self._layout, filled)
        self._evictor = Evictor()
        self._agent = nixl_agent(name, nixl_agent_config(num_threads=threads))
        regions = [(layer.ctypes.data, layer.nbytes, 0, "") for layer in self._pool.layers]
        self._registered = self._agent.register_memory(self._agent.get_reg_descs(regions, "DRAM"))
        self._local = self._prepare("NIXL_INIT_AGENT", self._addresses())
        self._remote: Any = None

    def _addresses(self) -> list[int]:
        return [int(layer.ctypes.data) for layer in self._pool.layers]

    def _prepare(self, agent: str, addresses: Sequence[int]) -> Any:
        """Descriptors of all blocks: those of a layer in a row, layers one after the other."""
        page, blocks = self._layout.page_bytes, self._layout.blocks
        starts = np.asarray(addresses, np.uint64)[:, None] + np.arange(blocks, dtype=np.uint64) * np.uint64(
            page
        )
        table = np.zeros((starts.size, 3), np.uint64)
        table[:, 0], table[:, 1] = starts.reshape(-1), page
        return self._agent.prep_xfer_dlist(agent, self._agent.get_xfer_descs(table, "DRAM"))

    def _indices(self, block_ids: Sequence[int]) -> Any:
        layers = np.arange(self._layout.layers, dtype=np.int32)[:, None] * self._layout.blocks
        return (layers + np.asarray(block_ids, np.int32)).reshape(-1)

    def describe(self) -> dict[str, Any]:
        """What the other side needs to read from this one."""
        metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "addresses": self._addresses()}

    def connect(self, metadata: str, addresses: Sequence[int]) -> None:
        """Get ready to read from the agent that `describe` has described."""
        remote = self._agent.add_remote_agent(base64.b64decode(metadata))
        self._agent.make_connection(remote)
        self._remote = self._prepare(remote, addresses)

    def read(self, local: Sequence[int], remote: Sequence[int], pause_s: float) -> dict[str, Any]:
        """Read the remote's blocks into the local ones.

        `seconds` from posting to completion, seen by looking every `pause_s` (0: all the time);
        `prepare_s` is what making the request from prepared descriptors took before that.
        """
        here, there = self._indices(local), self._indices(remote)
        begin = now()
        handle = self._agent.make_prepped_xfer("READ", self._local, here, self._remote, there)
        prepared = now() - begin
        self._evictor.evict()
        start = now()
        state = self._agent.transfer(handle)
        while state == "PROC" and now() - start < WAIT_S:
            if pause_s:
                time.sleep(pause_s)
            state = self._agent.check_xfer_state(handle)
        seconds = now() - start
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"transfer is {state}")
        return {"seconds": seconds, "prepare_s": prepared}

    def checksum(self, block_ids: Sequence[int]) -> dict[str, Any]:
        return {"crc": self._pool.checksum(block_ids)}

    def close(self) -> None:
        """The process ends right after; UCX frees what it holds."""
