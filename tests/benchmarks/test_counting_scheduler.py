"""The journal of the counting scheduler, over a stand-in for what it inherits from vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.counted import JOURNAL, Ended, Late, journal, late_samples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # importing vLLM can take minutes on a busy machine


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("vllm")
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from benchmarks.counting_scheduler import CountingScheduler

    def batch(self: Any, names: list[str]) -> Any:
        return SimpleNamespace(num_scheduled_tokens=dict.fromkeys(names, 1))

    monkeypatch.setenv(JOURNAL, str(tmp_path))
    monkeypatch.setattr(AsyncScheduler, "__init__", lambda self: None)
    monkeypatch.setattr(AsyncScheduler, "schedule", batch)
    monkeypatch.setattr(AsyncScheduler, "update_from_output", lambda self, output: "outputs")
    monkeypatch.setattr(AsyncScheduler, "_free_request", lambda self, request: request.request_id)
    monkeypatch.setattr(AsyncScheduler, "shutdown", lambda self: None)
    scheduler = CountingScheduler()
    yield scheduler
    scheduler.shutdown()


def request(name: str, tokens: int, aborted: bool) -> Any:
    from vllm.v1.request import RequestStatus

    status = RequestStatus.FINISHED_ABORTED if aborted else RequestStatus.FINISHED_STOPPED
    return SimpleNamespace(request_id=name, num_output_tokens=tokens, status=status)


def test_a_pass_that_runs_when_the_vote_is_decided_is_counted_as_late(scheduler: Any, tmp_path: Path) -> None:
    names = ["g-0-aa", "g-1-bb"]
    first, second = scheduler.schedule(names), scheduler.schedule(names)
    assert scheduler.update_from_output(first) == "outputs"
    assert scheduler._free_request(request("g-0-aa", 1, aborted=False)) == "g-0-aa"
    scheduler.schedule(["g-1-bb"])
    scheduler._free_request(request("g-1-bb", 1, aborted=True))
    scheduler.update_from_output(second)
    ended = journal(tmp_path)
    assert ended == [Ended("g-0-aa", False, 2, 1, {"g-1-bb": 1}), Ended("g-1-bb", True, 3, 1)]
    assert late_samples(ended, "g", 0) == [Late(1, True, 2)]
    assert not scheduler._completed, "what comes after a request's end is not kept"
