"""An end in a process of its own: commands come as JSON lines, each is answered by one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tests.kvtransfer.ends import ConsumerEnd, ProducerEnd, make_cache, make_key

BLOCKS, ROW_BYTES = 40, 256 * 1024
"""Of both ends; a block has 1 MiB. Producers' caches are equal."""
CAPACITY = 128 << 20
MARK = "answer: "


def producer(names: list[str]) -> ProducerEnd:
    """A producer whose pieces are 4 blocks."""
    cache = make_cache(blocks=BLOCKS, row_bytes=ROW_BYTES, fill=True)
    return ProducerEnd(transports=names, capacity=CAPACITY, piece_bytes=4 << 20, cache=cache)


def consumer(names: list[str]) -> ConsumerEnd:
    return ConsumerEnd(transports=names, cache=make_cache(blocks=BLOCKS, row_bytes=ROW_BYTES, fill=False))


class Peer:
    """A process that runs the ``role`` producer or consumer with these transports.

    Attributes:
        endpoint: of a producer.
    """

    def __init__(self, role: str, names: list[str]) -> None:
        command = [sys.executable, "-W", "ignore", "-m", __name__, role, *names]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"UCX_WARN_UNUSED_ENV_VARS": "n"},
        )
        self.pid = self._process.pid
        try:
            self.endpoint = str(self._answer())
        except BaseException:
            self.close()
            raise

    def call(self, *command: object) -> Any:
        """Have it do this; returns its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # UCX says things there, too
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise AssertionError("the process has ended")


def _run_producer(names: list[str]) -> tuple[str, Callable[[str, Any], object]]:
    end = producer(names)

    def do(what: str, rest: Any) -> object:
        if what == "open":
            end.open(make_key(rest[0]), rest[1])
        elif what == "publish":
            end.publish(make_key(rest[0]), rest[1], rest[2])
        return None

    return end.end.endpoint, do


def _run_consumer(names: list[str]) -> tuple[str, Callable[[str, Any], object]]:
    end = consumer(names)

    def do(what: str, rest: Any) -> object:
        if what == "load":
            end.load(make_key(rest[0]), rest[1], tuple(rest[2]))
            return None
        return end.came(make_key(rest[0]))

    return "", do


def _main(role: str, names: list[str]) -> None:
    first, do = (_run_producer if role == "producer" else _run_consumer)(names)
    print(MARK + json.dumps(first), flush=True)
    for line in sys.stdin:
        what, *rest = json.loads(line)
        print(MARK + json.dumps(do(what, rest)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
