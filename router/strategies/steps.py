"""Answers that grow step by step: a tree of partial answers inside the bounds of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from braid.services import NAME
from router.sampler import Answer, Progress, Sample, Sampler
from router.strategies import verified
from router.strategies.branches import Branch, fork
from router.strategies.collect import Run, conclude
from router.strategies.continuation import (
    NOTHING,
    check_continuable,
    check_not_thinking,
    extended,
    joined,
    joined_text,
    limit_of,
    stopping,
)
from router.strategies.options import ManyOptions
from router.strategies.prompt import sampled
from router.strategies.scored import Scored, finite, score


class StepOptions(ManyOptions):
    """Of a strategy that grows answers step by step."""

    steps: int = Field(16, ge=1, le=256)
    """The most steps of an answer; the last of them runs to the answer's end."""
    step_tokens: int = Field(512, ge=1, le=32768)
    """The most tokens of a step but the last."""
    separator: str = Field("\n\n", min_length=1, max_length=100)
    """What ends a step: a stop string, a blank line by default."""
    verifier: str = Field("self", pattern=NAME)
    """What scores partial answers: a verifier of the router by its name, `self` asks the model itself."""


@dataclass(slots=True, eq=False)
class Node:
    """A partial answer: all text from the answer's beginning to the end of a step.

    Attributes:
        text: ends with the separator if the answer goes on after it.
        scored: the whole answer so far as a sample, without a separator at its end: its index is that of the
            last step's sample, tokens, log-probability and choice are of all steps. ``finish_reason`` is
            ``length`` until it has ended.
        ended: whether there is no next step.
        depth: steps so far, 0 of the root.
        score: the verifier's, 0 to 1; None if unknown.
        judged: whether a verifier has been asked.
        sample: of the last step, None of the root.
    """

    text: str
    scored: Scored
    ended: bool = False
    depth: int = 0
    parent: Node | None = None
    score: float | None = None
    judged: bool = False
    sample: Sample | None = None

    @property
    def index(self) -> int:
        """Number of the last step's sample; -1 of the root."""
        return self.scored.sample.index

    def report(self, with_text: bool) -> dict[str, Any]:
        """As in the reply."""
        entry: dict[str, Any] = {
            "index": self.index,
            "parent": self.parent.index if self.parent and self.parent.depth else None,
            "step": self.depth,
            "score": None if self.score is None else finite(self.score),
            "ended": self.ended,
        }
        return {**entry, "text": self.text} if with_text else entry


class Tree:
    """The partial answers of one request. ``nodes`` are all but the root, by sample number."""

    def __init__(
        self, sampler: Sampler, body: Mapping[str, Any], options: StepOptions, progress: Progress
    ) -> None:
        check_continuable(body)
        self.options = options
        self.body = sampled(body, options)
        self.run = Run(sampler, options, progress)
        self.root = Node("", Scored(NOTHING))
        self.nodes: list[Node] = []
        self._verifier = verified.named(sampler, options.verifier)
        self._stripped = False

    async def grow(self, parents: Iterable[tuple[Node, int]]) -> list[Node]:
        """Draw so many next steps of each of these nodes at the same time, as one group.

        Returns those that came, in order of their numbers: parents in the given order. None once the run
        is stopped; a parent whose steps all fail has none. The first call raises where nothing came.
        """
        wanted = [(parent, n) for parent, n in parents if n and not parent.ended]
        owners = [parent for parent, n in wanted for _ in range(n)]
        if not owners:
            return []
        first = self.run.drawn
        drawn = await self.run.draw(
            fork([Branch(self._next(parent), n, parent.sample) for parent, n in wanted]),
            len(owners),
            role="step",
            keep=True,
        )
        self.run.fail_unless_finished()
        new = [await self._node(owners[one.sample.index - first], one) for one in drawn]
        if not new:
            self.run.stopped = self.run.stopped or "failed"
        self.nodes += new
        return new

    async def judge(self, nodes: Sequence[Node]) -> None:
        """Have the verifier score the nodes that it has not been asked of, while the run lasts."""
        unknown = [node for node in nodes if not node.judged]
        if unknown and self.run.stopped is None:
            answers = [node.scored for node in unknown]
            scores = await verified.scores_of(self.run, self._verifier, self.body, answers)
            for node in unknown:
                node.score, node.judged = scores.get(node.index), True

    def best(self, among: Sequence[Node] = ()) -> Node:
        """The node to return: ended ones before partial ones, then the highest score (unknown is lowest),
        then the lowest number."""
        return max(among or self.nodes, key=lambda node: (node.ended, *_rank(node)))

    async def conclude(self, name: str, chosen: Node, **fields: Any) -> Answer:
        """The answer that returns ``chosen``, with the tree in its report."""
        texts = self.options.return_samples
        tree = [node.report(texts) for node in self.nodes]
        if not chosen.ended:
            fields["note"] = "no answer had ended; the best partial one is returned"
        score_ = None if chosen.score is None else finite(chosen.score)
        return await conclude(name, self.run, chosen.scored, score=score_, tree=tree, **fields)

    def _next(self, parent: Node) -> dict[str, Any]:
        done = parent.scored.sample.tokens
        body = extended(self.body, parent.text, self._limit(parent)[0], done)
        if parent.depth + 1 >= self.options.steps:
            return body
        return stopping(body, self.options.separator, self._stripped and parent.depth > 0)

    def _limit(self, parent: Node) -> tuple[int | None, bool]:
        """The most tokens of the next step, and whether the answer ends with them."""
        most = limit_of(self.body)
        left = None if most is None else max(1, most - parent.scored.sample.tokens)
        if parent.depth + 1 >= self.options.steps:
            return left, True
        step = self.options.step_tokens
        return (step, False) if left is None or step < left else (left, True)

    async def _node(self, parent: Node, drawn: Scored) -> Node:
        sample, before = drawn.sample, parent.scored.sample
        check_not_thinking(sample)
        reason, final = sample.finish_reason, parent.depth + 1 >= self.options.steps
        separator = self.options.separator
        parted = not final and reason == "stop" and sample.choice.get("stop_reason") == separator
        limit, ends = self._limit(parent)
        out_of_budget = self.run.stopped == "budget_tokens"
        cut = reason == "length" and (out_of_budget or (not ends and sample.tokens >= (limit or 0)))
        most = limit_of(self.body)
        ended = not (parted or cut) or (most is not None and before.tokens + sample.tokens >= most)
        text = joined_text(parent.text, sample.text, separator)
        if parted and not sample.text and parent.depth:
            self._stripped = True
        elif parted and not ended:
            text += separator
        elif ended and not sample.text:
            text = text.removesuffix(separator)
        said = text.removesuffix(separator)  # as an answer that ends here would
        whole = joined(before, sample, said, reason if ended and not parted else "length")
        scored = await score(whole, self.options, self.run.left_s, drawn.role)
        return Node(text, scored, ended, parent.depth + 1, parent, sample=sample)


def ranked(nodes: Iterable[Node]) -> list[Node]:
    """By falling score, unknown last; a tie goes to the lowest number."""
    return sorted(nodes, key=_rank, reverse=True)


def _rank(node: Node) -> tuple[float, int]:
    return (-1.0 if node.score is None else node.score, -node.index)
