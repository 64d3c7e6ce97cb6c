"""What the logs of a cluster's processes say about how they ended."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

LINE_BYTES = 400
"""Of a log line, at a guess that is seldom too small."""
ERROR = re.compile(r"(?:^|\] )((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): .+)")
"""The line of a traceback that names the exception, as Python or vLLM's logger writes it."""


def last_lines(path: Path, count: int, start: int = 0) -> list[str]:
    """The last lines of a file, without reading all of a large one; none from before byte ``start``."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - LINE_BYTES * count))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def first_error(lines: Iterable[str]) -> str:
    """The exception that a log tells of first: those after it are mostly its consequences; "" if none."""
    return next((found[1].rstrip(".") for line in lines if (found := ERROR.search(line))), "")


def advice(end: str) -> str:
    """What to do about the error and the last lines of a process that has ended."""
    for pattern, text in (
        ("No module named 'vllm'", "The engine is not installed: run `make install`."),
        ("ddress already in use", "A port is taken: stop what uses it, or choose another one with --port."),
        (
            "KV cache on CPU requires",
            "This processor lacks what that KV cache needs: leave --kv-cache-dtype out.",
        ),
        (
            r"ut of memory|annot allocate memory|MemoryError|(No a|A)vailable memory (on|for)",
            "Memory is short: free some, or start the fewest engines: --decode 1.",
        ),
    ):
        if re.search(pattern, end):
            return text
    return "`braid doctor` checks the installation."
