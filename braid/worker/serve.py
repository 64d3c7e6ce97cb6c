"""Runs a worker process: engine, link, HTTP for health and metrics, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import socket
from collections.abc import Callable
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from braid import wire
from braid.heap import freeze_heap, keep_heap_trimmed
from braid.http import Server, listen
from braid.log import configure
from braid.settings import DecodeSettings, PrefillSettings
from braid.signals import stop_on_signal
from braid.worker.engine import Engine, engine_environment, hello, private_dir, start_engine
from braid.worker.link import Service, WorkerLink, keep_calling

log = logging.getLogger("braid.worker")


class WorkerService(Service, Protocol):
    """A service that can be watched and ended."""

    async def refresh(self) -> None:
        """Read the engine's counters; called every heartbeat."""

    def idle(self) -> bool:
        """Nothing runs and nothing is held."""

    def stats(self) -> dict[str, Any]:
        """What is held now, for ``/stats`` (tests read it: all zero when idle)."""


ServiceFactory = Callable[[Engine, Callable[[wire.FromWorker], None]], WorkerService]


def run_worker(
    settings: PrefillSettings | DecodeSettings,
    engine_args: list[str],
    role: wire.Role,
    llm_class: Callable[[], Any],
    service: ServiceFactory,
) -> int:
    """Run until SIGTERM or SIGINT (a second one ends at once); returns the exit code.

    The exit code is 1 when the engine died: whoever supervises the process starts it again, with a
    new epoch.
    """
    name = settings.worker or f"{role}-{secrets.token_hex(3)}"
    configure(name, settings.log_level)
    engine_environment(settings.model)
    return asyncio.run(_Worker(settings, engine_args, role, name, llm_class, service).run())


class _Worker:
    def __init__(
        self,
        settings: PrefillSettings | DecodeSettings,
        engine_args: list[str],
        role: wire.Role,
        name: str,
        llm_class: Callable[[], Any],
        service: ServiceFactory,
    ) -> None:
        self._settings = settings
        self._engine_args = engine_args
        self._role: wire.Role = role
        self._name = name
        self._llm_class = llm_class
        self._make_service = service
        self._ready = False

    async def run(self) -> int:
        stop = stop_on_signal(130)
        sockets = private_dir(self._settings.run_dir)
        try:
            with listen(self._settings.host, self._settings.port) as listener:
                return await self._serve(sockets, listener, stop)
        finally:
            shutil.rmtree(sockets, ignore_errors=True)

    async def _serve(self, sockets: Any, listener: socket.socket, stop: asyncio.Event) -> int:
        log.info("engine_starting", extra={"model": self._settings.model})
        engine = await start_engine(self._settings, self._engine_args, self._name, self._llm_class(), sockets)
        log.info("engine_up", extra={"blocks": engine.blocks, "endpoints": engine.endpoints})
        http = f"http://{self._settings.host}:{listener.getsockname()[1]}"
        service: WorkerService | None = None

        def send(message: wire.FromWorker) -> None:
            link.send(message)

        service = self._make_service(engine, send)
        link = WorkerLink(
            self._settings.router,
            hello(engine, self._role, self._name, http),
            service,
            heartbeat_s=self._settings.heartbeat_s,
            misses=self._settings.heartbeat_misses,
            hang_s=self._settings.hang_s,
            keys_dir=self._settings.keys_dir,
        )
        server = _http_server(_app(engine, service, link))
        freeze_heap()
        keep_heap_trimmed()
        tasks = [
            asyncio.create_task(link.run()),
            asyncio.create_task(server.serve(sockets=[listener])),
            asyncio.create_task(keep_calling(service.refresh, self._settings.heartbeat_s)),
        ]
        died = asyncio.create_task(self._watch(engine))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([died, stopped, tasks[0]], return_when=asyncio.FIRST_COMPLETED)
        if not died.done():
            await link.drain(service.idle, self._settings.drain_s)
        service.cancel_all("shutdown")
        await asyncio.sleep(0.05)  # let the cancelled requests reach the engine
        server.should_exit = True
        for task in (*tasks, died, stopped):
            task.cancel()
        await asyncio.gather(*tasks, died, stopped, return_exceptions=True)
        link.close()
        engine.control.close()
        engine.llm.shutdown()
        log.info("stopped")
        return 1 if engine.llm.errored else 0

    async def _watch(self, engine: Engine) -> None:
        while not engine.llm.errored:
            await asyncio.sleep(0.1)
        log.error("engine_died")


def _http_server(app: FastAPI) -> Server:
    return Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))


def _app(engine: Engine, service: WorkerService, link: WorkerLink) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=500 if engine.llm.errored else 200)

    @app.get("/ready")
    async def ready() -> Response:
        up = link.registered and not link.draining and not engine.llm.errored
        return Response(status_code=200 if up else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        await service.refresh()
        return service.stats()

    return app
