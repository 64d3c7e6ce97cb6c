"""vLLM's scheduler with a journal of how every request ended, for `benchmarks.cancel`.

Runs inside the engine, by its flag `--scheduler-cls benchmarks.counting_scheduler.CountingScheduler`. A line
of the journal (JSON, a file an engine in the folder named by `COUNTED_ENDS`) is a request that has ended:

- `id`: its engine request id; `aborted`: whether it was, or ended by itself;
- `steps`: forward passes that it took part in, also one that still runs and whose token is thrown away;
- `tokens`: those of them that gave it a token;
- `others`, of one that ended by itself: steps that each other request had completed with that pass.

An other's `steps` at its end less those in `others` is all that it cost after that moment.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from benchmarks.counted import JOURNAL


class CountingScheduler(AsyncScheduler):
    """See the module. The journal is written when requests end, which is not in every step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._scheduled: Counter[str] = Counter()
        self._completed: Counter[str] = Counter()
        path = Path(os.environ[JOURNAL], f"{os.getpid()}.jsonl")
        self._journal = path.open("a", buffering=1)

    def schedule(self, *args: Any, **options: Any) -> SchedulerOutput:
        """Choose a pass's batch; the pass before may still run."""
        output = super().schedule(*args, **options)
        self._scheduled.update(output.num_scheduled_tokens.keys())
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **options: Any) -> Any:
        """A pass has completed."""
        self._completed.update(self._scheduled.keys() & scheduler_output.num_scheduled_tokens.keys())
        return super().update_from_output(scheduler_output, *args, **options)

    def _free_request(self, request: Request, *args: Any, **options: Any) -> Any:
        """The one way out of every request."""
        self._completed.pop(request.request_id, None)
        ended: dict[str, Any] = {
            "id": request.request_id,
            "aborted": request.status == RequestStatus.FINISHED_ABORTED,
            "steps": self._scheduled.pop(request.request_id, 0),
            "tokens": request.num_output_tokens,
        }
        if not ended["aborted"]:
            ended["others"] = {name: self._completed[name] for name in self._scheduled}
        print(json.dumps(ended), file=self._journal)
        return super()._free_request(request, *args, **options)

    def shutdown(self) -> None:
        """The engine ends."""
        self._journal.close()
        super().shutdown()
