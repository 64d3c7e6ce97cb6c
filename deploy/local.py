"""A whole cluster on this machine: one router and its workers as child processes.

:class:`Cluster` owns the processes from :meth:`Cluster.start` to :meth:`Cluster.stop`; ``braid up``
(:mod:`deploy.up`), tests and benchmarks use it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal, Self

import httpx
from pydantic import Field, model_validator

from braid.settings import Names, ProcessSettings
from deploy.guard import Guard
from deploy.logs import advice, first_error, last_lines
from deploy.placement import Hardware, Seat, decode_workers, seats

Role = Literal["router", "prefill", "decode", "sim"]
LOOPBACK = "127.0.0.1"
SMALL = "demo-small"
"""What `also` calls the smaller model that ships."""
PORTS = (20_000, 32_000)
"""Below the range that Linux takes ports of outgoing connections from."""
POLL_S = 0.25
WORKER_END_S = 8.0
"""Time for a worker to end once the router has drained; one that still loads doesn't hear SIGTERM."""


class UpSettings(ProcessSettings):
    """The local cluster."""

    _table: str = "up"

    engine: Literal["vllm", "sim"] = Field(
        "vllm", description="what computes; `sim`: nothing does, all workers are simulated in one process"
    )
    prefill: int = Field(1, ge=1, description="prefill workers")
    decode: int | None = Field(
        None, ge=1, description="decode workers (default: 2, or 1 where they would share a core or a GPU)"
    )
    port: int = Field(8000, ge=0, le=65535, description="HTTP port of the router (0: any free one)")
    model: str = Field("", description="model folder or name (default: the demo model)")
    served_model_name: str = Field("", description="name clients use (default: the model's folder name)")
    also: Names = Field(
        (),
        description="further models, PATH or PATH=NAME, a decode worker of each; may be repeated "
        "(`demo-small`: the smaller demo model)",
    )
    also_prefill: bool = Field(False, description="a prefill worker of each further model too")
    model_order: Names = Field(
        (),
        description="models from cheap to dear, for strategies over several (default: `also`, then `model`)",
    )
    dtype: str = Field("", description="dtype of weights and KV (default: float32 on CPUs, else auto)")
    max_model_len: int | None = Field(None, ge=1, description="longest sequence in tokens (default: model's)")
    chunk: int = Field(512, ge=32, description="most tokens of a scheduling step: a prefill chunk")
    kv_cache_gib: int = Field(
        1, ge=1, description="KV cache of an engine in GiB, on CPUs; vLLM takes whole ones"
    )
    run_dir: Path = Field(Path("run"), description="folder of logs and of cluster.json")
    start_timeout_s: float = Field(300.0, gt=0, description="longest wait until the cluster is ready")
    drain_s: float = Field(30.0, ge=0, description="on Ctrl-C, time for running requests to end")
    engine_nice: int = Field(
        5, ge=0, le=19, description="niceness of engines on CPUs: what the router has due waits for no step"
    )

    @model_validator(mode="after")
    def _models(self) -> UpSettings:
        if self.also and self.engine == "sim":
            raise ValueError("simulated workers serve one model: leave `also` out")
        return self


class ClusterError(RuntimeError):
    """The cluster can't start or has failed; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Child:
    """One process of the cluster, as ``cluster.json`` shows it."""

    name: str
    role: Role
    pid: int
    log: str
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A model as vLLM takes it, and the name that clients use."""

    path: str
    name: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A process to start."""

    name: str
    role: Role
    argv: tuple[str, ...]
    env: Mapping[str, str]
    nice: int = 0


class Cluster:
    """A router and its workers on this machine.

    Order of calls: ``start``, ``wait_ready``, ``stop``; as a context manager the first and the last are
    implied. ``stop`` may be called at any time and repeatedly, and leaves no process: children run in
    process groups of their own, and whatever is left of a group is killed. A launcher that dies without
    calling it takes its children along (:mod:`deploy.child`, :mod:`deploy.guard`). Start it in a thread
    that lives as long as the cluster: the kernel ties the children to that thread.
    """

    def __init__(
        self,
        settings: UpSettings | None = None,
        engine_args: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        hardware: Hardware | None = None,
    ) -> None:
        """
        Args:
            engine_args: vLLM flags for every engine; they win over the launcher's own.
            env: variables for every process, such as ``BRAID_MAX_N``; they win over this process's.
        """
        self.settings = settings or UpSettings()
        self.engine_args = tuple(engine_args)
        self.run_dir = self.settings.run_dir.absolute()
        self.children: dict[str, Child] = {}
        self.port = 0
        self._env = dict(env or {})
        self._hardware = hardware or Hardware.here()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._plans: dict[str, Plan] = {}
        self._logged: dict[str, int] = {}  # bytes of each log when its process was started last
        self._lock: IO[str] | None = None
        self._guard: Guard | None = None

    @property
    def url(self) -> str:
        """Base URL of the router."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def models(self) -> list[Model]:
        """What the engines run: the first model, and the further ones; raises :class:`ClusterError`."""
        path = self.settings.model or ("" if self.settings.engine == "sim" else str(demo_model()))
        found = [Model(path, self.model), *map(further, self.settings.also)]
        names = [model.name for model in found]
        if len(set(names)) < len(names):
            raise ClusterError(f"two models are called the same ({', '.join(names)}): give --also PATH=NAME")
        return found

    @property
    def model(self) -> str:
        """Name that clients use for the first model."""
        settings = self.settings
        default = "sim" if settings.engine == "sim" else "demo"
        return settings.served_model_name or (Path(settings.model).name if settings.model else default)

    @property
    def decode(self) -> int:
        """Decode workers of the first model."""
        settings = self.settings
        if settings.decode is not None:
            return settings.decode
        if settings.engine == "sim":
            return 2
        others = settings.prefill + len(settings.also) * (2 if settings.also_prefill else 1)
        return decode_workers(self._hardware, others)

    @property
    def pids(self) -> dict[str, int]:
        """Process id of each process by name (``router``, ``prefill-0``, ``decode-0``...); each leads
        a process group with its engine."""
        return {name: child.pid for name, child in self.children.items()}

    def start(self) -> Self:
        """Start every process and return at once.

        Raises:
            ClusterError: the model is not there, the port is taken, or ``run_dir`` is in use.
        """
        self._claim_run_dir()
        try:
            self.port = self.settings.port or free_port()
            check_port(self.settings.host, self.port)
            self._guard = Guard(self.settings.drain_s + WORKER_END_S)
            for plan in self.plans(f"tcp://{LOOPBACK}:{free_port()}"):
                self._spawn(plan)
        except BaseException:
            self.stop(grace_s=0)
            raise
        self._write_state()
        return self

    def plans(self, link: str) -> list[Plan]:
        """What ``start`` runs; starts nothing."""
        settings = self.settings
        router = ["--host", settings.host, "--port", str(self.port), "--link", link]
        router += ["--drain-s", str(settings.drain_s), "--log-level", settings.log_level]
        if settings.engine == "sim":
            return [Plan("router", "router", self._command("router", router), {}), self._simulated(link)]
        first, *others = self.models
        if others:
            order = settings.model_order or [model.name for model in (*others, first)]
            router += ["--model-order", ",".join(order)]
            local = [] if settings.also_prefill else [model.name for model in others]
            router += ["--local-models", ",".join(local)] if local else []
        found = [Plan("router", "router", self._command("router", router), {})]
        prefill = [first] * settings.prefill + (others if settings.also_prefill else [])
        decode = [first] * self.decode + others
        placed = seats(self._hardware, len(prefill), len(decode))
        pools: tuple[tuple[Role, list[Model]], ...] = ("prefill", prefill), ("decode", decode)
        engines = [(role, number, model) for role, pool in pools for number, model in enumerate(pool)]
        for (role, number, model), seat in zip(engines, placed, strict=True):
            found.append(self._worker(role, f"{role}-{number}", link, seat, model))
        return found

    def wait_ready(
        self, timeout: float | None = None, on_poll: Callable[[Cluster], None] | None = None
    ) -> Self:
        """Wait until the router is ready to serve and knows all its workers.

        Args:
            timeout: in seconds; default ``start_timeout_s``.
            on_poll: called several times a second, for progress.

        Raises:
            ClusterError: a process has ended, or the time is over.
        """
        limit = self.settings.start_timeout_s if timeout is None else timeout
        deadline = time.monotonic() + limit
        with httpx.Client(timeout=5, trust_env=False) as client:
            while not (is_ready(client, self.url) and self._complete(client)):
                self.check_alive()
                if time.monotonic() > deadline:
                    raise ClusterError(self._not_ready(limit))
                if on_poll is not None:
                    on_poll(self)
                time.sleep(POLL_S)
        return self

    def ended(self) -> dict[str, int]:
        """Exit codes of the processes that have ended; negative: the signal that killed it."""
        codes = {name: process.poll() for name, process in self._processes.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def wait_end(self, name: str, timeout: float = 10.0) -> int:
        """Wait until a process has ended; returns its exit code, negative: the signal that killed it.

        Raises:
            TimeoutError: it still runs.
        """
        try:
            return self._processes[name].wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{name} still runs after {timeout:g} s") from None

    def check_alive(self) -> None:
        """Raise :class:`ClusterError` with the end of its log if a process has ended."""
        for name, code in self.ended().items():
            end = self.describe_end(name, code)
            raise ClusterError(f"{end}\n{advice(end)}")

    def respawn(self, name: str) -> None:
        """Start a process that has ended again, as it was; its log goes on."""
        self._end([name], 0)
        self._spawn(self._plans[name])
        self._write_state()

    def describe_end(self, name: str, code: int) -> str:
        """How a process ended, in words, with the error that began it and the end of its log."""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        error = first_error(last_lines(self._log(name), 1000, self._logged[name]))
        return f"{name} {how}{error and ': '}{error}. Its log ends with:\n{self.tail(name)}"

    def tail(self, name: str, lines: int = 15) -> str:
        """The last lines of a process's log."""
        return "\n".join(f"  {line}" for line in last_lines(self._log(name), lines))

    def _log(self, name: str) -> Path:
        return Path(self.children[name].log)

    def stop(self, grace_s: float | None = None) -> None:
        """End every process: the router drains first, so that no request loses its worker.

        Args:
            grace_s: time for draining; default ``drain_s`` of the settings. 0 kills at once.
        """
        grace = self.settings.drain_s if grace_s is None else grace_s
        workers = [name for name in self._processes if name != "router"]
        if "router" in self._processes:
            self._end(["router"], grace + 5 if grace else 0)
        self._end(workers, WORKER_END_S if grace else 0)
        self._processes.clear()
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        if self._lock is not None:
            self.state_file.unlink(missing_ok=True)
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def state_file(self) -> Path:
        """Where the running cluster is described in JSON: url, model, link, and each process."""
        return self.run_dir / "cluster.json"

    @property
    def _sockets(self) -> Path:
        return self.run_dir / "sockets"

    def _claim_run_dir(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        lock = (self.run_dir / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ClusterError(
                f"another cluster runs in {self.run_dir}: stop it, or choose another folder with --run-dir"
            ) from None
        self._lock = lock

    def _worker(self, role: Role, name: str, link: str, seat: Seat, model: Model) -> Plan:
        settings = self.settings
        flags = ["--router", link, "--worker", name, "--model", model.path, "--port", "0"]
        flags += ["--served-model-name", model.name, "--run-dir", str(self._sockets)]
        flags += ["--drain-s", str(settings.drain_s), "--log-level", settings.log_level]
        engine = ["--dtype", settings.dtype or self._default_dtype()]
        engine += ["--max-num-batched-tokens", str(settings.chunk), *seat.flags]
        if not self._hardware.gpus:
            # Compiling a model for a CPU takes minutes and a C++ compiler.
            engine.append("--enforce-eager")
        if settings.max_model_len is not None:
            engine += ["--max-model-len", str(settings.max_model_len)]
        argv = self._command(role, (*flags, "--", *engine, *self.engine_args))
        nice = 0 if self._hardware.gpus else settings.engine_nice
        return Plan(name, role, argv, {**self._engine_env(model), **seat.env}, nice)

    def _simulated(self, link: str) -> Plan:
        """All workers, simulated in one process."""
        settings = self.settings
        flags = ["--router", link, "--worker", "sim", "--served-model-name", self.model]
        flags += ["--prefill", str(settings.prefill), "--decode", str(self.decode)]
        flags += ["--sim-chunk", str(settings.chunk), "--drain-s", str(settings.drain_s)]
        if settings.max_model_len is not None:
            flags += ["--sim-max-model-len", str(settings.max_model_len)]
        argv = self._command("sim", (*flags, "--log-level", settings.log_level))
        return Plan("sim", "sim", argv, {})

    @property
    def _workers(self) -> set[str]:
        """Names that the router will know the workers by."""
        settings = self.settings
        if settings.engine != "sim":
            return set(self.children) - {"router"}
        counts = {"prefill": settings.prefill, "decode": self.decode}
        return {f"sim-{role}-{i}" for role, count in counts.items() for i in range(count)}

    def _command(self, role: Role, flags: Sequence[str]) -> tuple[str, ...]:
        return (sys.executable, "-m", "braid", role, *flags)

    def _engine_env(self, model: Model) -> dict[str, str]:
        env = {
            "VLLM_CPU_KVCACHE_SPACE": f"{self.settings.kv_cache_gib}",
            "VLLM_HOST_IP": LOOPBACK,
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_LOGGING_LEVEL": self.settings.log_level.upper(),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        if Path(model.path).is_dir():
            env["HF_HUB_OFFLINE"] = "1"
        return env

    def _default_dtype(self) -> str:
        return "auto" if self._hardware.gpus else "float32"

    def _spawn(self, plan: Plan) -> None:
        log = self.run_dir / f"{plan.name}.log"
        mode = "ab" if plan.name in self._plans else "wb"
        self._plans[plan.name] = plan
        child = Path(__file__).with_name("child.py")
        with log.open(mode) as output:
            self._logged[plan.name] = output.tell()
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(child), str(os.getpid()), str(plan.nice), *plan.argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **plan.env, **self._env},
                start_new_session=True,
            )
        self._processes[plan.name] = process
        if self._guard is not None:
            self._guard.watch(process.pid)
        self.children[plan.name] = Child(plan.name, plan.role, process.pid, str(log), plan.argv)

    def _write_state(self) -> None:
        state = {
            "pid": os.getpid(),
            "url": self.url,
            "model": self.model,
            "processes": [asdict(child) for child in self.children.values()],
        }
        self.state_file.write_text(json.dumps(state, indent=1) + "\n")

    def _end(self, names: Sequence[str], limit_s: float) -> None:
        """SIGTERM to the processes; after ``limit_s`` SIGKILL to whatever is left of their groups."""
        running = [self._processes[name] for name in names]
        deadline = time.monotonic() + limit_s
        try:
            for process in running if limit_s else ():
                process.terminate()
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _complete(self, client: httpx.Client) -> bool:
        """Whether every worker is up, as far as the router tells without a key."""
        up = registered(client, self.url)
        return up is None or up >= {"router", *self._workers}

    def _not_ready(self, limit: float) -> str:
        logs = "\n".join(f"{name}:\n{self.tail(name, 3)}" for name in self.children)
        return f"not ready after {limit:.0f} s; the logs in {self.run_dir} end with:\n{logs}"


def further(given: str) -> Model:
    """A model as `also` gives it: PATH, PATH=NAME, or `demo-small`; raises :class:`ClusterError`."""
    path, _, name = given.partition("=")
    if path == SMALL and not Path(path).exists():
        return Model(str(demo_model("small")), name or SMALL)
    if not path:
        raise ClusterError(f"--also takes PATH or PATH=NAME, not {given!r}")
    return Model(path, name or Path(path).name)


def demo_model(folder_name: str = "model") -> Path:
    """Folder of a model that ships with Braid.

    Raises:
        ClusterError: it is not there.
    """
    folder = Path(__file__).resolve().parent.parent / "demo" / folder_name
    if not (folder / "config.json").is_file():
        raise ClusterError(f"the demo model is not in {folder}: install Braid again, or give --model")
    return folder


def is_ready(client: httpx.Client, url: str) -> bool:
    """Whether a router answers that it is ready."""
    try:
        return client.get(f"{url}/ready").status_code == 200
    except httpx.HTTPError:
        return False


def registered(client: httpx.Client, url: str) -> set[str] | None:
    """Names of the processes that are up: the router once it answers, and the workers it knows. None
    where only holders of an API key may know."""
    try:
        answer = client.get(f"{url}/cluster")
        if answer.status_code in (401, 403):
            return None
        return {"router", *(str(worker["worker"]) for worker in answer.json()["workers"])}
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return set()


def free_port() -> int:
    """A TCP port on loopback that is free now, and that no connection is given by chance until it is used."""
    for port in random.sample(range(*PORTS), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise ClusterError(f"no port of 100 tried between {PORTS[0]} and {PORTS[1]} is free")


def check_port(host: str, port: int) -> None:
    """Raise :class:`ClusterError` if the port can't be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ClusterError(
                f"port {port} on {host} can't be used ({error.strerror}): "
                "stop what uses it, or choose another one with --port"
            ) from None
