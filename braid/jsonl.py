"""JSONL files: read with line numbers, and appended to so that any death of the writer leaves whole lines."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

from braid.client import EXIT_USAGE, CommandFailed


def bad_line(path: Path, number: int, problem: str) -> CommandFailed:
    """A file's line can't be used."""
    return CommandFailed(f"{path}, line {number}: {problem}", EXIT_USAGE)


def read(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Number (from 1), place in bytes and object of each line that is not blank.

    Raises:
        CommandFailed: the file can't be read, or a line is no JSON object.
    """
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, offset, parse(line, path, number)
                offset += len(line)
    except OSError as error:
        raise CommandFailed(f"can't read {path}: {error.strerror}", EXIT_USAGE) from None


def at(path: Path, offset: int) -> dict[str, Any]:
    """The object of the line at this place; raises :class:`CommandFailed`."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return parse(file.readline(), path, 0)
    except OSError as error:
        raise CommandFailed(f"can't read {path}: {error.strerror}", EXIT_USAGE) from None


def parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The object of one line; raises :class:`CommandFailed`, naming it."""
    try:
        value = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise bad_line(path, number, f"no JSON ({error}); each line is one object") from None
    if not isinstance(value, dict):
        raise bad_line(path, number, "not a JSON object; each line is one object")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class Appender:
    """The only writer of a JSONL file. Closing is idempotent; a context manager.

    A line reaches the file whole, in one write. What a killed writer left of its last line is cut off when
    the file is opened again, if it begins as this writer's lines do.

    Args:
        path: the file; it and its folder are made where they do not exist.
        begin: how each of the writer's lines begins.

    Raises:
        CommandFailed: the file can't be written, another process writes it, or its end is not of this
            writer.
    """

    def __init__(self, path: Path, begin: bytes) -> None:
        self.path = path
        self._begin = begin
        self._file = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._repair()
        except BlockingIOError:
            self.close()
            raise CommandFailed(f"another process writes {path}: wait for it, or give another file") from None
        except OSError as error:
            self.close()
            raise self._unwritable(error) from None
        except CommandFailed:
            self.close()
            raise

    def append(self, value: Mapping[str, Any]) -> None:
        """Add one line; raises :class:`CommandFailed` where there is no room for it."""
        line = json.dumps(value).encode() + b"\n"
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):
                os.ftruncate(self._file, size)
                raise OSError(0, "no room left")
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _unwritable(self, error: OSError) -> CommandFailed:
        return CommandFailed(f"can't write {self.path}: {error.strerror}")

    def _repair(self) -> None:
        """Complete or cut a last line that has no end."""
        size = os.fstat(self._file).st_size
        start = self._last_break(size)
        tail = os.pread(self._file, size - start, start)
        if not tail:
            return
        if not (tail.startswith(self._begin) or self._begin.startswith(tail)):
            raise CommandFailed(
                f"{self.path} ends in something that this command has not written: give another file",
                EXIT_USAGE,
            )
        try:
            json.loads(tail)
        except ValueError:
            os.ftruncate(self._file, start)
        else:
            os.write(self._file, b"\n")

    def _last_break(self, end: int) -> int:
        """Where the last line begins."""
        while end > 0:
            begin = max(0, end - 65_536)
            at = os.pread(self._file, end - begin, begin).rfind(b"\n")
            if at >= 0:
                return begin + at + 1
            end = begin
        return 0


def replace(path: Path, parts: Iterable[str]) -> None:
    """Write a whole file, part by part; whoever reads it finds the old one or the new one.

    Raises:
        CommandFailed: it can't be written.
    """
    draft = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise CommandFailed(f"can't write {path}: {error.strerror}") from None
