"""The answers of a batch: OpenAI's output format, one line a request in the order they end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from braid import jsonl
from braid.batch.requests import Input, Request
from braid.client import Reply

BEGIN = b'{"id": "'
"""How each line begins."""
MESSAGES = {
    "timeout": "no reply came within --timeout",
    "connection": "the connection broke each time",
    "no_json": "the reply is not a JSON object",
}


def line(request: Request, reply: Reply) -> dict[str, Any]:
    """The answer to a request. ``response`` is what the server said, also where it refused; ``error`` says
    why there is none."""
    response, code = reply.response, reply.error
    answer: dict[str, Any] | None = None
    if response is not None:
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            code = "no_json" if response.is_success else ""
            body = {"error": {"message": response.text[:500], "type": None, "param": None, "code": None}}
        answer = {
            "status_code": response.status_code,
            "request_id": response.headers.get("x-request-id", ""),
            "body": body,
        }
    error = {"code": code, "message": MESSAGES[code]} if code else None
    return {"id": request.id, "custom_id": request.custom_id, "response": answer, "error": error}


def succeeded(answer: Mapping[str, Any]) -> bool:
    """Whether a line holds the reply that was asked for."""
    response = answer.get("response") or {}
    return answer.get("error") is None and 200 <= response.get("status_code", 0) < 300


def tokens(answer: Mapping[str, Any]) -> int:
    """Generated for a line, as its usage says."""
    usage = ((answer.get("response") or {}).get("body") or {}).get("usage") or {}
    found = usage.get("completion_tokens", 0)
    return found if isinstance(found, int) else 0


def read(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Number, place and object of each answer.

    Raises:
        CommandFailed: a line is no answer.
    """
    for number, offset, row in jsonl.read(path):
        if not isinstance(row.get("custom_id"), str) or not {"response", "error"} <= row.keys():
            raise jsonl.bad_line(path, number, "not an answer of a batch: give another output file")
        yield number, offset, row


def answered(path: Path, requests: Input) -> dict[str, bool]:
    """Of each request that has an answer in the file, whether it succeeded.

    Raises:
        CommandFailed: the file has answers to other requests, or to one that has changed since.
    """
    found: dict[str, bool] = {}
    for number, _, row in read(path):
        name = row["custom_id"]
        wanted = requests.id_of(name)
        if wanted is None:
            raise jsonl.bad_line(
                path, number, f"{requests.path} has no request of this custom_id: give another output file"
            )
        if str(row.get("id")).startswith("batch_req_") and row["id"] != wanted:
            raise jsonl.bad_line(
                path,
                number,
                f"its request has changed in {requests.path} since it was answered: "
                "give another output file, or take this line out",
            )
        found[name] = found.get(name, False) or succeeded(row)
    return found


def drop_failed(path: Path) -> None:
    """Take the lines of failed requests out of the file; it is replaced at once."""
    kept = [offset for _, offset, row in read(path) if succeeded(row)]
    jsonl.replace(path, (json.dumps(jsonl.at(path, offset)) + "\n" for offset in kept))
