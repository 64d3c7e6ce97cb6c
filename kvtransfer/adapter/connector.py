"""The KV connector that vLLM loads (``kv_connector_module_path``).

vLLM makes one per process: in EngineCore (scheduler role) and in each Worker (worker role). On a
prefill worker the scheduler side says which blocks a step finishes and the worker side copies them
into the producer's staging after the forward. On a decode worker transfers write straight into blocks
of an import (:mod:`.imports`), outside of any step; a sample only asks for the copy of its tail block.

Every hook is wrapped: an exception costs the request its transfer, never the engine.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import vllm
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from braid.keys import stop_authenticator
from braid.log import configure
from kvtransfer import wire
from kvtransfer.adapter import TESTED
from kvtransfer.adapter.guards import die_with_parent, ease_waiting, guard_seeded_chunks
from kvtransfer.adapter.imports import Imports
from kvtransfer.arena import Arena
from kvtransfer.cache import Cache, Group, HostCache
from kvtransfer.consumer import Consumer
from kvtransfer.control import ControlClient
from kvtransfer.digest import Check, Digests
from kvtransfer.fence import Fence
from kvtransfer.loop import Loop
from kvtransfer.plan import finished_blocks
from kvtransfer.producer import Producer
from kvtransfer.transport.select import consumer_transports, producer_transports

log = logging.getLogger("braid.kvtransfer")

PARAM = "braid"
"""Key in a request's ``kv_transfer_params``: a :class:`wire.Key` on P, an import's name on D."""

F = TypeVar("F", bound=Callable[..., Any])


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """``kv_connector_extra_config``: what the server process tells its engine's connectors."""

    role: str
    control: str
    name: str
    epoch: int
    transports: tuple[str, ...]
    lanes: int = 1
    keys_dir: str = ""
    kv_bind: str = ""
    staging_bytes: int = 0
    piece_bytes: int = 0
    check: Check = "off"
    lease_s: float = 30.0


@dataclass
class StepMeta(KVConnectorMetadata):
    """Scheduler to workers, one step. ``saves``: (key, first block, block ids) finished by this step;
    ``copies``: (source, target) block ids to copy before the forward."""

    saves: list[tuple[tuple[bytes, int, int], int, list[int]]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


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
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise RuntimeError(
                f"this model has {len(kv_cache_config.kv_cache_groups)} KV cache groups; Braid moves the "
                "KV of models with one (full attention in every layer) so far"
            )
        self.options = msgspec.convert(self._kv_transfer_config.kv_connector_extra_config, Options)
        die_with_parent()
        if current_platform.is_cpu():
            ease_waiting()
        configure(f"{self.options.name}/{role.name.lower()}")
        self._scheduler: _SchedulerSide | None = None
        self._worker: _WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            self._scheduler = _SchedulerSide(self.options, block_size)
            _install_utilities()
        else:
            guard_seeded_chunks()

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # finished blocks are staged as they are computed

    @property
    def imports(self) -> Imports:
        """The imports of this EngineCore (scheduler role only)."""
        assert self._scheduler is not None
        return self._scheduler.imports

    # --- scheduler role ---

    @_contained(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        assert self._scheduler is not None
        return self._scheduler.matched(request, num_computed_tokens)

    @_contained(lambda: None)
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
        self._scheduler.saving.pop(request.request_id, None)
        return False, None

    # --- worker role ---

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layers = list(kv_caches.values())
        self._worker = _WorkerSide(self.options, HostCache([_group(layers)]), layers[0].device.type)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        meta = self._connector_metadata
        if self._worker is not None and isinstance(meta, StepMeta):
            for source, target in meta.copies:
                self._worker.cache.copy(0, source, target)

    @_contained(lambda: None)
    def wait_for_save(self) -> None:
        meta = self._connector_metadata
        if self._worker is not None and isinstance(meta, StepMeta):
            for key, first, block_ids in meta.saves:
                self._worker.save(wire.Key(*key), first, block_ids)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are complete before the step."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: whole blocks are saved after the step."""

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


@dataclass(slots=True)
class _Saving:
    """A prompt being prefilled here for a consumer."""

    key: tuple[bytes, int, int]
    prompt: int
    saved: int = 0


class _SchedulerSide:
    """State in EngineCore: prompts being saved (P), imports and tail copies (D)."""

    def __init__(self, options: Options, block_size: int) -> None:
        self.options = options
        self.block_size = block_size
        self.imports = Imports(block_size)
        self.saving: dict[str, _Saving] = {}
        self._copies: list[tuple[int, int]] = []

    def matched(self, request: Any, local: int) -> tuple[int, bool]:
        name = _param(request.kv_transfer_params)
        if self.options.role != "decode" or not isinstance(name, str):
            return 0, False
        tail = self.imports.tail_of(name, request.num_prompt_tokens, local)
        return (tail[0], False) if tail is not None else (0, False)

    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        name = _param(request.kv_transfer_params)
        if external == 0 or not isinstance(name, str):
            return
        local = request.num_prompt_tokens - 1 - external
        tail = self.imports.tail_of(name, request.num_prompt_tokens, local)
        assert tail is not None, "an import is released only after its samples have ended"
        target = blocks.get_block_ids()[0][local // self.block_size]
        self._copies.append((tail[1], target))

    def step(self, output: Any) -> StepMeta:
        copies, self._copies = self._copies, []
        meta = StepMeta(copies=copies)
        if self.options.role == "prefill":
            for new in output.scheduled_new_reqs:
                self._start_saving(new)
            cached = output.scheduled_cached_reqs
            before = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
            before.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            for request_id, scheduled in output.num_scheduled_tokens.items():
                if (saving := self.saving.get(request_id)) is not None:
                    self._try_save(meta, output, request_id, saving, before[request_id] + scheduled)
        return meta

    def _start_saving(self, new: Any) -> None:
        extra = (new.sampling_params.extra_args or {}) if new.sampling_params else {}
        key = _param(extra.get("kv_transfer_params"))
        if isinstance(key, list | tuple) and new.prompt_token_ids is not None:
            self.saving[new.req_id] = _Saving((key[0], key[1], key[2]), len(new.prompt_token_ids))

    def _try_save(self, meta: StepMeta, output: Any, request_id: str, saving: _Saving, computed: int) -> None:
        """One request's trouble costs its own transfer only; its lease then expires."""
        try:
            self._save(meta, output, request_id, saving, computed)
        except Exception:
            log.exception("kv_save_failed", extra={"ticket": saving.key[0].hex()})
            del self.saving[request_id]

    def _save(self, meta: StepMeta, output: Any, request_id: str, saving: _Saving, computed: int) -> None:
        done = finished_blocks(computed, saving.prompt, self.block_size)
        if done > saving.saved:
            blocks = output.kv_connector_block_state.get_block_ids(request_id)[0]
            meta.saves.append((saving.key, saving.saved, list(blocks[saving.saved : done])))
            saving.saved = done


class _WorkerSide:
    """State in a Worker: the transfer thread with its producer or consumer end."""

    def __init__(self, options: Options, cache: Cache, device: str) -> None:
        self.cache = cache
        rank = get_tensor_model_parallel_rank()
        self._loop = Loop(f"braid-kv-{rank}")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._control = ControlClient(self._loop, self._context, options.control, rank, self._command)
        keys_dir = Path(options.keys_dir) if options.keys_dir else None
        self._producer: Producer | None = None
        self._consumer: Consumer | None = None
        if options.role == "prefill":
            self._producer = Producer(
                self._loop,
                self._context,
                bind=options.kv_bind,
                epoch=options.epoch,
                shapes=cache.shapes,
                arena=Arena(options.staging_bytes),
                lease_s=options.lease_s,
                emit=self._control.emit,
                transports=producer_transports(options.transports),
                piece_bytes=options.piece_bytes,
                digests=Digests(options.check),
                keys_dir=keys_dir,
            )
        else:
            self._consumer = Consumer(
                self._loop,
                self._context,
                cache,
                name=options.name,
                emit=self._control.emit,
                transports=consumer_transports(options.transports, options.lanes),
                keys_dir=keys_dir,
            )
        self._control.emit(
            wire.Ready(
                rank,
                _layout(device),
                cache.shapes,
                self._producer.endpoint if self._producer is not None else "",
            )
        )
        self._loop.start()

    def save(self, key: wire.Key, first: int, block_ids: list[int]) -> None:
        """Copy finished blocks into staging; the producer sends them on."""
        assert self._producer is not None

        def gather(run: range, out: torch.Tensor) -> Fence | None:
            return self.cache.gather(0, block_ids[run.start : run.stop], out)

        self._producer.stage(key, 0, first, len(block_ids), gather)

    def close(self) -> None:
        self._loop.stop()
        if self._producer is not None:
            self._producer.close()
        if self._consumer is not None:
            self._consumer.close()
        stop_authenticator(self._context)
        self._context.destroy(linger=0)

    def _command(self, command: wire.Command) -> None:
        producer, consumer = self._producer, self._consumer
        match command:
            case wire.Open() if producer is not None:
                producer.open(command)
            case wire.Close(key, reason) if producer is not None:
                producer.end(key, reason)
            case wire.Load() if consumer is not None:
                consumer.load(command)
            case wire.Unload(key, reason) if consumer is not None:
                consumer.unload(key, reason)
            case wire.Stat():
                end = producer if producer is not None else consumer
                assert end is not None
                self._control.emit(end.stats())
            case _:
                log.error("kv_unexpected_command", extra={"kind": type(command).__name__})


def _group(layers: list[torch.Tensor]) -> Group:
    """Layers of one group; heads are told apart where they are the second dimension, ``[B, H, N, C]``."""
    return Group(layers, layers[0].shape[1] if layers[0].dim() == 4 else 1)


def _layout(device: str) -> str:
    """What makes two ranks' blocks look alike inside besides the model: device kind and kernel ISA."""
    if device != "cpu":
        return device
    amx = torch.cpu._is_amx_tile_supported()
    return f"cpu/{torch.backends.cpu.get_cpu_capability()}{'+AMX' if amx else ''}"


def _param(params: Any) -> Any:
    return params.get(PARAM) if isinstance(params, dict) else None


def _install_utilities() -> None:
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

    for utility in (braid_begin, braid_commit, braid_release, braid_stats):
        setattr(EngineCore, utility.__name__, utility)


def _imports(core: Any) -> Imports:
    imports = core.scheduler.get_kv_connector().imports
    assert isinstance(imports, Imports)
    return imports
