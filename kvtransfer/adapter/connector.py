"""The KV connector that vLLM loads (``kv_connector_module_path``).

vLLM makes one per process: in EngineCore (scheduler role) and in each Worker (worker role). On a
prefill worker the scheduler side says which blocks a step finishes and the worker side copies them
into the producer's staging after the forward. On a decode worker transfers write straight into blocks
of an import (:mod:`.imports`), outside of any step; a sample only asks for the copy of its tail block.

Each role's state is in :mod:`.scheduler` and :mod:`.worker`. Hooks about a request are wrapped: an exception
costs the request its transfer, never the engine. What would give a wrong token if it were passed over is not:
the copy of a tail block (``update_state_after_alloc``, ``start_load_kv``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.platforms import current_platform

from braid.heap import freeze_heap, keep_heap_trimmed
from braid.log import configure
from kvtransfer import wire
from kvtransfer.adapter import TESTED
from kvtransfer.adapter.guards import (
    die_with_parent,
    ease_waiting,
    guard_drafts,
    guard_seeded_chunks,
    rank_without_compiler,
    read_pings,
    sample_at_once,
    warm_sampler,
)
from kvtransfer.adapter.imports import Imports
from kvtransfer.adapter.layout import cache_groups, check_config, group_infos, sliceable, total_heads
from kvtransfer.adapter.options import Options
from kvtransfer.adapter.scheduler import SchedulerSide, StepMeta
from kvtransfer.adapter.utilities import install_utilities
from kvtransfer.adapter.worker import WorkerSide

log = logging.getLogger("braid.kvtransfer")

WORKER_YIELD_S = 0.002
"""How long a Worker on a CPU looks for its next step without sleeping: EngineCore takes half of it."""

F = TypeVar("F", bound=Callable[..., Any])


def _contained(default: Callable[[], Any]) -> Callable[[F], F]:
    """Log an exception of a hook and return ``default()`` instead of ending the engine."""

    def wrap(hook: F) -> F:
        @functools.wraps(hook)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook(*args, **kwargs)
            except Exception:
                log.exception("kv_hook_failed", extra={"hook": hook.__name__})
                return default()

        return guarded  # type: ignore[return-value]

    return wrap


class BraidConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. ``kv_connector_extra_config`` is :class:`Options`."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if vllm.__version__.split("+")[0] not in TESTED:
            raise RuntimeError(
                f"vLLM {vllm.__version__} is not among the tested versions {', '.join(TESTED)}: "
                "install one of them"
            )
        self.options = msgspec.convert(self._kv_transfer_config.kv_connector_extra_config, Options)
        check_config(vllm_config, self.options.role)
        self.groups = group_infos(kv_cache_config)
        self.sliceable = sliceable(vllm_config, kv_cache_config)
        die_with_parent()
        read_pings()
        if current_platform.is_cpu():
            ease_waiting(yield_s=0.0 if role == KVConnectorRole.SCHEDULER else WORKER_YIELD_S)
        configure(f"{self.options.name}/{role.name.lower()}")
        keep_heap_trimmed()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._pool: Any = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(self.options, [info.blocking for info in self.groups])
            install_utilities()
            if current_platform.is_cpu():
                sample_at_once()
        else:
            guard_seeded_chunks()
            if current_platform.is_cpu():
                guard_drafts()
                rank_without_compiler()
                warm_sampler(vllm_config.model_config.get_vocab_size())

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # finished blocks are staged as they are computed

    @property
    def imports(self) -> Imports:
        """The imports of this EngineCore (scheduler role only)."""
        assert self._scheduler is not None
        return self._scheduler.imports

    # --- scheduler role ---

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._pool = gpu_block_pool

    @_contained(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        assert self._scheduler is not None
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks, num_external_tokens)

    @_contained(StepMeta)
    def build_connector_meta(self, scheduler_output: Any) -> StepMeta:
        assert self._scheduler is not None
        return self._scheduler.step(scheduler_output)

    @_contained(lambda: (False, None))
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        self._scheduler.finished(request, block_ids, self._pool)
        return False, None

    # --- worker role ---

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        groups = cache_groups(
            self.groups,
            kv_caches,
            self._kv_cache_config.num_blocks,
            total_heads(self._vllm_config),
            get_tensor_model_parallel_world_size(),
            get_tensor_model_parallel_rank(),
        )
        ours = self.groups[0].block_size if self.sliceable else 0
        self._worker = WorkerSide(self.options, groups, ours)
        if current_platform.is_cpu():
            freeze_heap()  # as vLLM does on GPUs

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        meta = self._connector_metadata
        if self._worker is not None and isinstance(meta, StepMeta):
            for group, source, target in meta.copies:
                self._worker.cache.copy(group, source, target)

    @_contained(lambda: None)
    def wait_for_save(self) -> None:
        meta = self._connector_metadata
        if self._worker is not None and isinstance(meta, StepMeta):
            for key, group, first, block_ids in meta.saves:
                try:
                    self._worker.save(wire.Key(*key), group, first, block_ids)
                except Exception:  # the others' blocks are theirs
                    log.exception("kv_save_failed", extra={"ticket": key[0].hex()})
            for key in meta.spoiled:
                self._worker.spoil(wire.Key(*key))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are complete before the step."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: whole blocks are saved after the step."""

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
