"""Beam search over steps: the best partial answers by a verifier go on, each in several ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from router.sampler import Answer, Progress, Sampler
from router.strategies.steps import Node, StepOptions, Tree, ranked


class BeamOfStepsOptions(StepOptions):
    """Options of ``beam_of_steps``."""

    n: int = Field(8, ge=2, le=256)
    """Beams: partial answers at a time (N)."""
    width: int = Field(4, ge=2, le=64)
    """Next steps of each beam that is kept (M); n / width are kept."""
    independent: bool = False
    """Diverse verifier tree search: n / width trees side by side, each keeping its own best beam."""

    @model_validator(mode="after")
    def _width_divides_n(self) -> Self:
        if self.n % self.width:
            raise ValueError("n must be a multiple of width: n / width beams are kept")
        return self


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: BeamOfStepsOptions, progress: Progress
) -> Answer:
    """N first steps; then keep the N / M with the highest score and draw M next steps of each, until all that
    are kept have ended. Returns the answer with the highest score.

    Snell et al. 2024, "Scaling LLM Test-Time Compute Optimally" (arXiv 2408.03314), beam search against a
    process reward. ``independent``: DVTS (Beeching et al. 2024, Hugging Face, "Scaling test-time compute with
    open models"). A beam that has ended keeps its place while its score does.
    """
    tree = Tree(sampler, body, options, progress)
    trees = _planted(await tree.grow([(tree.root, options.n)]), options)
    places = 1 if options.independent else options.n // options.width
    levels: list[list[int]] = []
    while True:
        await tree.judge([node for candidates in trees for node in candidates])
        if tree.run.stopped is not None:
            break
        kept = [ranked(candidates)[:places] for candidates in trees]
        levels.append([node.index for beams in kept for node in beams])
        live = [node for beams in kept for node in beams if not node.ended]
        new = await tree.grow([(node, options.width) for node in live])
        if not new:
            break
        trees = [
            [node for node in beams if node.ended] + [node for node in new if node.parent in beams]
            for beams in kept
        ]
    return await tree.conclude("beam_of_steps", tree.best(), kept=levels)


def _planted(first: list[Node], options: BeamOfStepsOptions) -> list[list[Node]]:
    """The first steps as one tree, or as the independent ones: the same whichever of them failed."""
    if not options.independent:
        return [first]
    roots = range(options.n // options.width)
    trees = [[node for node in first if node.index // options.width == root] for root in roots]
    return [tree for tree in trees if tree]
