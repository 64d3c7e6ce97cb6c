"""The file of outcomes: what a run appends to, and what a later run of the same command goes on from.

Its first line is ``{"config": ...}``. Each run begins with ``{"session": ...}``; outcomes follow, and a
``{"turn": ...}`` after each whole turn of a method.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from braid import jsonl
from braid.client import EXIT_USAGE, CommandFailed
from braid.evaluate import outcome
from braid.evaluate.outcome import Outcome

_BEGIN = b'{"'


class Store:
    """Owns the file; a context manager.

    Args:
        path: where it is.
        config: what makes two runs the same evaluation. A new file is begun with it; one that was begun with
            another is refused.

    Attributes:
        outcomes: by method and problem; of several, the last that was written.
        sessions: what each run said of itself.
        turns: method, problems and seconds of each turn that came to its end.
        fresh: whether this run began the file.

    Raises:
        CommandFailed: the file is of another evaluation, or not of this command.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        self.sessions: list[Mapping[str, Any]] = []
        self.turns: list[Mapping[str, Any]] = []
        self._path = path
        self._file = jsonl.Appender(path, _BEGIN)
        try:
            self.fresh = not self._read(config)
            if self.fresh:
                self._file.append({"config": config})
        except CommandFailed:
            self._file.close()
            raise

    def begin_session(self, session: Mapping[str, Any]) -> None:
        self._file.append({"session": session})
        self.sessions.append(session)

    def add(self, one: Outcome) -> None:
        self._file.append(one.line())
        self.outcomes[one.method, one.id] = one

    def end_turn(self, method: str, problems: int, wall_s: float) -> None:
        turn = {"method": method, "problems": problems, "wall_s": round(wall_s, 6)}
        self._file.append({"turn": turn})
        self.turns.append(turn)

    def answered(self, method: str, problem: str) -> bool:
        """Whether there is an outcome that needs no further attempt."""
        found = self.outcomes.get((method, problem))
        return found is not None and not found.error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def _read(self, config: Mapping[str, Any]) -> bool:
        """Take in what is there; returns whether anything is."""
        begun = False
        for number, _, line in jsonl.read(self._path):
            if not begun:
                self._agree(line.get("config"), config)
                begun = True
            elif "session" in line:
                self.sessions.append(line["session"])
            elif "turn" in line:
                self.turns.append(line["turn"])
            else:
                try:
                    one = outcome.read(line)
                except (ValueError, TypeError):
                    raise jsonl.bad_line(self._path, number, "not an outcome of `braid eval`") from None
                self.outcomes[one.method, one.id] = one
        return begun

    def _agree(self, found: Any, config: Mapping[str, Any]) -> None:
        if not isinstance(found, dict):
            raise jsonl.bad_line(self._path, 1, "not a file of `braid eval`: give another --name or --out")
        changed = [key for key in {**found, **config} if found.get(key) != config.get(key)]
        if changed:
            told = "; ".join(
                f"{key} was {_told(found.get(key))}, now {_told(config.get(key))}" for key in changed
            )
            raise CommandFailed(
                f"{self._path} is of another evaluation ({told}). Give another --name to keep both, "
                "the same settings to go on, or delete the file to begin again",
                EXIT_USAGE,
            )


def _told(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
