"""A prefill worker: computes the KV of a prompt once and hands it to decode workers."""

from __future__ import annotations

from typing import Any

from braid.settings import PrefillSettings
from braid.worker.serve import run_worker


def main(settings: PrefillSettings, engine_args: list[str]) -> int:
    """Run the worker until it is told to stop; returns the exit code.

    Args:
        engine_args: vLLM's own flags (what stands after ``--`` on the command line).
    """
    if settings.engine == "sim":
        from braid.sim.serve import run

        return run(settings, prefill=settings.sim_workers, decode=0)

    return run_worker(settings, engine_args, "prefill", _llm_class, _service)


def _llm_class() -> Any:
    from prefill_server.llm import PrefillLLM

    return PrefillLLM


def _service(engine: Any, send: Any) -> Any:
    from prefill_server.service import PrefillService

    return PrefillService(engine, send)
