"""Structured logs: one JSON line an event on standard error, the group's id in each of a group."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from typing import Any

GROUP: ContextVar[str] = ContextVar("group", default="")
"""Id of the group (``X-Braid-Group``) that the running task works for; a task inherits it from its maker."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """``{"ts", "level", "event", ...fields}``; fields are ``group``, and what was passed as ``extra``."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": round(record.created, 6),
            "level": record.levelname.lower(),
            "process": self._process,
            "event": record.getMessage(),
        }
        if group := GROUP.get():
            line["group"] = group
        line.update({k: v for k, v in vars(record).items() if k not in _STANDARD})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(process: str, level: str = "info") -> None:
    """Send the ``braid``, ``uvicorn`` and ``opentelemetry`` loggers to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    for name in ("braid", "uvicorn", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
