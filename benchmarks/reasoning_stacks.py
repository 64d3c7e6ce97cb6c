"""Stacks that reasoning strategies are compared on: one engine under Braid, and one plain vLLM server."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from benchmarks.braid_stack import braid_env, pages
from benchmarks.plain import api_server, ready_or_stopped
from benchmarks.process import GuardedProcess, Launch, LaunchError, free_ports
from benchmarks.stack import READY_TIMEOUT_S, EngineSettings, Stack

LOOPBACK = "127.0.0.1"


def launch_single(
    settings: EngineSettings, python: str, run_dir: Path, engine_args: Sequence[str] = (), **env: str
) -> Stack:
    """A router and one decode worker on the prefill core: the engine computes its prompts itself.

    Without a prefill worker no pair is ever verified, so the router's GET /ready stays at 503; the stack is
    ready when the router has the worker. `env` is added to both processes' environment.
    """
    port, link_port = free_ports(2)
    link = f"tcp://{LOOPBACK}:{link_port}"
    braid = [python, "-m", "braid"]
    router = [*braid, "router", "--host", LOOPBACK, "--port", str(port), "--link", link]
    decode = [
        *(*braid, "decode", "--router", link, "--worker", "decode-0", "--model", str(settings.model)),
        *("--served-model-name", "demo", "--port", "0", "--", "--dtype", settings.dtype, "--enforce-eager"),
        *("--max-num-batched-tokens", str(settings.chunk_tokens)),
        *("--max-model-len", str(settings.max_model_len), *engine_args),
    ]
    common = {**braid_env(settings), **env}
    launches = [
        Launch("single-decode", decode, {**settings.env(settings.prefill_core), **common}),
        Launch("single-router", router, common),
    ]
    url = f"http://{LOOPBACK}:{port}"
    processes = [GuardedProcess(launch, run_dir) for launch in launches]
    stack = ready_or_stopped(Stack("single", url, "/health", processes, model="demo"))
    try:
        _wait_for_worker(stack)
        stack.metrics = pages(url)
    except BaseException:
        stack.stop()
        raise
    return stack


def _wait_for_worker(stack: Stack) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        state = httpx.get(f"{stack.base_url}/cluster", trust_env=False, timeout=10.0).json()
        if any(worker["state"] == "ready" for worker in state["workers"]):
            return
        for process in stack.processes:
            process.check_alive()
        if time.monotonic() > deadline:
            raise LaunchError(f"no decode worker within {READY_TIMEOUT_S:.0f} s")
        time.sleep(0.1)


def launch_server(
    settings: EngineSettings, python: str, run_dir: Path, engine_args: Sequence[str] = (), **env: str
) -> Stack:
    """vLLM's own server on the prefill core, with its endpoint that empties the prefix cache."""
    (port,) = free_ports(1)
    environment = {**settings.env(settings.prefill_core), "VLLM_SERVER_DEV_MODE": "1", **env}
    launch = Launch("plain", [*api_server(python, settings, port), *engine_args], environment)
    url = f"http://{LOOPBACK}:{port}"
    processes = [GuardedProcess(launch, run_dir)]
    return ready_or_stopped(Stack("plain", url, "/health", processes, {"engine": f"{url}/metrics"}))


def empty_prefix_cache(stack: Stack) -> None:
    """Let a plain vLLM server forget every prompt; one method must not find those of another."""
    httpx.post(f"{stack.base_url}/reset_prefix_cache", trust_env=False, timeout=30.0).raise_for_status()


def engine_tokens(counted: Mapping[str, float]) -> dict[str, float]:
    """What the engines of a stack did, by their own counters (`page/series`, see `Stack.counters`).

    `prompt_computed` are prompt tokens less those found in a cache or brought by a transfer, over all
    engines: of a prompt that came from a prefill engine, those that this one computed.
    """

    def total(name: str) -> float:
        return sum(value for series, value in counted.items() if series.partition("/")[2] == name)

    prompts = total("vllm:prompt_tokens_total")
    return {
        "prompt_tokens": prompts,
        "prompt_computed": prompts - total("vllm:prompt_tokens_cached_total"),
        "prefill_kv_computed": total("vllm:request_prefill_kv_computed_tokens_sum"),
        "generated": total("vllm:generation_tokens_total"),
        "requests": total("vllm:request_success_total"),
    }


ENGINE_COUNTERS = (
    "vllm:prompt_tokens",
    "vllm:request_prefill_kv_computed_tokens_sum",
    "vllm:generation_tokens",
    "vllm:request_success",
)
