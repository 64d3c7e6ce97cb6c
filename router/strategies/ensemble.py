"""Ensemble: the same question to several models side by side; the most consistent answer wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from braid.errors import BadRequest
from router.sampler import Answer, Progress, Sampler
from router.strategies.ballots import conclude_vote, votes_of
from router.strategies.branches import Branch, fork
from router.strategies.collect import Run
from router.strategies.prompt import sampled
from router.strategies.scored import Scored
from router.strategies.several import Metered, SeveralOptions, entries, numbered
from router.strategies.voting import Votes, is_decided


class EnsembleOptions(SeveralOptions):
    """Options of ``ensemble``."""

    weights: dict[str, Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]] = Field(default_factory=dict)
    """What a vote of a model weighs, by its name: 0 to 1, 1 where none is given."""

    @property
    def slots(self) -> int:
        """All models run side by side."""
        return self.n * max(1, len(self.models))


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: EnsembleOptions, progress: Progress
) -> Answer:
    """The weighted majority over ``n`` samples of each model, in the words of the most confident of them.

    Self-consistency (Wang et al. 2022, arXiv 2203.11171) over samples of several models, as in Li et al.
    2024, "More Agents Is All You Need" (arXiv 2402.05120). The samples of a model that can't be served count
    as failed. ``early_stop`` cancels the rest once they can't change the winner, which is safe in any order.
    Mean log-probabilities of different models are compared only to choose the words.
    """
    models = options.order()
    if unknown := sorted(options.weights.keys() - set(models)):
        raise BadRequest(
            "weights names a model that models does not", param=f"reasoning.weights.{unknown[0]}"
        )
    model_of, metered = numbered(models, options.n), Metered(sampler)

    def weight(one: Scored) -> float:
        return options.weights.get(model_of[one.sample.index], 1.0)

    def votes(so_far: Run) -> list[Votes]:
        return votes_of(so_far.ended, weight)

    def settled(so_far: Run) -> str | None:
        return "decided" if is_decided(votes(so_far), so_far.outstanding) else None

    run = Run(metered, options, progress, lambda so_far: {"votes": [v.report() for v in votes(so_far)]})
    run.n = len(model_of)
    question = sampled(body, options)
    asked = fork([Branch({**question, "model": model}, options.n) for model in models])
    await run.draw(asked, run.n, settled=settled if options.early_stop else None)
    run.fail_unless_finished()
    told = [_of(model, run, metered, model_of) for model in models]
    return await conclude_vote("ensemble", run, votes(run), samples=entries(run, model_of), models=told)


def _of(model: str, run: Run, metered: Metered, model_of: Mapping[int, str]) -> dict[str, Any]:
    """What the report says of a model: its cost, and its own vote."""
    mine = [one for one in run.in_order() if model_of[one.sample.index] == model]
    own = votes_of(mine)
    finished = sum(one.sample.state == "finished" for one in mine)
    told: dict[str, Any] = {"model": model, "samples": len(mine), "finished": finished}
    return told | {"tokens": metered.tokens(model), "answer": own[0].answer if own else None}
