"""Groups that run or ran lately, to be found again by their id."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

Where = Callable[[], tuple[str, list[str]]]
"""The prefill workers' names, joined, and the decode workers' of what runs now."""


class Entry:
    """One request's group. ``follow`` while it runs, ``told`` for each event of its strategy,
    ``end`` before its last bytes leave, and again when it is known what became of them."""

    def __init__(self, group: str, request_id: str, endpoint: str, model: str, n: int) -> None:
        self._fixed: dict[str, Any] = {
            "id": group,
            "object": "group",
            "request_id": request_id,
            "endpoint": endpoint,
        }
        self._fixed |= {"model": model, "n": n, "started": round(time.time(), 3)}
        self._began = time.monotonic()
        self._state = "waiting"
        self._seconds: float | None = None
        self._strategy: str | None = None
        self._samples: Counter[str] = Counter()
        self._tokens = 0
        self._usage: dict[str, Any] | None = None
        self._report: dict[str, Any] = {"votes": [], "answer": None, "stopped_early": None}
        self._where: Where | None = None
        self._workers: tuple[str, list[str]] = ("", [])

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._seconds is None

    def follow(self, where: Where, strategy: str | None = None) -> None:
        """It has been let in; ``where`` tells its workers until it ends."""
        self._state, self._where, self._strategy = "running", where, strategy

    def told(self, event: Mapping[str, Any]) -> None:
        """Take in an event of the strategy's progress."""
        if event.get("event") == "sample":
            self._samples[event["state"]] += 1
            self._tokens += event["tokens"]
        self._report |= {key: event[key] for key in self._report.keys() & event.keys()}

    def spent(self, usage: Mapping[str, Any], report: Mapping[str, Any] | None = None) -> None:
        """The whole cost, and the strategy's report."""
        self._usage = dict(usage)
        if report is not None:
            self._fixed["n"] = report.get("n", self._fixed["n"])
            self._report |= {key: report[key] for key in self._report.keys() & report.keys()}

    def end(self, outcome: str) -> None:
        """It has ended: ``completed``, ``failed`` or ``cancelled``; the last word counts. Lets go of what it
        ran on."""
        if self._where is not None:
            self._workers, self._where = self._where(), None
        self._state, self._seconds = outcome, time.monotonic() - self._began

    def view(self) -> dict[str, Any]:
        """As in ``GET /v1/groups/{id}``."""
        prefill, decode = self._workers if self._where is None else self._where()
        seconds = self._seconds if self._seconds is not None else time.monotonic() - self._began
        tokens = (self._usage or {}).get("completion_tokens", self._tokens)
        return {
            **self._fixed,
            "state": self._state,
            "seconds": round(seconds, 4),
            "strategy": self._strategy,
            "samples": dict(self._samples),
            "tokens": tokens,
            "usage": self._usage,
            **self._report,
            "prefill": prefill or None,
            "decode": decode,
        }


class History:
    """The last ``most`` groups of each tenant's requests together; of requests with one id, the latest."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[tuple[str, str], Entry] = OrderedDict()

    def begin(self, tenant: str, group: str, entry: Entry) -> None:
        """Keep ``entry``; the oldest one goes if there are too many."""
        self._entries.pop((tenant, group), None)
        self._entries[tenant, group] = entry
        while len(self._entries) > self._most:
            self._entries.popitem(last=False)

    def find(self, tenant: str, group: str) -> Entry | None:
        """The tenant's group of this id, None if it has none or it is too long ago."""
        return self._entries.get((tenant, group))

    def check_integrity(self, idle: bool = False) -> None:
        """Assert that it is bounded; when ``idle``, that nothing in it claims to run."""
        assert len(self._entries) <= self._most
        assert not idle or not any(entry.running for entry in self._entries.values())
