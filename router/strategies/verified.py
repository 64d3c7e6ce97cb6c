"""Samples with a verifier's scores, for the strategies that choose by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from braid.errors import BadRequest
from router.sampler import Sampler
from router.strategies.collect import Run
from router.strategies.scored import Scored
from router.verifiers import Check, GenerativeVerifier, Verifier, check

UNVERIFIED = "the verifier scored no sample"


def named(sampler: Sampler, name: str, option: str = "verifier") -> Verifier:
    """The verifier that ``option`` names; raises :class:`braid.errors.BadRequest` if there is none."""
    try:
        return sampler.verifier(name)
    except BadRequest as error:
        error.param = f"reasoning.{option}"
        raise


def reads_on(verifier: Verifier) -> bool:
    """Whether it goes on from samples, so that they are worth keeping on their workers."""
    return isinstance(verifier, GenerativeVerifier) and verifier.goes_on


async def scores_of(
    run: Run, verifier: Verifier, body: Mapping[str, Any], samples: Sequence[Scored]
) -> dict[int, float]:
    """What ``verifier`` scores these finished samples of ``body``, by their index; unknown ones are left
    out. At the deadline the run is stopped."""
    told = await verifier.score(run, body, samples) if run.left_s > 0 else [None] * len(samples)
    stop_if_late(run)
    pairs = zip(samples, told, strict=True)
    return {one.sample.index: score for one, score in pairs if score is not None}


async def checks_of(
    run: Run, verifier: Verifier, body: Mapping[str, Any], samples: Sequence[Scored]
) -> dict[int, Check]:
    """As :func:`scores_of`, with reasons."""
    told = await check(verifier, run, body, samples) if run.left_s > 0 else [Check()] * len(samples)
    stop_if_late(run)
    pairs = zip(samples, told, strict=True)
    return {one.sample.index: said for one, said in pairs if said.score is not None}


def stop_if_late(run: Run) -> None:
    """What ends at the deadline outside of a draw must stop the run too."""
    if run.left_s <= 0 and run.stopped is None:
        run.stopped = "deadline"


def highest(samples: Iterable[Scored], scores: Mapping[int, float]) -> Scored | None:
    """The sample with the highest known score, None if none is known; a tie goes to the most confident one,
    then to the lowest submission index."""
    known = [one for one in samples if one.sample.index in scores]
    if not known:
        return None
    return max(known, key=lambda one: (scores[one.sample.index], one.sample.mean_logprob, -one.sample.index))


def with_scores(run: Run, scores: Mapping[int, float]) -> list[dict[str, Any]]:
    """The report's ``samples``, each with its ``score`` where it is known."""
    entries = []
    for one in run.in_order():
        entry = one.report(run.options.return_samples)
        if one.sample.index in scores:
            entry["score"] = round(scores[one.sample.index], 6)
        entries.append(entry)
    return entries


def in_words(score: float) -> str:
    """The feedback of a verifier that gives none."""
    return f"A check of the answer gives it {score:.2f} of 1."
