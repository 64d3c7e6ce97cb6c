"""A process of simulated workers: ``braid sim``, ``braid prefill --engine sim``, ``braid decode ...``."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from braid.heap import freeze_heap, keep_heap_trimmed
from braid.http import Server, listen
from braid.log import configure
from braid.settings import WorkerSettings
from braid.signals import stop_on_signal
from braid.sim.settings import SimSettings
from braid.sim.worker import Shared, SimWorker

log = logging.getLogger("braid.sim")


def main(settings: SimSettings) -> int:
    """``braid sim``: workers of both roles."""
    return run(settings, settings.prefill, settings.decode)


def run(settings: WorkerSettings, prefill: int, decode: int) -> int:
    """Run this many workers until SIGTERM or SIGINT (a second one ends at once); returns the exit code."""
    configure(settings.worker or "sim", settings.log_level)
    try:
        return asyncio.run(_Process(settings).run(prefill, decode))
    except (OSError, ValueError) as error:
        log.error("cannot_start", extra={"reason": str(error)})
        return 1


class _Process:
    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self.workers: list[SimWorker] = []

    async def run(self, prefill: int, decode: int) -> int:
        stop = stop_on_signal(130)
        settings = self._settings
        shared = Shared(settings)
        with listen(settings.host, settings.port) as listener:
            http = f"http://{settings.host}:{listener.getsockname()[1]}"
            self.workers = _workers(settings, shared, prefill, decode, http)
            for worker in self.workers:
                worker.start()
            server = Server(uvicorn.Config(_app(self.workers), log_config=None, lifespan="off"))
            freeze_heap()
            keep_heap_trimmed()
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            log.info("simulated_workers_up", extra={"prefill": prefill, "decode": decode, "http": http})
            await stop.wait()
            await asyncio.gather(*(worker.drain(settings.drain_s) for worker in self.workers))
            await asyncio.sleep(0.05)  # the last answers leave
            for worker in self.workers:
                await worker.stop()
            await shared.stop()
            server.should_exit = True
            await serving
        log.info("stopped")
        return 0


def _workers(
    settings: WorkerSettings, shared: Shared, prefill: int, decode: int, http: str
) -> list[SimWorker]:
    base = settings.worker or f"sim-{secrets.token_hex(3)}"
    found = [SimWorker("prefill", f"{base}-prefill-{i}", settings, shared, http) for i in range(prefill)]
    return found + [SimWorker("decode", f"{base}-decode-{i}", settings, shared, http) for i in range(decode)]


def _app(workers: list[SimWorker]) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/ready")
    async def ready() -> Response:
        up = all(worker.link.registered and not worker.link.draining for worker in workers)
        return Response(status_code=200 if up else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        return {"simulated": True, "workers": {worker.name: worker.stats() for worker in workers}}

    return app
