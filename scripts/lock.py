"""Writes `requirements.lock`: every package of every flavor, pinned and with hashes, in one file.

Usage: `python scripts/lock.py [--upgrade]` (or `make lock`). Versions already in the lock are kept where
they still fit; `--upgrade` takes the newest. Needs `uv`, which is fetched into a temporary environment
when it is not on PATH.

Each entry carries a line `# for: ...` with the environments it belongs to: `core` (router, CLI, client),
`cpu` and `cuda` (core plus an engine), each also as `...+dev` where only development needs it.
`scripts/install.py` installs the entries of one environment. The extra `tracing` is in each of them, so
that an installation or image needs a setting only; vLLM brings its packages anyway.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
FLAVORS = ("cpu", "cuda", "core")

# Torch's CPU build is not on PyPI: scripts/install.py finds it. The other three are CUDA builds, which
# vLLM asks for without needing them for text and which break `transformers` beside a CPU torch; triton
# compiles for GPUs only.
LEFT_OUT_ON_CPU = ("torch", "torchvision", "torchaudio", "torchcodec", "triton")

# What `tool.uv.environments` in pyproject.toml adds to each entry, in the words of older and newer uv.
EVERYWHERE = (
    "(python_full_version < '3.15' and platform_machine == 'aarch64' and sys_platform == 'linux')"
    " or (python_full_version < '3.15' and platform_machine == 'x86_64' and sys_platform == 'linux')",
    "python_full_version < '3.15' and ((platform_machine == 'aarch64' and sys_platform == 'linux')"
    " or (platform_machine == 'x86_64' and sys_platform == 'linux'))",
)

HEADER = """\
# Written by `make lock` (scripts/lock.py) from pyproject.toml: do not edit.
# Installed by scripts/install.py, which takes the entries of one environment. Linux on x86_64 and aarch64.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        views = resolve_all(find_uv(Path(folder)), Path(folder), upgrade=args.upgrade)
    LOCK.write_text(merge(views))
    print(f"{LOCK.name}: {LOCK.read_text().count('# for:')} entries")
    return 0


def find_uv(folder: Path) -> str:
    """Path of `uv`; installed into `folder` if the machine has none."""
    found = shutil.which("uv")
    if found:
        return found
    venv.create(folder / "uv", with_pip=True)
    subprocess.run([folder / "uv/bin/pip", "install", "--quiet", "uv"], check=True)
    return str(folder / "uv/bin/uv")


def resolve_all(uv: str, folder: Path, *, upgrade: bool) -> dict[str, dict[str, str]]:
    """Resolve each environment. The first resolution is the preference of the later ones, so that
    all of them agree wherever they can."""
    preferred = "" if upgrade or not LOCK.exists() else LOCK.read_text()
    views: dict[str, dict[str, str]] = {}
    for flavor in FLAVORS:
        extras = ["tracing"] if flavor == "core" else [flavor, "tracing"]
        for name, wanted in ((f"{flavor}+dev", [*extras, "dev"]), (flavor, extras)):
            print(f"resolving {name}", flush=True)
            views[name] = resolve(uv, folder, wanted, preferred)
            preferred = "".join({**views[name], **views["cpu+dev"]}.values())
    return views


def resolve(uv: str, folder: Path, extras: list[str], preferred: str) -> dict[str, str]:
    """Entries (text with hashes) by `name==version` and marker."""
    out, excludes = folder / "out.txt", folder / "excludes.txt"
    out.write_text(preferred)
    excludes.write_text("\n".join(LEFT_OUT_ON_CPU))
    command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-annotate", "--no-header", "--no-emit-index-url"]
    command += [flag for extra in extras for flag in ("--extra", extra)]
    if "cuda" not in extras:
        command += ["--excludes", str(excludes)]
    subprocess.run([*command, "-o", out, "pyproject.toml"], cwd=ROOT, check=True, env=os.environ)
    return parse(out.read_text())


def parse(text: str) -> dict[str, str]:
    """Split a requirements file into its entries; the key is the line without its hashes."""
    entries: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if not line.startswith(" "):
            for marker in EVERYWHERE:
                line = line.replace(f" ; {marker}", "")
            key = line.rstrip(" \\")
            entries[key] = ""
        entries[key] += line + "\n"
    return entries


def merge(views: dict[str, dict[str, str]]) -> str:
    """One text with each entry once, sorted, and the environments it is for."""
    texts = {key: text for entries in views.values() for key, text in entries.items()}
    lines = [HEADER]
    for key in sorted(texts):
        tags = []
        for flavor in FLAVORS:
            if key in views[flavor]:
                tags.append(flavor)
            elif key in views[f"{flavor}+dev"]:
                tags.append(f"{flavor}+dev")
        lines.append(f"# for: {' '.join(tags)}\n{texts[key]}")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
