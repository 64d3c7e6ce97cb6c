"""Particle filtering: partial answers are resampled by their scores after each step."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from router.sampler import Answer, Progress, Sampler
from router.strategies.steps import Node, StepOptions, Tree

CLIP = 1e-7
"""Scores are clipped to this distance from 0 and 1."""


class ParticleFilteringOptions(StepOptions):
    """Options of ``particle_filtering``."""

    n: int = Field(8, ge=1, le=256)
    """Particles."""


def logit(score: float | None) -> float:
    """log(r / (1 - r)) of a clipped score; 0, so neutral, where it is unknown."""
    r = 0.5 if score is None else min(1 - CLIP, max(CLIP, score))
    return math.log(r / (1 - r))


def softmax(logits: Sequence[float]) -> list[float]:
    """exp(l_i) / sum of exp(l_j)."""
    peak = max(logits)
    weights = [math.exp(one - peak) for one in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def resample(scores: Sequence[float | None], n: int, seed: object, step: int) -> list[int]:
    """``n`` places of ``scores``, ascending, each drawn with probability softmax(logit(score)).

    With a seed (not None) the result is a function of the arguments.
    """
    chance = random.Random(None if seed is None else f"particle_filtering:{seed}:{step}")
    weights = softmax([logit(score) for score in scores])
    return sorted(chance.choices(range(len(scores)), weights, k=n))


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: ParticleFilteringOptions, progress: Progress
) -> Answer:
    """Extend each particle by a step, resample n of them by softmax of logit(score), until all have ended.
    Returns the particle with the highest score.

    Puri et al. 2025, "A Probabilistic Inference Approach to Inference-Time Scaling of LLMs using
    Particle-Based Monte Carlo Methods" (arXiv 2502.01618). A particle that has ended stays among them and
    may be drawn again. Resampling draws from a generator of the request's seed.
    """
    tree = Tree(sampler, body, options, progress)
    particles = await tree.grow([(tree.root, options.n)])
    levels: list[list[int]] = []
    while True:
        await tree.judge(particles)
        if tree.run.stopped is not None or all(node.ended for node in particles):
            break
        scores = [node.score for node in particles]
        places = resample(scores, options.n, body.get("seed"), len(levels))
        levels.append([particles[place].index for place in places])
        drawn = [particles[place] for place in places]
        new = await tree.grow(_counted(drawn))
        if not new and tree.run.stopped is not None:
            break
        particles = [*(node for node in drawn if node.ended), *new]
    among = particles if all(node.ended for node in particles) else tree.nodes
    return await tree.conclude("particle_filtering", tree.best(among), resampled=levels)


def _counted(drawn: Sequence[Node]) -> list[tuple[Node, int]]:
    """Each particle to extend, once, with how often it was drawn."""
    live = [node for node in drawn if not node.ended]
    return [(node, live.count(node)) for node in dict.fromkeys(live)]
