"""One side of a contender of `benchmarks.kvtransfer` in a process of its own.

    python -m benchmarks.kv_worker ROLE SOCKET

Commands come as JSON lines over the Unix socket, one reply each: `{"do": METHOD, ...arguments}` calls the
role's method and returns what it returns, `{"error": TEXT}` if it raised. The end of the stream ends it.
Standard library only, and a role's module is imported when it is asked for: a role runs in the environment
that has what it needs.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from typing import Any

ROLES = {
    "producer": "benchmarks.kv_ends:ProducerSide",
    "consumer": "benchmarks.kv_ends:ConsumerSide",
    "sender": "benchmarks.kv_stream:Sender",
    "receiver": "benchmarks.kv_stream:Receiver",
    "copier": "benchmarks.kv_copy:Copier",
    "nixl": "benchmarks.kv_nixl:Agent",
}


def main(argv: list[str]) -> int:
    name, address = argv
    module, _, role_name = ROLES[name].partition(":")
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(address)
        stream = link.makefile("rwb")
        setup = json.loads(stream.readline())
        role = getattr(importlib.import_module(module), role_name)(**setup)
        try:
            answer(stream, {"ready": True})
            for line in stream:
                answer(stream, _reply(role, json.loads(line)))
        finally:
            role.close()
    return 0


def _reply(role: Any, command: dict[str, Any]) -> Mapping[str, Any]:
    try:
        return getattr(role, command.pop("do"))(**command) or {}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def answer(stream: Any, reply: Mapping[str, Any]) -> None:
    """Write one line."""
    stream.write(json.dumps(reply).encode() + b"\n")
    stream.flush()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # libraries whose threads poll for ever need not be waited for
