"""Installs Braid into `.venv`: run `python3 scripts/install.py` (or `make install`) on a bare machine.

Needs Python 3.11 or later with its `venv` module; nothing else. It chooses the CUDA engine where an
NVIDIA GPU is seen and the CPU engine elsewhere (`BRAID_FLAVOR=cpu|cuda|core` or `--flavor` decides
otherwise; `core` has no engine: router, CLI and client). Run again, it does nothing while the lock and the project
file are unchanged, and repairs an installation that was interrupted.

Standard library only, and no syntax newer than Python 3.7: it has to say that a Python is too old.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
PROJECT = ROOT / "pyproject.toml"

OLDEST, TOO_NEW = (3, 11), (3, 15)
TORCH = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM = "0.32.0"
DISK_GB = {"core": 0.5, "cpu": 5, "cuda": 20}

# vLLM's metadata asks for these; on a CPU it runs without them, and with them it breaks (see scripts/lock.py).
LEFT_OUT_ON_CPU = ("torchvision", "torchaudio", "torchcodec", "triton")

VERIFY_ENGINE = """
import importlib.util, sys, torch
flavor, version, left_out = sys.argv[1], sys.argv[2], sys.argv[3:]
if flavor == "cpu":
    found = [name for name in left_out[:3] if importlib.util.find_spec(name)]
    if found:
        sys.exit("these packages break the CPU engine and must not be installed: " + ", ".join(found))
    if torch.version.cuda is not None:
        sys.exit("torch " + torch.__version__ + " is a CUDA build; the CPU engine needs the CPU build")
import vllm
if vllm.__version__.split("+")[0] != version:
    sys.exit("vllm " + vllm.__version__ + " is installed; this Braid is tested with " + version)
"""
VERIFY_CORE = (
    "import braid.cli, fastapi, httpx, msgspec, prometheus_client, pydantic_settings, rich, uvicorn, zmq"
)

ADVICE = (
    (
        "DO NOT MATCH THE HASHES",
        "A downloaded file is not the one that was locked. If a proxy or mirror changes files, use another.",
    ),
    ("No space left", "The disk is full: free some space and run the installer again."),
    (
        "externally-managed",
        "Run the installer with a Python that may create environments: python3 scripts/install.py",
    ),
    (
        "Permission denied",
        "The folder cannot be written: give yourself the right to, or clone the project elsewhere.",
    ),
    (
        "No matching distribution",
        "The package index that pip uses does not have this package for this Python and machine.",
    ),
    (
        "onnection|resolution|timed out|Network is unreachable|ProxyError|SSLError|Max retries",
        "The network failed: check the connection, and pip's proxy and index settings (pip config list).",
    ),
)


class InstallError(Exception):
    """A step failed; the message says what and what to do next."""


class Options:
    """What to install and where."""

    def __init__(self, flavor: str, dev: bool, venv: Path) -> None:
        self.flavor = flavor
        self.dev = dev
        self.venv = venv
        self.python = venv / "bin" / "python"
        self.stamp = venv / "braid-installed.json"
        self.unfinished = venv / "braid-unfinished"
        self.log = ROOT / "build" / "install.log"


def main(argv: list[str] | None = None) -> int:
    """Install; returns the exit code."""
    try:
        check_python(sys.version_info[:2])
        options = parse(argv)
        if is_current(options):
            print(f"Braid ({options.flavor}) is installed in {options.venv}: nothing to do.")
            return 0
        install(options)
    except InstallError as error:
        print(f"\nInstallation failed. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again: it starts where needed.", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str] | None) -> Options:
    """Options from flags and environment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument(
        "--flavor", choices=sorted(DISK_GB), help="default: cuda where a GPU is seen, else cpu"
    )
    parser.add_argument("--no-dev", action="store_true", help="leave out what only tests and linters need")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv in the project")
    args = parser.parse_args(argv)
    flavor = args.flavor or os.environ.get("BRAID_FLAVOR") or detect_flavor()
    if flavor not in DISK_GB:
        raise InstallError(f"BRAID_FLAVOR is {flavor!r}; it must be one of {', '.join(sorted(DISK_GB))}.")
    return Options(flavor, not args.no_dev, args.venv.absolute())


def check_python(version: tuple[int, ...]) -> None:
    """Raise unless this Python can run Braid."""
    found = ".".join(map(str, version))
    if version < OLDEST:
        raise InstallError(
            f"This is Python {found}; Braid needs 3.11 or later. Try: python3.11 scripts/install.py"
        )
    if version >= TOO_NEW:
        raise InstallError(
            f"This is Python {found}; vLLM {VLLM} needs one below 3.15. Try: python3.13 scripts/install.py"
        )


def check_machine(options: Options) -> None:
    """Raise unless the operating system, the `venv` module and the disk are fit."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise InstallError(
            f"This machine is {platform.system()} {platform.machine()}; vLLM's packages exist for Linux on x86_64 and aarch64. "
            "On another machine run Braid in a Linux container or virtual machine."
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        version = ".".join(map(str, sys.version_info[:2]))
        raise InstallError(
            f"Python's venv module is missing. Install it (Debian, Ubuntu: apt-get install python{version}-venv) "
            "and run the installer again."
        ) from None
    free = shutil.disk_usage(str(ROOT)).free / 1e9
    if free < DISK_GB[options.flavor]:
        raise InstallError(
            f"{free:.1f} GB are free on the disk of {ROOT}; the {options.flavor} flavor needs {DISK_GB[options.flavor]}. "
            "Free some space and run the installer again."
        )


def detect_flavor() -> str:
    """`cuda` where an NVIDIA GPU is seen, else `cpu`."""
    if Path("/dev/nvidia0").exists():
        return "cuda"
    smi = shutil.which("nvidia-smi")
    if smi:
        listed = subprocess.run([smi, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if listed.returncode == 0 and b"GPU" in listed.stdout:
            return "cuda"
    return "cpu"


def key(options: Options) -> str:
    """Identifies what an installation was made from."""
    parts = [options.flavor, str(options.dev), str(ROOT), sys.version.split()[0]]
    digest = hashlib.sha256("\n".join(parts).encode())
    for path in (LOCK, PROJECT, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_current(options: Options) -> bool:
    """Whether a finished installation of exactly this is there."""
    try:
        stamp = json.loads(options.stamp.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(stamp, dict) and stamp.get("key") == key(options) and options.python.exists()


def install(options: Options) -> None:
    """All steps, in order; the stamp is written last."""
    steps = [("checking the machine", check_machine), ("creating " + options.venv.name, create_venv)]
    if options.flavor == "cpu":
        steps.append(("installing PyTorch for CPUs", install_torch))
    steps.append((f"installing the locked packages ({options.flavor})", install_locked))
    steps += [
        ("compiling them", compile_all),
        ("installing Braid itself", install_project),
        ("verifying", verify),
    ]
    options.log.parent.mkdir(exist_ok=True)
    options.log.write_bytes(b"")
    begun = time.monotonic()
    try:
        for number, (title, step) in enumerate(steps, 1):
            with Progress(f"[{number}/{len(steps)}] {title}"):
                step(options)
    except InstallError:
        # A step that fails by itself leaves the environment whole, so that the next run can go on.
        options.unfinished.unlink(missing_ok=True)
        raise
    options.unfinished.unlink()
    options.stamp.write_text(json.dumps({"key": key(options), "flavor": options.flavor, "dev": options.dev}))
    print(f"Installed Braid ({options.flavor}) in {time.monotonic() - begun:.0f} s. Next: make up")


def create_venv(options: Options) -> None:
    """Create the environment; from nothing where the last run was killed or its Python is gone."""
    options.stamp.unlink(missing_ok=True)
    broken = options.unfinished.exists() or not works(options.python)
    if broken:
        clear = ["--clear"] if options.venv.exists() else []
        run(options, [sys.executable, "-m", "venv", *clear, str(options.venv)])
    options.unfinished.write_text("an installation is running here, or was killed\n")


def works(python: Path) -> bool:
    """Whether an environment's Python runs, is this version, and has pip."""
    program = "import pip, sys; sys.exit(sys.version_info[:2] != " + repr(sys.version_info[:2]) + ")"
    try:
        return subprocess.run([str(python), "-c", program], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def install_torch(options: Options) -> None:
    """PyTorch's CPU build from where pip is set up to look, else from PyTorch's own index."""
    try:
        pip(options, "install", "--no-deps", "--no-compile", TORCH)
    except InstallError:
        pip(options, "install", "--no-deps", "--no-compile", "--index-url", TORCH_CPU_INDEX, TORCH)


def install_locked(options: Options) -> None:
    """The entries of the lock for this environment, each checked against its hashes."""
    chosen = options.log.parent / f"requirements-{options.flavor}.txt"
    chosen.write_text(select(LOCK.read_text(), options.flavor, options.dev))
    pip(options, "install", "--no-deps", "--no-compile", "--require-hashes", "-r", str(chosen))


def compile_all(options: Options) -> None:
    """Byte-compile on all cores; pip would use one. Files meant for other Pythons fail quietly."""
    program = "import compileall, sysconfig; compileall.compile_dir(sysconfig.get_path('purelib'), quiet=2, workers=0)"
    run(options, [str(options.python), "-c", program])


def select(lock: str, flavor: str, dev: bool) -> str:
    """The entries of the lock that are for `flavor`, with or without its development tools.

    Setuptools is always among them: it builds the project itself.
    """
    entries = re.split(r"^# for: (.*)\n", lock, flags=re.MULTILINE)
    chosen = []
    for tags, text in zip(entries[1::2], entries[2::2]):
        wanted = {flavor, flavor + "+dev"} if dev or text.startswith("setuptools==") else {flavor}
        if wanted & set(tags.split()):
            chosen.append(text)
    return "".join(chosen)


def install_project(options: Options) -> None:
    """Braid itself; editable for development. Built with the locked setuptools: nothing is fetched."""
    editable = ["--editable"] if options.dev else []
    pip(options, "install", "--no-deps", "--no-build-isolation", *editable, str(ROOT))


def verify(options: Options) -> None:
    """Import what was installed, and let pip check that nothing is missing."""
    run(options, [str(options.python), "-c", VERIFY_CORE])
    if options.flavor != "core":
        run(options, [str(options.python), "-c", VERIFY_ENGINE, options.flavor, VLLM, *LEFT_OUT_ON_CPU])
    checked = subprocess.run(
        [str(options.python), "-m", "pip", "check"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    problems = unexpected(checked.stdout.decode(), options.flavor) if checked.returncode else []
    if problems:
        raise InstallError(
            "Packages do not fit together:\n  " + "\n  ".join(problems) + "\nRun `make clean install`."
        )


def unexpected(report: str, flavor: str) -> list[str]:
    """Lines of `pip check` other than the packages left out on purpose."""
    lines = [line for line in report.splitlines() if " requires " in line or " has requirement " in line]
    if flavor != "cpu":
        return lines
    known = re.compile(" requires (" + "|".join(LEFT_OUT_ON_CPU) + "), which is not installed")
    return [line for line in lines if not known.search(line)]


def pip(options: Options, *arguments: str) -> None:
    """Run the environment's pip."""
    run(
        options,
        [
            str(options.python),
            "-m",
            "pip",
            "--no-input",
            "--disable-pip-version-check",
            *arguments,
            "--progress-bar=off",
        ],
    )


def run(options: Options, command: list[str]) -> None:
    """Run a command with its output in the log; raise with the last lines and advice if it fails."""
    with options.log.open("ab") as log:
        log.write(("$ " + " ".join(command) + "\n").encode())
        log.flush()
        start = log.tell()
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=str(ROOT)).returncode
    if code != 0:
        with options.log.open("rb") as log:
            log.seek(start)
            output = log.read().decode(errors="replace")
        raise InstallError(explain(output, options.log))


def explain(output: str, log: Path) -> str:
    """The last lines of a failed command and what to do about them."""
    tail = "\n".join("  " + line for line in output.strip().splitlines()[-12:])
    advice = next((text for pattern, text in ADVICE if re.search(pattern, output)), "")
    return (
        f"Last lines:\n{tail}\nFull log: {log}\n{advice or 'Read the log.'} Then run the same command again."
    )


class Progress:
    """`[2/6] title ... 12 s` on a terminal, kept up to date; one line at start and end elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __enter__(self) -> Progress:
        self._begun = time.monotonic()
        self._ticker = None
        print(f"{self.title} ...", end="", flush=True)
        if sys.stdout.isatty():
            import threading

            self._done = threading.Event()
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self._ticker:
            self._done.set()
            self._ticker.join()
        end = f" {'FAILED after ' if failed else ''}{time.monotonic() - self._begun:.0f} s"
        print(f"\r{self.title} ...{end}" if self._ticker else end, flush=True)

    def _tick(self) -> None:
        while not self._done.wait(1):
            print(f"\r{self.title} ... {time.monotonic() - self._begun:.0f} s", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
