"""Tree of thoughts: search over intermediate steps, with the model judging how promising they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from router.sampler import Answer, Progress, Sampler
from router.strategies.steps import Node, StepOptions, Tree, ranked
from router.strategies.thoughts import VOTE, vote


class TreeOfThoughtsOptions(StepOptions):
    """Options of ``tree_of_thoughts``."""

    n: int = Field(4, ge=1, le=64)
    """Thoughts proposed from each state (k)."""
    search: Literal["bfs", "dfs"] = "bfs"
    """`bfs` keeps the `breadth` best states of each depth; `dfs` follows the best thought first, and goes
    back where none is worth following."""
    breadth: int = Field(2, ge=1, le=16)
    """States kept at a time by `bfs` (b)."""
    evaluate: Literal["value", "vote"] = "value"
    """`value`: `verifier` scores each state by itself. `vote`: the model compares them, `votes` times, and a
    state's score is its share of the votes."""
    votes: int = Field(3, ge=1, le=64)
    """Votes on the states of a step."""
    instruction: str = Field(VOTE, min_length=1, max_length=4000)
    """How the model is asked to vote."""
    prune: float = Field(0.5, ge=0, le=1)
    """`dfs` follows no thought that scores below this."""
    visits: int = Field(32, ge=1, le=1024)
    """The most states that `dfs` goes on from."""

    @property
    def slots(self) -> int:
        """Thoughts of a depth, or votes on them."""
        thoughts = self.n * (self.breadth if self.search == "bfs" else 1)
        return max(thoughts, self.votes) if self.evaluate == "vote" else thoughts


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: TreeOfThoughtsOptions, progress: Progress
) -> Answer:
    """Propose k thoughts from each state, value them or vote, and go on from the best: breadth first until
    all states kept have ended, or depth first until an answer has ended that is not pruned.

    Yao et al. 2023, "Tree of Thoughts" (arXiv 2305.10601), algorithms 1 and 2, with thoughts sampled
    independently. The report's ``visited`` lists the states gone on from. A search that prunes every thought
    returns the best answer it has seen.
    """
    tree = Tree(sampler, body, options, progress)
    search = _Search(tree, body, options)
    found = await (search.breadth_first() if options.search == "bfs" else search.depth_first())
    return await tree.conclude("tree_of_thoughts", found or tree.best(), visited=search.visited)


class _Search:
    def __init__(self, tree: Tree, body: Mapping[str, Any], options: TreeOfThoughtsOptions) -> None:
        self.visited: list[int] = []
        self._tree = tree
        self._body = body
        self._options = options

    async def breadth_first(self) -> Node | None:
        states, kept = [self._tree.root], list[Node]()
        while thoughts := await self._propose(states):
            known = [*(node for node in kept if node.ended), *thoughts]
            await self._value(known)
            if self._tree.run.stopped is not None:
                return None
            kept = ranked(known)[: self._options.breadth]
            states = [node for node in kept if not node.ended]
        return kept[0] if kept and kept[0].ended else None

    async def depth_first(self) -> Node | None:
        stack = [self._tree.root]
        while stack and len(self.visited) < self._options.visits:
            state = stack.pop()
            if state.ended:
                return state
            thoughts = await self._propose([state])
            await self._value(thoughts)
            if self._tree.run.stopped is not None:
                return None
            worth = [node for node in ranked(thoughts) if (node.score or 0.0) >= self._options.prune]
            stack += reversed(worth)
        return None

    async def _propose(self, states: Sequence[Node]) -> list[Node]:
        thoughts = await self._tree.grow([(state, self._options.n) for state in states])
        self.visited += [state.index for state in states if state.depth]
        return thoughts

    async def _value(self, nodes: Sequence[Node]) -> None:
        """Score the nodes; votes compare them all, and replace what an earlier vote said."""
        if self._options.evaluate == "value":
            await self._tree.judge(nodes)
        else:
            await vote(self._tree.run, self._body, nodes, self._options.instruction, self._options.votes)
