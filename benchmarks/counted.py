"""Reads the journals of `benchmarks.counting_scheduler`, without vLLM."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

JOURNAL = "COUNTED_ENDS"
"""Variable with the folder of the journals."""


class Ended(msgspec.Struct):
    """A line of a journal; its fields are explained there."""

    id: str
    aborted: bool
    steps: int
    tokens: int
    others: dict[str, int] = {}


def journal(folder: Path) -> list[Ended]:
    """All lines of all engines; a last line that was cut off is left out."""
    lines = [
        line
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_bytes().split(b"\n")[:-1]
        if line
    ]
    return [msgspec.json.decode(line, type=Ended) for line in lines]


class Late(msgspec.Struct):
    """A sample that had not ended when its group was decided: its steps from then on."""

    number: int
    aborted: bool
    steps: int


def late_samples(ended: Sequence[Ended], request: str, decided_by: int | None) -> list[Late]:
    """The samples of a request's group that the engine still ran once sample `decided_by` had ended.

    Empty if nothing decided it early. Samples of a group are engine requests named `...REQUEST-NUMBER-...`.

    Raises:
        LookupError: the engine knows no such sample.
    """
    if decided_by is None:
        return []
    sample = re.compile(r"(?:^|-)" + re.escape(request) + r"-(\d+)-[0-9a-f]+$")
    group = {int(found[1]): one for one in ended if (found := sample.search(one.id))}
    if decided_by not in group:
        raise LookupError(f"sample {decided_by} of request {request} is in no journal")
    then = group[decided_by].others
    return [
        Late(number, one.aborted, one.steps - then[one.id])
        for number, one in sorted(group.items())
        if one.id in then
    ]
