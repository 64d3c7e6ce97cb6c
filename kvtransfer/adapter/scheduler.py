"""The connector in EngineCore: what a step saves of a prompt (P), what it copies for a sample (D)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvtransfer.adapter.imports import Copy, Imports
from kvtransfer.adapter.options import KEEP, Options, param_of
from kvtransfer.plan import Blocking, finished_blocks, hit_unit, needed_blocks

log = logging.getLogger("braid.kvtransfer")


@dataclass
class StepMeta(KVConnectorMetadata):
    """Scheduler to workers, one step. ``saves``: (key, group, first block, block ids) finished by this step;
    ``copies``: blocks to copy before the forward; ``spoiled``: keys of prompts that can't be saved."""

    saves: list[tuple[tuple[bytes, int, int], int, int, list[int]]] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    spoiled: list[tuple[bytes, int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Saving:
    """A prompt being prefilled here for a consumer. ``saved``: by group, the next block to save."""

    key: tuple[bytes, int, int]
    prompt: int
    saved: list[int]


class SchedulerSide:
    """State in EngineCore: prompts being saved (P), imports and tail copies (D)."""

    def __init__(self, options: Options, groups: Sequence[Blocking]) -> None:
        self.options = options
        self.groups = tuple(groups)
        self.unit = hit_unit(groups)
        self.imports = Imports(groups)
        self.saving: dict[str, _Saving] = {}
        self._copies: list[Copy] = []
        self._ends: dict[str, int] = {}

    def matched(self, request: Any, local: int) -> tuple[int, bool]:
        name = param_of(request.kv_transfer_params)
        if self.options.role != "decode" or not isinstance(name, str):
            return 0, False
        end = self._ends[request.request_id] = self.imports.reach(name, request.all_token_ids, local)
        return end - local, False

    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        name = param_of(request.kv_transfer_params)
        if external and isinstance(name, str):
            end = self._ends.pop(request.request_id)
            self._copies += self.imports.copies(name, end, blocks.get_block_ids())

    def finished(self, request: Any, blocks: Sequence[Sequence[int]], pool: Any) -> None:
        """A request has ended, and its blocks are about to be freed."""
        self.saving.pop(request.request_id, None)
        self._ends.pop(request.request_id, None)
        name = param_of(request.kv_transfer_params, KEEP)
        if self.options.role == "decode" and isinstance(name, str) and pool is not None:
            self.imports.keep(pool, request, blocks, name)

    def step(self, output: Any) -> StepMeta:
        copies, self._copies = self._copies, []
        meta = StepMeta(copies=copies)
        if self.options.role == "prefill":
            for new in output.scheduled_new_reqs:
                if new.req_id not in self.saving:  # vLLM's V2 runner hears of resumed ones as new
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
        key = param_of(extra.get("kv_transfer_params"))
        if isinstance(key, list | tuple) and new.prompt_token_ids is not None:
            prompt = len(new.prompt_token_ids)
            first = [needed_blocks(prompt, group, self.unit).start for group in self.groups]
            self.saving[new.req_id] = _Saving((key[0], key[1], key[2]), prompt, first)

    def _try_save(self, meta: StepMeta, output: Any, request_id: str, saving: _Saving, computed: int) -> None:
        """One request's trouble costs its own transfer only, whose lease ends."""
        try:
            self._save(meta, output, request_id, saving, computed)
        except Exception:
            log.exception("kv_save_failed", extra={"ticket": saving.key[0].hex()})
            meta.spoiled.append(saving.key)
            del self.saving[request_id]

    def _save(self, meta: StepMeta, output: Any, request_id: str, saving: _Saving, computed: int) -> None:
        """A block is saved in the step that fills it: later it may be outside of its group's window."""
        ids: Any = None
        for group, blocking in enumerate(self.groups):
            first, done = saving.saved[group], finished_blocks(computed, saving.prompt, blocking.block_size)
            if done <= first:
                continue
            ids = ids or output.kv_connector_block_state.get_block_ids(request_id)
            blocks = list(ids[group][first:done])
            if 0 in blocks:
                raise RuntimeError(f"blocks [{first}, {done}) of group {group} have left their window")
            meta.saves.append((saving.key, group, first, blocks))
            saving.saved[group] = done
