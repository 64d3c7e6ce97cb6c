"""A decode worker: runs the samples of a group on one shared prefix."""

from __future__ import annotations

from typing import Any

from braid.settings import DecodeSettings
from braid.worker.serve import run_worker


def main(settings: DecodeSettings, engine_args: list[str]) -> int:
    """Run the worker until it is told to stop; returns the exit code.

    Args:
        engine_args: vLLM's own flags (what stands after ``--`` on the command line).
    """

    if settings.engine == "sim":
        from braid.sim.serve import run

        return run(settings, prefill=0, decode=settings.sim_workers)

    def service(engine: Any, send: Any) -> Any:
        from decode_server.service import DecodeService

        return DecodeService(engine, send, settings)

    return run_worker(settings, engine_args, "decode", _llm_class, service)


def _llm_class() -> Any:
    from decode_server.llm import DecodeLLM

    return DecodeLLM
