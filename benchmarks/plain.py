"""The yardstick: one vLLM engine that prefills and decodes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.process import GuardedProcess, Launch, free_ports
from benchmarks.stack import EngineSettings, Stack


def api_server(python: str, settings: EngineSettings, port: int) -> list[str]:
    """vLLM's OpenAI server as a module: the `vllm` script does not start from the CPU package."""
    server = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    return [*server, *settings.argv()]


def launch_plain(settings: EngineSettings, python: str, run_dir: Path) -> Stack:
    """Start one engine on the prefill core and return when it answers."""
    (port,) = free_ports(1)
    launch = Launch("plain", api_server(python, settings, port), settings.env(settings.prefill_core))
    url = f"http://127.0.0.1:{port}"
    stack = Stack("plain", url, "/health", [GuardedProcess(launch, run_dir)], {"engine": f"{url}/metrics"})
    return ready_or_stopped(stack)


def ready_or_stopped(stack: Stack) -> Stack:
    """The stack once it is ready; if it does not get there it is stopped before the error goes on."""
    try:
        stack.wait_ready()
    except BaseException:
        stack.stop()
        raise
    return stack
