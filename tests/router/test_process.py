"""The router as a process: what it imports, its port file, its signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import httpx
import pytest

from braid import wire
from tests.router.conftest import CHAT, LONG_S, chat
from tests.router.fake_worker import FakeWorker, answer_at_gate, silent
from tests.router.strategies import packages

IMPORTS = """
import sys, time
begun = time.process_time()
import msgspec, prometheus_client, pydantic_settings, uvicorn, zmq.asyncio
theirs = time.process_time()
import router.main
print(theirs - begun, time.process_time() - theirs)
print(*sys.modules)
"""


Imports = Callable[[], tuple[float, float, set[str]]]


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> Imports:
    """CPU seconds that importing the libraries of the compiled router takes, and then importing it; what is
    loaded by both."""
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("compiled"))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def measure() -> tuple[float, float, set[str]]:
        command = [sys.executable, "-c", IMPORTS]
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        seconds, modules = out.splitlines()
        theirs, ours = map(float, seconds.split())
        return theirs, ours, set(modules.split())

    measure()  # compiles
    return measure


def test_the_router_imports_no_engine(imports: Imports) -> None:
    assert not imports()[2] & {"torch", "vllm", "transformers", "numpy", "sympy"}


def test_the_router_is_imported_in_half_a_second(imports: Imports) -> None:
    """In one of several tries, on a machine that imports its libraries in a quarter of a second; on a slower
    one in twice what they take. Processor time grows on a machine that others use too."""
    assert any(theirs + ours < max(0.5, 2 * theirs) for theirs, ours, _ in (imports() for _ in range(10)))


class Process:
    """A router process and one pair of workers without engines."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, d0: FakeWorker) -> None:
        self.process = process
        self.url = url
        self.d0 = d0

    async def drains(self) -> None:
        """Return once the router has logged that it drains."""
        assert self.process.stderr is not None
        async with asyncio.timeout(LONG_S):
            while b"draining" not in await self.process.stderr.readline():
                pass

    async def ends(self) -> int:
        return await asyncio.wait_for(self.process.wait(), LONG_S)


@contextlib.asynccontextmanager
async def running(
    tmp_path: Path, script: object = answer_at_gate, env: Mapping[str, str] | None = None
) -> AsyncIterator[Process]:
    link, port_file = f"ipc://{tmp_path}/link", tmp_path / "port"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router", "--port", "0", "--link", link, "--port-file", str(port_file)),
        *("--heartbeat-s", "0.1", "--drain-s", str(10 * LONG_S)),
        env={**os.environ, **(env or {})},
        stderr=subprocess.PIPE,
    )
    try:
        p0 = FakeWorker(link, "prefill", "p0")
        d0 = FakeWorker(link, "decode", "d0", script)  # type: ignore[arg-type]
        async with p0, d0:
            await asyncio.gather(p0.join(), d0.join())
            async with asyncio.timeout(LONG_S):
                while not port_file.exists():
                    await asyncio.sleep(0.01)
            yield Process(process, f"http://127.0.0.1:{int(port_file.read_text())}", d0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_sigterm_lets_running_requests_end_and_exits_0(tmp_path: Path) -> None:
    async with running(tmp_path) as router, httpx.AsyncClient(base_url=router.url, timeout=LONG_S) as http:
        request = asyncio.create_task(http.post(CHAT, json=chat()))
        await router.d0.expect(wire.Decode)
        router.process.send_signal(signal.SIGTERM)
        await router.drains()
        refused = await http.post(CHAT, json=chat())
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        router.d0.gate.set()
        assert (await request).status_code == 200
        assert await router.ends() == 0


async def test_a_second_signal_exits_at_once(tmp_path: Path) -> None:
    async with (
        running(tmp_path, silent) as router,
        httpx.AsyncClient(base_url=router.url, timeout=LONG_S) as http,
    ):
        request = asyncio.create_task(http.post(CHAT, json=chat()))
        await router.d0.expect(wire.Decode)
        router.process.send_signal(signal.SIGTERM)
        await router.drains()
        router.process.send_signal(signal.SIGTERM)
        assert await router.ends() == 1
        with pytest.raises(httpx.HTTPError):
            await request


def test_a_taken_port_is_a_clear_error(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "router", "--port", port, "--link", f"ipc://{tmp_path}/link"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 1
    assert "cannot start" in done.stderr


OFFERED = """
from router.strategies import StrategySpec
from router.strategies.direct import DirectOptions, run
ECHO = StrategySpec("echo", DirectOptions, run, "As direct.")
"""


async def test_a_strategy_of_another_package_is_there_after_a_start_and_a_broken_one_harms_nobody(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    packages.write(folder, {"offered": OFFERED}, {"echo": "offered:ECHO", "broken": "offered:BROKEN"})
    async with (
        running(tmp_path, env={"PYTHONPATH": str(folder)}) as router,
        httpx.AsyncClient(timeout=LONG_S) as http,
    ):
        listed = (await http.get(f"{router.url}/v1/strategies")).json()["data"]
        assert listed[-1]["id"] == "echo"
        router.d0.gate.set()
        reasoning = {"strategy": "echo", "deadline_s": LONG_S}
        reply = await http.post(f"{router.url}{CHAT}", json=chat(reasoning=reasoning))
        assert reply.json()["reasoning"]["answer"] == "0"
