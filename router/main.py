"""The router process: start, serve, drain."""

from __future__ import annotations

import asyncio
import logging

from braid import log as braid_log
from braid.heap import freeze_heap, keep_heap_trimmed
from braid.http import listen
from braid.settings import RouterSettings
from braid.signals import stop_on_signal
from router import strategies
from router.app import App
from router.server import make_server

log = logging.getLogger("braid.router")


def main(settings: RouterSettings) -> int:
    """Run the router until a signal; the exit status is 0 after a drain, 1 if it could not start."""
    braid_log.configure("router", settings.log_level)
    try:
        return asyncio.run(serve(settings))
    except (OSError, ValueError) as error:
        log.error("cannot start", extra={"reason": str(error)})
        return 1


async def serve(settings: RouterSettings) -> int:
    """Serve until SIGTERM or SIGINT, then drain. A second signal ends the process at once."""
    strategies.load_plugins()
    app = App(settings)
    sock = listen(settings.host, settings.port)
    try:
        await app.start()
        stop = stop_on_signal(1)
        server = make_server(app)
        freeze_heap()
        keep_heap_trimmed()
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        host, port = sock.getsockname()[:2]
        if settings.port_file is not None:
            _write_port(settings, port)
        log.info("listening", extra={"http": f"http://{host}:{port}", "link": app.link.endpoint})
        await asyncio.wait({asyncio.create_task(stop.wait()), serving}, return_when=asyncio.FIRST_COMPLETED)
        log.info("draining", extra={"drain_s": settings.drain_s})
        await app.drain(settings.drain_s)
        server.should_exit = True
        await serving
    finally:
        await app.stop()
        sock.close()
    log.info("stopped")
    return 0


def _write_port(settings: RouterSettings, port: int) -> None:
    """Written whole or not at all: others wait for this file."""
    assert settings.port_file is not None
    partial = settings.port_file.with_suffix(".partial")
    partial.write_text(f"{port}\n")
    partial.replace(settings.port_file)
