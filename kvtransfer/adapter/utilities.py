"""Calls that the server makes on EngineCore's thread, between two scheduler steps."""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from kvtransfer.adapter.imports import Imports
from kvtransfer.adapter.layout import total_heads


def install_utilities() -> None:
    """Add the import calls to EngineCore's utility methods (an exception there fails the call only)."""

    def braid_begin(self: Any, name: str, tokens: list, salt: str, lora: list) -> dict | None:  # type: ignore[type-arg]
        request = Request.from_engine_core_request(
            EngineCoreRequest(
                request_id=f"import-{name}",
                prompt_token_ids=list(tokens),
                mm_features=None,
                sampling_params=SamplingParams(max_tokens=1),
                pooling_params=None,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=salt or None,
                data_parallel_rank=None,
            ),
            self.request_block_hasher,
        )
        return _imports(self).begin(self.scheduler.kv_cache_manager, request, name)

    def braid_commit(self: Any, name: str) -> None:
        _imports(self).commit(self.scheduler.kv_cache_manager, name)

    def braid_release(self: Any, name: str) -> None:
        _imports(self).release(self.scheduler.kv_cache_manager, name)

    def braid_layout(self: Any) -> dict[str, Any]:
        connector = self.scheduler.get_kv_connector()
        return {
            "groups": [msgspec.to_builtins(info) for info in connector.groups],
            "heads": total_heads(self.vllm_config),
            "sliceable": connector.sliceable,
        }

    def braid_stats(self: Any) -> dict[str, int]:
        pool = self.scheduler.kv_cache_manager.block_pool
        running, waiting = self.scheduler.get_request_counts()
        return {
            "blocks": pool.num_gpu_blocks,
            "free": pool.get_num_free_blocks(),
            "running": running,
            "waiting": waiting,
            "requests": len(self.scheduler.requests),
            "imports": len(_imports(self).held),
        }

    for utility in (braid_begin, braid_commit, braid_release, braid_layout, braid_stats):
        setattr(EngineCore, utility.__name__, utility)


def _imports(core: Any) -> Imports:
    imports = core.scheduler.get_kv_connector().imports
    assert isinstance(imports, Imports)
    return imports
