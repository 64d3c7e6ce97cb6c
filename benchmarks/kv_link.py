"""The driver's end of a worker process: started, commanded, guarded."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.process import GuardedProcess, Launch, LaunchError

ROOT = Path(__file__).resolve().parent.parent
START_S = 120.0
REPLY_S = 60.0


class WorkerError(RuntimeError):
    """A worker said that a command failed, or said nothing in time."""


class Worker:
    """A `benchmarks.kv_worker` process, owned until `stop()`.

    Args:
        name: of its log and its socket in `run_dir`; unique there.
        setup: arguments of the role's constructor.
    """

    def __init__(
        self,
        name: str,
        role: str,
        setup: Mapping[str, Any],
        *,
        python: str,
        run_dir: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        address = run_dir / f"{name}.sock"
        argv = [python, "-m", "benchmarks.kv_worker", role, str(address)]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen(1)
            listener.settimeout(0.5)
            self.launch = Launch(name, argv, {"PYTHONPATH": str(ROOT), **(env or {})})
            self.process = GuardedProcess(self.launch, run_dir)
            with ExitStack() as on_failure:
                on_failure.callback(self.process.stop)
                self._link = on_failure.enter_context(self._accept(listener))
                self._stream = on_failure.enter_context(self._link.makefile("rwb"))
                self._write(setup)
                self._read(START_S)
                on_failure.pop_all()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have the role's method `do` called; what it returned. Raises WorkerError if it failed."""
        self._write({"do": do, **arguments})
        return self._read(REPLY_S)

    @contextmanager
    def asking(self, do: str, **arguments: Any) -> Iterator[Callable[[], dict[str, Any]]]:
        """The same while the context's body runs; what is yielded gives the reply after it."""
        self._write({"do": do, **arguments})
        yield lambda: self._read(REPLY_S)

    def stop(self) -> None:
        """End the process. Idempotent."""
        self._stream.close()
        self._link.close()
        self.process.stop()

    def _accept(self, listener: socket.socket) -> socket.socket:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            self.process.check_alive()
            try:
                return listener.accept()[0]
            except TimeoutError:
                continue
        raise LaunchError(f"{self.launch.name} did not connect; {self.process.tail()}")

    def _write(self, message: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(message).encode() + b"\n")
        self._stream.flush()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        self._link.settimeout(timeout_s)
        try:
            line = self._stream.readline()
        except TimeoutError:
            raise WorkerError(f"{self.launch.name}: no reply in {timeout_s:.0f} s") from None
        if not line:
            raise WorkerError(f"{self.launch.name} has ended; {self.process.tail()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.launch.name}: {reply['error']}")
        return reply
