"""The result of a soak is kept where the command line says; the soak itself is run by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import soak


class EndedRun:
    """Stands for a :class:`soak.Soak` whose hour is over."""

    def __init__(self, cluster: Any, seed: int) -> None:
        self.seed = seed

    async def run(self, minutes: float, clients: int, every_s: float) -> dict[str, Any]:
        return {"wrong": [], "held_at_the_end": {}, "rss": [1, 2, 3]}


@contextmanager
def no_cluster(settings: Any, argv: Any) -> Iterator[Any]:
    yield SimpleNamespace(wait_ready=lambda: None)


def test_a_result_is_kept_in_a_folder_that_was_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "Cluster", no_cluster)
    monkeypatch.setattr(soak, "Soak", EndedRun)
    out = tmp_path / "not" / "there"
    assert soak.main(["--minutes", "1", "--out", str(out)]) == 0
    (path,) = out.glob("soak-*.json")
    kept = json.loads(path.read_bytes())
    assert kept["rss"] == [1, 2, 3]
    assert kept["arguments"]["minutes"] == "1.0"
    assert str(tmp_path) not in path.read_text()
    assert str(path) in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_found_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "Cluster", lambda *_: pytest.fail("started a cluster"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileExistsError):
        soak.main(["--out", str(tmp_path / "file")])
