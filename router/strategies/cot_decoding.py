"""CoT decoding: the most probable first tokens lead to chains of thought, without any prompt for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from router.sampler import Answer, Progress, Sampler
from router.strategies.ballots import votes_of
from router.strategies.branches import Branch, fork
from router.strategies.collect import Run, conclude
from router.strategies.confidence import Position, answer_margin, as_asked, positions, with_top
from router.strategies.continuation import NOTHING, check_continuable, continued, joined, limit_of, limited
from router.strategies.options import Options
from router.strategies.scored import Scored, finite, score

_SPECIAL = re.compile(r"<[|｜].*[|｜]>|</?s>|\[/?INST\]|.*\ufffd.*|", re.DOTALL)


class CotDecodingOptions(Options):
    """Options of ``cot_decoding``."""

    n: int = Field(10, ge=1, le=20)
    """First tokens to branch on (k)."""
    select: Literal["sum", "best"] = "sum"
    """`sum`: the answer whose branches' margins add up to the most. `best`: that of the branch with the
    largest margin."""


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: CotDecodingOptions, progress: Progress
) -> Answer:
    """Branch on the k most probable first tokens and go on greedily; the answer that is the surest wins.

    Wang & Zhou 2024, "Chain-of-Thought Reasoning Without Prompting" (arXiv 2402.10200): the margin of a
    branch is the mean over the tokens of its answer of p(top1) - p(top2). The first tokens come from one call
    for a single token; each is forced as text. Special tokens (the end of the sequence) and pieces of
    characters can't be, and are left out. A branch without an answer has no margin.
    """
    check_continuable(body)
    run = Run(sampler, options, progress)
    greedy = {**body, "temperature": 0}
    opening = await run.draw(with_top(limited(greedy, 1), options.n), 1, role="first", keep=True)
    run.fail_unless_finished()
    start = (positions(opening[0].sample.choice) or [Position("", ())])[0]
    tokens = [token for token, _ in start.top if not _SPECIAL.fullmatch(token)][: options.n]
    most = limit_of(body)
    rest = with_top(limited(greedy, None if most is None else max(1, most - 1)), 2)
    first = run.drawn
    branches = [Branch(continued(rest, token), after=opening[0].sample) for token in tokens]
    drawn = await run.draw(fork(branches), len(branches), role="branch") if branches else []
    paths = [await _path(run, start, tokens[one.sample.index - first], one) for one in drawn]
    sure = {path.index: path.margin for path in paths if path.margin is not None}
    votes = votes_of(
        (path.scored for path in paths if path.index in sure), lambda one: max(0.0, sure[one.sample.index])
    )
    among = sure.keys() & votes[0].indices if votes and options.select == "sum" else sure.keys()
    best = max(among, key=lambda index: (sure[index], -index), default=None)
    chosen = next((path.scored for path in paths if best in (None, path.index)), opening[0])
    chosen = replace(chosen, sample=replace(chosen.sample, choice=as_asked(chosen.sample.choice, body)))
    return await conclude(
        "cot_decoding",
        run,
        chosen,
        votes=[one.report() for one in votes],
        branches=[path.report() for path in paths],
        **({} if sure else {"note": "no branch has an answer; the most probable one is returned"}),
    )


@dataclass(frozen=True, slots=True)
class _Path:
    """A branch with its forced first token, and its answer's margin."""

    scored: Scored
    first: str
    margin: float | None

    @property
    def index(self) -> int:
        return self.scored.sample.index

    def report(self) -> dict[str, Any]:
        margin = None if self.margin is None else finite(self.margin)
        return {"index": self.index, "first": self.first, "answer": self.scored.answer, "margin": margin}


async def _path(run: Run, start: Position, token: str, drawn: Scored) -> _Path:
    begun = replace(NOTHING, logprob=dict(start.top)[token], tokens=1)
    whole = joined(begun, drawn.sample, token + drawn.sample.text)
    one = await score(whole, run.options, run.left_s, drawn.role)
    path = [Position(token, start.top), *positions(drawn.sample.choice)]
    return _Path(one, token, None if one.answer is None else answer_margin(path, one.answer))
