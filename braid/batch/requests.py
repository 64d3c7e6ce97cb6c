"""The requests of a batch: OpenAI's input format, checked before anything is sent."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braid import jsonl
from braid.client import EXIT_USAGE, CommandFailed

_URL = re.compile(r"/v1/[a-z_/]{1,60}")
_FIELDS = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the input.

    Attributes:
        custom_id: names it; unique in the file.
        id: made of the line's content: an answer with another one is of another request.
    """

    custom_id: str
    url: str
    body: Mapping[str, Any]

    @property
    def id(self) -> str:
        content = json.dumps([self.custom_id, self.url, self.body], sort_keys=True)
        return f"batch_req_{hashlib.sha256(content.encode()).hexdigest()[:32]}"


class Input:
    """A file of requests. Of each only its place is kept, so that a file may be larger than memory.

    Raises:
        CommandFailed: the file or a line can't be used; the message has the line's number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ids: dict[str, str] = {}
        lines: dict[str, int] = {}
        for number, _, row in jsonl.read(path):
            request = _request(row, path, number)
            if request.custom_id in lines:
                earlier = lines[request.custom_id]
                raise jsonl.bad_line(
                    path, number, f"its custom_id is that of line {earlier}: give each request its own"
                )
            lines[request.custom_id] = number
            self._ids[request.custom_id] = request.id
        if not lines:
            raise CommandFailed(f"{path} has no request in it", EXIT_USAGE)

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Request]:
        """Every request, read again."""
        for number, _, row in jsonl.read(self.path):
            yield _request(row, self.path, number)

    def id_of(self, custom_id: str) -> str | None:
        """Of the request of this name, None if there is none."""
        return self._ids.get(custom_id)


def _request(row: Mapping[str, Any], path: Path, number: int) -> Request:
    """The request of a line; raises :class:`CommandFailed`."""
    custom_id, url, body = row.get("custom_id"), row.get("url"), row.get("body")
    problem = ""
    if not isinstance(custom_id, str) or not custom_id:
        problem = "custom_id is missing: give each request a text of its own"
    elif row.get("method") != "POST":
        problem = 'method must be "POST"'
    elif not isinstance(url, str) or not _URL.fullmatch(url):
        problem = "url must be a path such as /v1/chat/completions, without the server's address"
    elif not isinstance(body, dict):
        problem = "body must be an object: the request as it is sent"
    elif body.get("stream"):
        problem = "body.stream must be off: a batch has whole replies"
    elif unknown := sorted(row.keys() - _FIELDS):
        problem = f"unknown field {unknown[0]!r}; a request has custom_id, method, url and body"
    if problem:
        raise jsonl.bad_line(path, number, problem)
    return Request(str(custom_id), str(url), dict(body or {}))
