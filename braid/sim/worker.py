"""One simulated worker: an engine, its service, and its own link to the router."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from typing import Any

import zmq.asyncio

from braid import wire
from braid.keys import stop_authenticator
from braid.settings import DecodeSettings, PrefillSettings, WorkerSettings
from braid.sim.blocks import BlockPool
from braid.sim.decode import DecodeService, Identity
from braid.sim.draws import Profile
from braid.sim.engine import Engine
from braid.sim.imports import Imports
from braid.sim.kept import Kept
from braid.sim.kv import Consumer, CountedConsumer, CountedProducer, Producer
from braid.sim.model import StepModel, load_model
from braid.sim.prefill import PrefillService
from braid.sim.scheduler import Scheduler
from braid.worker.fingerprint import Traits, fingerprint
from braid.worker.link import WorkerLink
from braid.worker.seats import Seats

VERSION = "simulated"
"""What stands where a real worker names its vLLM."""


class Shared:
    """What the workers of a process share: sockets' threads, the model, and the consumer of counted KV."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.context = zmq.asyncio.Context()
        self.context.set(zmq.MAX_SOCKETS, 16384)
        self.model: StepModel = load_model(settings.sim_model_file)
        self._settings = settings
        self._consumer: CountedConsumer | None = None

    @property
    def consumer(self) -> CountedConsumer:
        if self._consumer is None:
            settings = self._settings
            self._consumer = CountedConsumer(
                self.context,
                latency_s=settings.sim_latency_s,
                bandwidth=settings.sim_bandwidth,
                time_scale=settings.sim_time_scale,
                keys_dir=settings.keys_dir,
            )
        return self._consumer

    async def stop(self) -> None:
        """After the last worker."""
        if self._consumer is not None:
            await self._consumer.stop()
        stop_authenticator(self.context)
        self.context.destroy(linger=200)


class SimWorker:
    """A simulated worker. Call order: :meth:`start`, :meth:`drain` if there is time, :meth:`stop`.

    Args:
        role: ``prefill`` needs :class:`PrefillSettings`, ``decode`` :class:`DecodeSettings`.
    """

    def __init__(
        self, role: wire.Role, name: str, settings: WorkerSettings, shared: Shared, http: str = ""
    ) -> None:
        self.role: wire.Role = role
        self.name = name
        self.epoch = secrets.randbits(63)
        self._settings = settings
        self._shared = shared
        self._http = http
        pool = BlockPool(settings.sim_blocks + 1)
        scheduler = Scheduler(
            pool, block_size=settings.block_size, slots=settings.sim_slots, budget=settings.sim_chunk
        )
        self.engine = Engine(scheduler, shared.model, settings.sim_time_scale)
        self.identity = Identity(model_name(settings), fingerprint_of(settings), settings.sim_max_model_len)
        self._end: Producer | Consumer
        self.service: DecodeService | PrefillService
        endpoints: tuple[str, ...] = ()
        if role == "prefill":
            assert isinstance(settings, PrefillSettings)
            producer = self._end = self._producer(settings)
            endpoints = (_advertised(settings, producer.endpoint),)
            self.service = PrefillService(self.engine, producer, self._send, self.identity, self.epoch)
        else:
            assert isinstance(settings, DecodeSettings)
            self.service = self._decode_service(settings)
        self.link = WorkerLink(
            settings.router,
            self._hello(endpoints),
            self.service,
            heartbeat_s=settings.heartbeat_s,
            misses=settings.heartbeat_misses,
            hang_s=settings.hang_s,
            keys_dir=settings.keys_dir,
            context=shared.context,
        )
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Say ``Hello`` and serve from now on."""
        self._serving = asyncio.create_task(self.link.run())

    async def drain(self, limit_s: float) -> None:
        """Say ``Bye`` and let what runs end."""
        await self.link.drain(self.service.idle, limit_s)

    async def stop(self) -> None:
        """End what still runs, saying so to whoever waits for it. Idempotent."""
        self.service.cancel_all("shutdown")
        await asyncio.sleep(0)  # the answers leave
        await self.kill()

    async def kill(self) -> None:
        """Vanish without a word, as a process that is killed. Idempotent."""
        if self._serving is None:
            return
        serving, self._serving = self._serving, None
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        self.engine.close()
        self.link.close()
        if isinstance(self.service, PrefillService):
            await self._end.stop()
        self.service.cancel_all("killed")
        if isinstance(self.service, DecodeService):
            await self.service.settle()
            if not isinstance(self._end, CountedConsumer):  # which is everybody's
                await self._end.stop()

    def stats(self) -> Mapping[str, Any]:
        return {"role": self.role, "registered": self.link.registered, **self.service.stats()}

    def check_integrity(self) -> None:
        self.service.check_integrity()

    def _send(self, message: wire.FromWorker) -> None:
        self.link.send(message)

    def _hello(self, endpoints: tuple[str, ...]) -> wire.Hello:
        settings = self._settings
        return wire.Hello(
            protocol=wire.PROTOCOL,
            role=self.role,
            worker=self.name,
            epoch=self.epoch,
            models=(self.identity.model,),
            max_model_len=settings.sim_max_model_len,
            block_size=settings.block_size,
            slots=settings.sim_slots,
            fingerprint=self.identity.fingerprint,
            vllm_version=VERSION,
            kv_endpoints=endpoints,
            kv_heads=1,
            traits=traits(settings),
            http=self._http,
        )

    def _decode_service(self, settings: DecodeSettings) -> DecodeService:
        consumer = self._end = self._consumer(settings)
        pool = self.engine.scheduler.pool
        kept = int(pool.blocks * settings.max_kept_share)
        imports = Imports(
            self.engine,
            consumer,
            max_load_share=settings.max_load_share,
            beside=kept + self.engine.scheduler.blocks_for(settings.sim_max_model_len),
            fingerprint=self.identity.fingerprint,
            timeout_s=settings.load_timeout_s,
        )
        return DecodeService(
            self.engine,
            imports,
            Kept(self.engine, kept),
            self._send,
            self.identity,
            profile(settings),
            Seats(settings.sim_slots, settings.width_of(settings.sim_slots), settings.calm_s),
        )

    def _producer(self, settings: PrefillSettings) -> Producer:
        block_bytes = settings.sim_kv_bytes * settings.block_size
        if settings.sim_kv == "counted":
            return CountedProducer(
                self._shared.context,
                bind=settings.kv_bind,
                epoch=self.epoch,
                block_bytes=block_bytes,
                staging_bytes=settings.staging_bytes,
                lease_s=settings.lease_s,
                keys_dir=settings.keys_dir,
            )
        from braid.sim.moved import MovedProducer

        return MovedProducer(
            name=self.name,
            bind=settings.kv_bind,
            epoch=self.epoch,
            block_bytes=block_bytes,
            staging_bytes=settings.staging_bytes,
            lease_s=settings.lease_s,
            transports=settings.kv_transports,
            piece_bytes=settings.kv_piece_bytes,
            check=settings.kv_check,
            keys_dir=settings.keys_dir,
        )

    def _consumer(self, settings: DecodeSettings) -> Consumer:
        if settings.sim_kv == "counted":
            return self._shared.consumer
        from braid.sim.moved import MovedConsumer

        return MovedConsumer(
            name=self.name,
            blocks=settings.sim_blocks + 1,
            block_bytes=settings.sim_kv_bytes * settings.block_size,
            transports=settings.kv_transports,
            lanes=settings.kv_lanes,
            keys_dir=settings.keys_dir,
        )


def model_name(settings: WorkerSettings) -> str:
    """The served name; the settings see to it that it begins with ``sim``."""
    return settings.served_model_name or "sim"


def traits(settings: WorkerSettings) -> Traits:
    """What must be equal to exchange KV; no real worker has these."""
    return (
        ("engine", VERSION),
        ("model", model_name(settings)),
        ("KV", settings.sim_kv),
        ("bytes a token", str(settings.sim_kv_bytes)),
        ("block size", str(settings.block_size)),
    )


def fingerprint_of(settings: WorkerSettings) -> str:
    """The fingerprint of :func:`traits`; it begins with ``sim``."""
    return f"sim-{fingerprint(traits(settings))}"


def profile(settings: WorkerSettings) -> Profile:
    """How samples are distributed."""
    return Profile(
        tokens=settings.sim_tokens,
        sigma=settings.sim_sigma,
        accuracy=settings.sim_accuracy,
        answers=settings.sim_answers,
    )


def _advertised(settings: PrefillSettings, endpoint: str) -> str:
    if settings.kv_advertise:
        return f"tcp://{settings.kv_advertise}:{endpoint.rsplit(':', 1)[1]}"
    if "0.0.0.0" in endpoint:
        raise ValueError("kv_bind is a wildcard: set kv_advertise to the host that decode workers reach")
    return endpoint
