"""Packages that offer strategies, installed for the time of a test."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from router import strategies


def write(folder: Path, modules: Mapping[str, str], points: Mapping[str, str]) -> None:
    """Modules and the entry points of one distribution, for whoever has ``folder`` on its path."""
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code)
    about = folder / "offer-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: offer\nVersion: 1.0\n")
    listed = "\n".join(f"{name} = {value}" for name, value in points.items())
    (about / "entry_points.txt").write_text(f"[braid.strategies]\n{listed}\n")


@contextlib.contextmanager
def installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, modules: Mapping[str, str], points: Mapping[str, str]
) -> Iterator[None]:
    """As :func:`write`, importable inside the block; afterwards no strategy of theirs is left."""
    write(folder, modules, points)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
    for name in modules:
        sys.modules.pop(name, None)
    strategies.load_plugins()
