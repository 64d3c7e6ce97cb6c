"""The problems of an evaluation: lines of a JSONL file, or of the demo's test split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from braid import jsonl
from braid.client import EXIT_USAGE, CommandFailed
from router.extract import boxed, hashes


@dataclass(frozen=True, slots=True)
class Problem:
    """A question as chat messages, and its gold answer."""

    id: str
    messages: Sequence[Mapping[str, Any]]
    answer: str


def from_file(path: Path, limit: int | None = None) -> list[Problem]:
    """The problems of a JSONL file: ``prompt`` or ``messages``, ``answer``, and an ``id`` if wanted (else
    ``line-N``). Other fields are passed over. ``limit``: only so many of the first.

    Raises:
        CommandFailed: the file or a line of it can't be used.
    """
    found: dict[str, Problem] = {}
    lines: dict[str, int] = {}
    for number, _, row in islice(jsonl.read(path), limit):
        problem = _problem(row, path, number)
        if problem.id in found:
            raise jsonl.bad_line(
                path, number, f"its id is that of line {lines[problem.id]}: give each its own"
            )
        found[problem.id], lines[problem.id] = problem, number
    if not found:
        raise CommandFailed(f"{path} has no problem in it", EXIT_USAGE)
    return list(found.values())


def of_demo(count: int) -> list[Problem]:
    """The first ``count`` problems of the demo's test split: those of ``python -m demo.tasks``."""
    from demo import tasks

    rows = (
        tasks.record(problem, f"test-0-{number}", "plain")
        for number, problem in enumerate(tasks.problems("test", 0, count))
    )
    return [Problem(row["id"], _asked(row["prompt"]), row["answer"]) for row in rows]


def gold(answer: str) -> str:
    r"""The answer in a gold field that may be a worked solution: what follows its last ``####`` (as in
    GSM8K), else in its last ``\boxed{}`` (as in MATH), else all of it."""
    return (hashes(answer) or boxed(answer) or answer).strip()


def digest(problems: Iterable[Problem]) -> str:
    """Names a set of problems: the same for the same ids, messages and answers in the same order."""
    rows = [[p.id, list(p.messages), p.answer] for p in problems]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _problem(row: Mapping[str, Any], path: Path, number: int) -> Problem:
    prompt, messages, answer = row.get("prompt"), row.get("messages"), row.get("answer")
    if (prompt is None) == (messages is None):
        raise jsonl.bad_line(path, number, "give either prompt (a text) or messages (a chat)")
    if prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
        raise jsonl.bad_line(path, number, "prompt must be a text that is not empty")
    if messages is not None and not _chat(messages):
        raise jsonl.bad_line(path, number, "messages must be a list of objects with a role, not empty")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise jsonl.bad_line(path, number, "answer is missing: give the right one, as a text or a number")
    name = row.get("id", f"line-{number}")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise jsonl.bad_line(path, number, "id must be a text or a whole number")
    return Problem(str(name), messages or _asked(str(prompt)), str(answer))


def _chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages)
    )


def _asked(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]
