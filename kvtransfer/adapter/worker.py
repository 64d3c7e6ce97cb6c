"""The connector in a Worker: the thread that moves this rank's blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from braid.keys import stop_authenticator
from kvtransfer import wire
from kvtransfer.adapter.options import Options
from kvtransfer.adapter.reblock import ReblockedCache, Translation, translated
from kvtransfer.arena import Arena
from kvtransfer.cache import Cache, Group, HostCache
from kvtransfer.codec import CODECS, Codec, encoded_gather, encoded_shapes
from kvtransfer.consumer import Consumer
from kvtransfer.control import ControlClient
from kvtransfer.digest import Digests
from kvtransfer.fence import Fence
from kvtransfer.loop import Loop
from kvtransfer.producer import Producer
from kvtransfer.sockets import new_context
from kvtransfer.transport.select import consumer_transports, producer_transports

log = logging.getLogger("braid.kvtransfer")


class WorkerSide:
    """State in a Worker: the transfer thread with its producer or consumer end.

    A consumer takes blocks of one size. For producers with another one there is a consumer each, made when
    it is first needed: ``block_size`` is ours if blocks can be cut, else 0.
    """

    def __init__(self, options: Options, groups: Sequence[Group], block_size: int) -> None:
        self.cache: Cache = _cache(groups)
        self._options, self._groups, self._block_size = options, groups, block_size
        self._device = str(groups[0].layers[0].device)
        rank = get_tensor_model_parallel_rank()
        self._loop = Loop(f"braid-kv-{rank}")
        self._context = new_context()
        self._control = ControlClient(self._loop, self._context, options.control, rank, self._command)
        self._translations: dict[int, Translation] = {}
        self._bf16 = all(layer.dtype == torch.bfloat16 for g in groups for layer in g.layers)
        self._codec = _codec(options.codec, self._bf16)
        self._keys_dir = Path(options.keys_dir) if options.keys_dir else None
        self._producer: Producer | None = None
        self._consumers: dict[int, Consumer] = {}
        try:
            if options.role == "prefill":
                self._producer = self._new_producer()
            else:
                self._consumers[0] = self._new_consumer(self.cache, self._control.emit)
        except BaseException:
            self._context.destroy(linger=0)  # a context with open sockets waits for them when it is collected
            raise
        self._control.emit(
            wire.Ready(
                rank,
                _layout(groups[0].layers[0].device.type),
                self.cache.shapes,
                self._producer.endpoint if self._producer is not None else "",
            )
        )
        self._loop.start()

    def _new_producer(self) -> Producer:
        options = self._options
        return Producer(
            self._loop,
            self._context,
            bind=options.kv_bind,
            epoch=options.epoch,
            shapes=encoded_shapes(self.cache.shapes, self._codec) if self._codec else self.cache.shapes,
            codec=options.codec,
            arena=_arena(options.staging_bytes, self._groups),
            lease_s=options.lease_s,
            emit=self._control.emit,
            transports=producer_transports(options.transports, bind=options.host, device=self._device),
            piece_bytes=options.piece_bytes,
            digests=Digests(options.check),
            keys_dir=self._keys_dir,
        )

    def _new_consumer(self, cache: Cache, emit: Callable[[wire.Event], None]) -> Consumer:
        options = self._options
        return Consumer(
            self._loop,
            self._context,
            cache,
            name=options.name,
            emit=emit,
            transports=consumer_transports(
                options.transports, options.lanes, bind=options.host, device=self._device
            ),
            codecs=CODECS if self._bf16 else {},
            keys_dir=self._keys_dir,
        )

    def save(self, key: wire.Key, group: int, first: int, block_ids: list[int]) -> None:
        """Copy finished blocks into staging; the producer sends them on."""
        assert self._producer is not None

        def gather(run: range, out: torch.Tensor) -> Fence | None:
            if self._codec is not None:
                return encoded_gather(self.cache, self._codec, group, block_ids[run.start : run.stop], out)
            return self.cache.gather(group, block_ids[run.start : run.stop], out)

        self._producer.stage(key, group, first, len(block_ids), gather)

    def spoil(self, key: wire.Key) -> None:
        """End the lease of a prompt that can't be saved: who waits for it computes it."""
        assert self._producer is not None
        self._loop.call_soon(partial(self._producer.end, key, "copy_failed"))

    def close(self) -> None:
        self._loop.stop()
        if self._producer is not None:
            self._producer.close()
        for consumer in self._consumers.values():
            consumer.close()
        stop_authenticator(self._context)
        self._context.destroy(linger=0)

    def _command(self, command: wire.Command) -> None:
        producer = self._producer
        match command:
            case wire.Open() if producer is not None:
                producer.open(command)
            case wire.Close(key, reason) if producer is not None:
                producer.end(key, reason)
            case wire.Load() if producer is None:
                self._load(command)
            case wire.Hold() if producer is None:
                self._consumers[0].hold(command)
            case wire.Unload(key, reason) if producer is None:
                loading = [n for n, translation in self._translations.items() if key in translation]
                self._consumers[loading[0] if loading else 0].unload(key, reason)
            case wire.Stat():
                loads = sum(consumer.stats().loads for consumer in self._consumers.values())
                self._control.emit(producer.stats() if producer is not None else wire.Stats(loads=loads))
            case _:
                log.error("kv_unexpected_command", extra={"kind": type(command).__name__})

    def _load(self, command: wire.Load) -> None:
        theirs = command.block_size
        if not self._block_size or theirs in (0, self._block_size):
            self._consumers[0].load(command)
            return
        try:
            if theirs not in self._consumers:
                self._add_consumer(theirs)
            translated_ = self._translations[theirs].load(command)
        except ValueError as error:
            self._control.emit(wire.Failed(command.key, str(error)))
            return
        self._consumers[theirs].load(translated_)

    def _add_consumer(self, theirs: int) -> None:
        """A consumer of blocks of ``theirs`` tokens, into ours."""
        cache = ReblockedCache(self._groups[0], self._block_size, theirs)
        translation = self._translations[theirs] = Translation(cache, self._block_size, theirs)
        self._consumers[theirs] = self._new_consumer(cache, translated(self._control.emit, translation))


def _cache(groups: Sequence[Group]) -> Cache:
    """Gather and scatter for where the engine keeps its blocks.

    On a GPU a scatter follows the model's stream: the scheduler may give blocks away before the last step
    that wrote them has ended. Not measured.
    """
    device = groups[0].layers[0].device
    if device.type == "cpu":
        return HostCache(groups)
    from kvtransfer.gpu import CudaStream, DeviceCache

    return DeviceCache(groups, after=CudaStream(torch.cuda.current_stream(device)))


def _arena(nbytes: int, groups: Sequence[Group]) -> Arena:
    """Staging; pinned where it is filled by a GPU."""
    arena = Arena(nbytes)
    if groups[0].layers[0].device.type == "cuda":
        from kvtransfer.gpu import pin

        try:
            pin(arena.memory)
            arena.hold_pages()
        except OSError as error:
            log.warning("kv_staging_not_pinned", extra={"detail": str(error)})
    return arena


def _codec(name: str, bf16: bool) -> Codec | None:
    """The encoding of what a producer sends; raises ValueError where the cache can't be encoded."""
    if not name:
        return None
    if not bf16:
        raise ValueError(f"kv_codec {name} needs a bfloat16 KV cache: run the engine with --dtype bfloat16")
    return CODECS[name]


def _layout(device: str) -> str:
    """What makes two ranks' blocks look alike inside besides the model: device kind and kernel ISA."""
    if device != "cpu":
        return device
    amx = torch.cpu._is_amx_tile_supported()
    return f"cpu/{torch.backends.cpu.get_cpu_capability()}{'+AMX' if amx else ''}"
