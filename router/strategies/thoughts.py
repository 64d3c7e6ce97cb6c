"""Votes on partial answers: the model compares them and names the most promising."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from braid.thinking import without_thinking
from router.strategies.collect import Run
from router.strategies.prompt import in_prose, with_sampling, with_trigger
from router.strategies.steps import Node

VOTE = (
    "Given several possible beginnings of an answer to the question above, decide which of them is the most "
    'promising. Analyze each of them, then conclude with "The best choice is X" (without quotes).'
)
_BEST = re.compile(r"best\s+choice\s+is\W{0,8}(?:choice\W{0,8})?([0-9]{1,4})\b", re.I)


async def vote(
    run: Run, body: Mapping[str, Any], nodes: Sequence[Node], instruction: str, votes: int
) -> None:
    """Score each node by its share of ``votes`` votes; unknown where a bound leaves none.

    A vote that names no node counts for none of them. A single node has all votes without asking.
    """
    if len(nodes) < 2:
        for node in nodes:
            node.score = 1.0
        return
    listed = "\n\n".join(f"Choice {i}:\n{node.text.strip()}" for i, node in enumerate(nodes, 1))
    ask = with_trigger(in_prose(body), f"\n{listed}\n\n{instruction}")
    said = await run.draw(with_sampling(ask, votes), votes, role="vote")
    picks = [voted(one.sample.text, len(nodes)) for one in said]
    for number, node in enumerate(nodes, 1):
        node.score = picks.count(number) / len(picks) if picks else None


def voted(text: str, count: int) -> int | None:
    """The number, 1 to ``count``, of the choice that a vote names last; None if it names none."""
    found = _BEST.findall(without_thinking(text))
    return int(found[-1]) if found and 1 <= int(found[-1]) <= count else None
