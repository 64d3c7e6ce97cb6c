"""The parts of a soak that are not the soak, which is run by hand."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from benchmarks import handover, kvtransfer, reasoning_peers, soak


class EndedRun:
    """Stands for a :class:`soak.Soak` whose hour is over."""

    def __init__(self, cluster: Any, seed: int) -> None:
        self.seed = seed

    async def run(self, minutes: float, calm_minutes: float, clients: int, every_s: float) -> dict[str, Any]:
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


@pytest.mark.parametrize("benchmark", [handover, kvtransfer, reasoning_peers, soak])
def test_a_folder_that_cannot_be_made_is_found_before_the_run(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    needed = ["--model", "nowhere"] if benchmark is handover else []
    with pytest.raises(SystemExit):
        benchmark.main([*needed, "--out", str(tmp_path / "file")])
    assert "can't be a folder (File exists): name one" in capsys.readouterr().err


class SlowRouter:
    """Stands for a router that sees deaths and arrivals two looks late, and for its cluster."""

    url = "http://router"

    def __init__(self) -> None:
        self.pids = {"decode-0": 123, "decode-1": 124}
        self.alive = True
        self.unseen = self.coming = 0

    def kill(self, pid: int, signal: int) -> None:
        assert pid == 123
        self.alive, self.unseen = False, 2

    def ended(self) -> dict[str, int]:
        return {} if self.alive else {"decode-0": -9}

    def respawn(self, name: str) -> None:
        self.alive, self.coming = True, 2

    def page(self, request: httpx.Request) -> httpx.Response:
        ready = ["decode-1"]
        if self.unseen:
            self.unseen -= 1
            ready.append("decode-0")
        elif self.alive and not self.coming:
            ready.append("decode-0")
        elif self.alive:
            self.coming -= 1
        return httpx.Response(200, json={"workers": [{"worker": w, "state": "ready"} for w in ready]})


async def test_the_next_fault_waits_until_a_killed_worker_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster: Any = SlowRouter()
    monkeypatch.setattr(os, "killpg", cluster.kill)
    run = soak.Soak(cluster, 0)
    async with httpx.AsyncClient(transport=httpx.MockTransport(cluster.page), base_url=cluster.url) as client:
        run.client = client
        await run.restart("decode-0")
    assert cluster.alive
    assert (cluster.unseen, cluster.coming) == (0, 0)


def test_memory_is_followed_from_the_last_fault_on() -> None:
    def life(pid: int, begun: int, ended: int, mib: Callable[[int], float]) -> list[soak.Rss]:
        return [soak.Rss(at, "decode-0", pid, "core", mib(at), 10.0) for at in range(begun, ended, 30)]

    samples = life(1, 0, 1200, lambda at: 100.0)  # killed
    samples += life(2, 1200, 3600, lambda at: 100 + max(0, 1500 - at) + at / 3600)
    (found,) = soak.slopes(samples, since=1300)
    assert (found["worker"], found["process"], found["mib_an_hour"]) == ("decode-0", "core", 1.0)
    assert (found["own_an_hour"], found["highest_at_minute"]) == (0.0, 59.5)
    first, *_, last = found["mib_quarters"]
    assert 100 < first < last < 101
    assert found["minutes"] == pytest.approx((3600 - 1300 - soak.WARM_S) / 60, abs=1)


def test_heaps_are_read_from_the_logs_of_the_workers_and_followed_from_the_last_fault_on(
    tmp_path: Path,
) -> None:
    cluster = SimpleNamespace(url="http://router", pids={"router": 1, "decode-0": 2}, run_dir=tmp_path)
    run = soak.Soak(cast("Any", cluster), 0)
    lines = [
        {
            "ts": run.started_at + at,
            "process": "decode-0/worker",
            "event": "heap",
            "anonymous_mib": 300 + at / 3600 if at > 1000 else 900.0,
            "in_use_mib": 200.0,
        }
        for at in range(0, 3600, 60)
    ]
    (tmp_path / "decode-0.log").write_text(
        "a line of vLLM\n" + "\n".join(json.dumps(line) for line in lines) + '\n{"event": "stopped"}\n'
    )
    no_mallinfo = {"ts": run.started_at, "process": "router", "event": "heap", "anonymous_mib": 40.0}
    (tmp_path / "router.log").write_text(json.dumps(no_mallinfo) + "\n")
    heaps = run.heaps()
    assert (heaps[0].process, heaps[0].at, heaps[0].in_use) == ("router", 0.0, None)
    assert len(heaps) == 1 + len(lines)
    (found,) = soak.heap_slopes(heaps, since=1000)
    assert found["process"] == "decode-0/worker"
    assert (found["anonymous_an_hour"], found["in_use_an_hour"]) == (1.0, 0.0)
    assert found["in_use_quarters"] == [200.0] * 4
    assert found["minutes"] == pytest.approx((3600 - 1000 - soak.WARM_S) / 60, abs=1.5)


async def test_what_a_process_holds_for_a_moment_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples once in half a minute rose and fell with the trims of heaps, which come as often."""
    seen = iter([("core", 50.0, 40.0), ("core", 70.0, 30.0), ("core", 60.0, 35.0)])
    monkeypatch.setattr(soak, "SAMPLE_S", 0.0)
    monkeypatch.setattr(soak, "WINDOW_S", 60.0)
    monkeypatch.setattr(soak, "family", lambda root: [root])
    clock = 0.0

    def weigh(pid: int) -> Any:
        nonlocal clock
        if (found := next(seen, None)) is None:
            clock = 61.0
        return found

    monkeypatch.setattr(soak, "memory", weigh)
    monkeypatch.setattr(soak, "time", SimpleNamespace(monotonic=lambda: clock, time=lambda: 0.0))
    run = soak.Soak(cast("Any", SimpleNamespace(url="http://router", pids={"decode-0": 7})), 0)
    await run.watch(until=60.0)
    await run.client.aclose()
    assert [(s.worker, s.pid, s.name, s.mib, s.own) for s in run.rss] == [("decode-0", 7, "core", 50.0, 30.0)]


def test_each_process_of_a_worker_is_weighed_alone() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        below = soak.family(os.getpid())
        assert below[0] == os.getpid()
        assert child.pid in below
        own, its = soak.memory(os.getpid()), soak.memory(child.pid)
        child.kill()
    assert own is not None
    assert its is not None
    assert (its[0], its[1] < own[1]) == ("sleep", True)
    assert 0 < own[2] < own[1]
    assert soak.memory(child.pid) is None
