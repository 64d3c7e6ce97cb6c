"""Mixture of agents: layers of proposers that read the layer before, then an aggregator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from braid.thinking import without_thinking
from router.sampler import Answer, Progress, Sampler
from router.strategies.collect import Run, conclude
from router.strategies.options import ManyOptions
from router.strategies.prompt import sampled, with_sampling, with_trigger
from router.strategies.scored import Scored, most_confident

INSTRUCTION = (
    "You have been given several responses to the question above. Synthesize them into a single response of "
    "high quality. Evaluate them critically: some of them may be biased or wrong. Do not merely repeat them; "
    "give a refined, accurate and complete reply that ends with the final answer."
)


class MixtureOfAgentsOptions(ManyOptions):
    """Options of ``mixture_of_agents``."""

    n: int = Field(4, ge=1, le=32)
    """Proposers of a layer."""
    layers: int = Field(2, ge=1, le=6)
    """Layers of proposers; the aggregator comes on top."""
    instruction: str = Field(INSTRUCTION, min_length=1, max_length=4000)
    """What the later layers and the aggregator are asked to do with the responses before."""


def references(texts: Sequence[str], instruction: str) -> str:
    """What follows the question where the responses of a layer are read."""
    listed = "\n\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
    return f"\n{instruction}\n\nResponses:\n\n{listed}"


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: MixtureOfAgentsOptions, progress: Progress
) -> Answer:
    """``layers`` layers of ``n`` proposers, each but the first reading the layer before; one aggregator.

    Wang et al. 2024, "Mixture-of-Agents Enhances Large Language Model Capabilities" (arXiv 2406.04692), with
    one model in every place, which Li et al. 2025 ("Rethinking Mixture-of-Agents", arXiv 2502.00674) call
    Self-MoA. A proposer that fails is left out. At a bound the most confident response of the last layer
    that has one is returned.
    """
    run = Run(sampler, options, progress)
    layer = await run.draw(sampled(body, options), options.n, role="proposer")
    run.fail_unless_finished()
    for _ in range(options.layers - 1):
        prompt = with_sampling(_reading(body, layer, options), options.n)
        layer = await run.draw(prompt, options.n, role="proposer") or layer
    final = await run.draw(_reading(body, layer, options), 1, role="aggregator")
    chosen = final[0] if final else most_confident(layer)
    return await conclude("mixture_of_agents", run, chosen, layers=options.layers, aggregated=bool(final))


def _reading(
    body: Mapping[str, Any], layer: Sequence[Scored], options: MixtureOfAgentsOptions
) -> dict[str, Any]:
    texts = [without_thinking(one.sample.text).strip() for one in layer]
    return with_trigger(body, references(texts, options.instruction))
