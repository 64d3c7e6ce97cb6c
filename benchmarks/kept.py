"""Where a benchmark's result is kept, and how it is shown."""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

RESULTS = Path(__file__).parent / "results"


def folder(path: str) -> Path:
    """An option that names the folder of a result: made now, as it is too late to find out at the end that it
    can't be. Raises argparse.ArgumentTypeError."""
    found = Path(path)
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} can't be a folder ({error.strerror}): name one") from None
    return found


def keep(found: Mapping[str, Any], benchmark: str, out: Path | None, indent: int = 1) -> Path:
    """Write a result to ``out``: a file, or a folder (by default :data:`RESULTS`) for one with the time in
    its name."""
    path = out or RESULTS
    if path.is_dir():
        path /= f"{benchmark}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=indent) + b"\n")
    return path


def show(found: Mapping[str, Any], without: Collection[str]) -> None:
    """Print a result but for its long parts."""
    shown = {key: value for key, value in found.items() if key not in without}
    print(msgspec.json.format(msgspec.json.encode(shown), indent=1).decode())
