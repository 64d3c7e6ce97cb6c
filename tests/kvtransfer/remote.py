"""An end in another process, from the test's side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import torch

from kvtransfer import wire
from tests.kvtransfer.ends import BLOCKS, DEADLINE_S, EPOCH, HEADS, ROW_BYTES, Events
from tests.kvtransfer.remote_end import Answer, Command, Look, Seen, Setup, Stage, put, take

ROOT = Path(__file__).parents[2]


class Remote:
    """A process with a producer or a consumer. Its cache is that of ``make_cache(seed=seed)``.

    Attributes:
        events: what its end emitted.
        endpoint: a producer's.
    """

    def __init__(
        self,
        role: str,
        *,
        transports: tuple[str, ...] = ("shm", "zmq"),
        blocks: int = BLOCKS,
        row_bytes: int = ROW_BYTES,
        piece_bytes: int = 1 << 20,
        silent_s: float = 8.0,
        stop_at: int = 0,
        seed: int = 1,
    ) -> None:
        self._row_bytes = row_bytes
        self.events = Events()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kvtransfer.remote_end"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        self.pid = self._process.pid
        self._seen: list[Seen] = []
        self._came = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="test-remote", daemon=True)
        self._reader.start()
        self._put(
            Setup(
                role, transports, EPOCH, blocks, row_bytes, piece_bytes, silent_s, seed=seed, stop_at=stop_at
            )
        )
        self.endpoint = self._ready()

    def tell(self, command: Command) -> None:
        """Give a command; those that answer emit an event."""
        self._put(command)

    def open(self, key: wire.Key, blocks: int) -> None:
        want = wire.Want(0, 0, blocks)
        self.tell(wire.Open(key, blocks * 4, b"chain", "fp", (want,), 1))
        self.events.expect(wire.Opened, key)

    def stage(self, key: wire.Key, first: int, block_ids: tuple[int, ...]) -> None:
        self.tell(Stage(key, first, block_ids))

    def load(self, key: wire.Key, endpoint: str, block_ids: tuple[int, ...], deadline_s: float) -> None:
        source = wire.Source(endpoint, EPOCH, 0, HEADS, 0)
        spans = (wire.Span(0, 0, block_ids),)
        self.tell(wire.Load(key, (source,), "fp", len(block_ids) * 4, b"chain", spans, deadline_s))

    def look(self, block_ids: tuple[int, ...]) -> torch.Tensor:
        """Blocks of its cache, ``[layers, count, heads, row_bytes]``."""
        before = len(self._seen)
        self.tell(Look(block_ids))
        with self._came:
            assert self._came.wait_for(lambda: len(self._seen) > before, DEADLINE_S)
        data = torch.frombuffer(bytearray(self._seen[-1].data), dtype=torch.uint8)
        return data.view(-1, len(block_ids), HEADS, self._row_bytes)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(DEADLINE_S)

    def stop(self) -> None:
        """SIGSTOP, and wait until it stands still."""
        self._process.send_signal(signal.SIGSTOP)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        give_up = time.monotonic() + DEADLINE_S
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < give_up
            time.sleep(0.005)  # nothing tells but /proc

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process, whatever it does now."""
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(DEADLINE_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._process.stdout.close()

    def _put(self, message: msgspec.Struct) -> None:
        assert self._process.stdin is not None
        put(self._process.stdin, message)  # type: ignore[arg-type]

    def _read(self) -> None:
        assert self._process.stdout is not None
        while (frame := take(self._process.stdout)) is not None:  # type: ignore[arg-type]
            answer: Answer = msgspec.msgpack.decode(frame, type=Answer)  # type: ignore[arg-type]
            if isinstance(answer, Seen):
                with self._came:
                    self._seen.append(answer)
                    self._came.notify_all()
            else:
                self.events.emit(answer)
                with self._came:
                    self._came.notify_all()

    def _ready(self) -> str:
        with self._came:
            assert self._came.wait_for(lambda: bool(self.events.seen), 3 * DEADLINE_S)
        ready = self.events.seen[0]
        assert isinstance(ready, wire.Ready)
        return ready.endpoint
