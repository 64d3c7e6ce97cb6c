"""What keeps vLLM's processes from outliving their parent, and one request from ending an engine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvtransfer.adapter import futex
from kvtransfer.rows import address_of

TOUCHPOINTS = (
    "vllm.v1.engine.core.EngineCore.scheduler",
    "vllm.v1.engine.core.EngineCore.request_block_hasher",
    "vllm.v1.engine.core.EngineCore.vllm_config",
    "vllm.v1.engine.core.EngineCore.step",
    "vllm.v1.engine.core.EngineCore.capture_iteration_details",
    "vllm.v1.engine.core.EngineCore.log_error_detail",
    "vllm.v1.engine.core.EngineCore._process_aborts_queue",
    "vllm.v1.engine.core.EngineCore._attach_iteration_details",
    "vllm.v1.engine.core.EngineCore._attach_weight_version",
    "vllm.v1.engine.core.EngineCore._should_throttle_prefills",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1._kv_cache_config",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1._vllm_config",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._sample",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._bookkeeping_sync",
    "vllm.v1.sample.sampler.batched_count_greater_than",
    "vllm.v1.sample.ops.topk_topp_sampler.compiled_random_sample",
    "vllm.distributed.device_communicators.shm_broadcast.SpinCondition.wait",
    "vllm.distributed.device_communicators.shm_broadcast.SpinCondition.record_read",
    "vllm.distributed.device_communicators.shm_broadcast.MessageQueue.acquire_read",
    "vllm.distributed.device_communicators.shm_broadcast.MessageQueue.acquire_write",
    "vllm.distributed.device_communicators.shm_broadcast.ShmRingBuffer.get_metadata",
)
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux).

    vLLM's EngineCore and Worker outlive a killed server, with their cores, ports and memory.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def ease_waiting(yield_s: float = 0.0, look_s: float = 0.005) -> None:
    """Let readers of vLLM's shared-memory queues sleep until something is written, on the CPU.

    They spin for a second after each message: a Worker that has nothing to do and an EngineCore that
    waits for a step take a core each, from the model, the server and the transfers. Here a reader yields for
    ``yield_s`` after a message (a Worker between two steps: its core stays awake), then waits on a futex in
    the queue's own memory, which every write wakes. It looks every ``look_s`` all the same: the word may
    change and change back. After the second it waits for the queue's ping, as before.
    """
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

    read, write, wait = MessageQueue.acquire_read, MessageQueue.acquire_write, SpinCondition.wait

    def acquire_read(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._spin_condition.queue = self
        return read(self, *args, **kwargs)

    @contextlib.contextmanager
    def acquire_write(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        index = self.current_idx
        with write(self, *args, **kwargs) as buffer:
            yield buffer
        futex.wake(_flag(self.buffer, index))

    def eased(self: Any, timeout_ms: int | None = None) -> None:
        queue = getattr(self, "queue", None)  # none if somebody waited before this was here
        if queue is None or not yield_s < time.monotonic() - self.last_read <= self.busy_loop_s:
            wait(self, timeout_ms)
            return
        word = _flag(queue.buffer, queue.current_idx)
        seen = futex.value(word)
        with queue.buffer.get_metadata(queue.current_idx) as flags:
            ready = flags[0] and not flags[queue.local_reader_rank + 1]
        if not ready:
            futex.wait(word, seen, look_s)

    if futex.AVAILABLE:
        MessageQueue.acquire_read, MessageQueue.acquire_write = acquire_read, acquire_write
        SpinCondition.wait = eased


def read_pings(every_s: float = 1.0) -> None:
    """Have readers of vLLM's shared-memory queues look at their pings also while they need none.

    Each message is announced on a socket that a reader only looks at when it has read nothing for a second.
    ZMQ keeps one ping of them, but tells the reader's socket of every one, and keeps these 40 bytes until it
    is used: an EngineCore that is never idle for a second grows by 2 MiB an hour at 14 messages a second.
    """
    import zmq
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    record = SpinCondition.record_read

    def record_read(self: Any) -> None:
        record(self)
        if self.last_read >= getattr(self, "looked_at", 0.0) + every_s:
            self.looked_at = self.last_read
            pings = self.local_notify_socket
            # what a ping tells of is written already, and the reader looks for it before it waits
            if pings.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                pings.recv(zmq.NOBLOCK)

    SpinCondition.record_read = record_read


def sample_at_once() -> None:
    """Have a Worker on a CPU sample as soon as it has the logits.

    Where vLLM does not schedule ahead, EngineCore asks for a step, waits for its answer, and then asks for
    the samples: between the two the Worker waits for it. Here it asks for both before it waits, as it does
    where it schedules ahead.
    """
    from vllm.v1.engine.core import EngineCore

    def step(self: Any) -> tuple[Any, bool]:
        if not self.scheduler.has_requests():
            return {}, False
        planned = self.scheduler.schedule(self._should_throttle_prefills())
        computes = planned.total_num_scheduled_tokens > 0
        computed = self.model_executor.execute_model(planned, non_block=True)
        samples = None
        if computes and not self.is_pooling_model:
            grammar = self.scheduler.get_grammar_bitmask(planned)
            samples = self.model_executor.sample_tokens(grammar, non_block=True)
        with self.capture_iteration_details(planned) as details, self.log_error_detail(planned):
            output = computed.result()  # first: what failed there is not to be missed
            if output is None:
                assert samples is not None
                output = samples.result()
        self._process_aborts_queue()
        outputs = self.scheduler.update_from_output(planned, output)
        self._attach_iteration_details(outputs, details)
        self._attach_weight_version(outputs)
        return outputs, computes

    EngineCore.step = step


def _flag(ring: Any, index: int) -> int:
    """Address of the aligned word that holds the flag which says that a chunk is written."""
    start: int = getattr(ring, "braid_start", 0)
    if not start:
        start = ring.braid_start = address_of(ring.shared_memory.buf)
    offset: int = ring.metadata_offset + index * ring.metadata_size
    return (start + offset) & ~3


def guard_seeded_chunks() -> None:
    """Let a seeded prompt prefill in several chunks on the CPU.

    vLLM samples after every chunk, throws all but the last sample away and rewinds that request's
    generator by an offset; CPU generators have none, and the exception ends the engine. Here the
    generators of discarded rows are saved before sampling and restored after, and the rewind does not
    see them: the samples do not depend on the chunking.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    sample, bookkeep = GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync

    def guarded_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        rows = [i for i in _discarded(self) if i in generators]
        saved = {i: generators[i].get_state() for i in rows}
        try:
            return sample(self, *args, **kwargs)
        finally:
            for i, state in saved.items():
                generators[i].set_state(state)

    def guarded_bookkeep(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        generators = batch.generators
        hidden = set(_discarded(self))
        batch.generators = {i: g for i, g in generators.items() if i not in hidden}
        try:
            return bookkeep(self, *args, **kwargs)
        finally:
            batch.generators = generators

    GPUModelRunner._sample = guarded_sample
    GPUModelRunner._bookkeeping_sync = guarded_bookkeep


def guard_drafts() -> None:
    """Let a speculating engine sample with a temperature, ``top_k`` or ``top_p`` on the CPU.

    vLLM's kernel that repeats these for each draft writes into a copy, so the drafts are judged with whatever
    lay in memory: a wrong temperature gives wrong samples, a wrong ``top_k`` ends the engine. In a step
    without drafts the largest of no ``top_k`` ends it too. Here torch repeats them, and no draft is no work.
    """
    from vllm.v1.sample import rejection_sampler

    constrain = rejection_sampler.apply_sampling_constraints

    def guarded(logits: Any, *args: Any, **kwargs: Any) -> Any:
        return constrain(logits, *args, **kwargs) if logits.shape[0] else logits

    def expand(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)).long()
        expanded = x.repeat_interleave(counts, output_size=num_tokens)
        return expanded.masked_fill(expanded == replace_from, replace_to)

    rejection_sampler.apply_sampling_constraints = guarded
    rejection_sampler.expand_batch_to_tokens = expand


def rank_without_compiler() -> None:
    """Let an engine rank sampled tokens by a plain expression, on the CPU.

    vLLM compiles it when log-probabilities are first asked for: seconds in a C++ compiler, for which every
    request of the engine waits.
    """
    from vllm.v1.sample import sampler

    def count(x: Any, values: Any) -> Any:
        return (x >= values).sum(-1)

    sampler.batched_count_greater_than = count


def warm_sampler(vocabulary: int) -> None:
    """Compile what an engine draws samples with before it serves, on the CPU.

    vLLM compiles it for a batch of one and for larger ones when they first come: seconds in a C++ compiler,
    for which every request of the engine waits.
    """
    import torch
    from vllm.v1.sample.ops.topk_topp_sampler import compiled_random_sample

    with torch.inference_mode():
        for rows in (1, 2):
            compiled_random_sample(torch.zeros(rows, vocabulary))


def _discarded(runner: Any) -> list[int]:
    """Rows of the batch whose prompt is not complete after this step."""
    rows = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
    return [int(i) for i in np.nonzero(rows)[0]]
