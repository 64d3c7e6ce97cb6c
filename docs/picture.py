"""Draws `docs/ask.svg` from a real run: ``python docs/picture.py "QUESTION"`` against a running server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 100


def main(question: str) -> None:
    command = ["braid", "ask", question, "--strategy", "self_consistency", "-n", "16"]
    run = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=True, env=None
    )
    console = Console(record=True, width=WIDTH, file=sys.stderr)
    console.print(Text(f"$ {' '.join(command[:2])} '{question}' {' '.join(command[3:])}", style="bold"))
    console.print(Text.from_ansi(run.stderr + run.stdout))
    Path(__file__).with_name("ask.svg").write_text(console.export_svg(title="braid ask"))


if __name__ == "__main__":
    main(sys.argv[1])
