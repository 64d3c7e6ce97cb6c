"""Rollouts: G samples of a prompt with token ids, log-probabilities and rewards, for RL trainers."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, pstdev
from typing import Any, Literal

from pydantic import Field

from router.sampler import Answer, Progress, Sample, Sampler
from router.strategies.collect import Run, collect, conclude
from router.strategies.options import ManyOptions
from router.strategies.prompt import sampled
from router.strategies.scored import finite, most_confident


class RolloutsOptions(ManyOptions):
    """Options of ``rollouts``."""

    n: int = Field(8, ge=1, le=1024)
    """Samples of the group (G)."""
    reward: Literal["mean_logprob"] = "mean_logprob"
    """What a sample is rewarded with: the mean log-probability of its tokens."""
    cot: bool = False
    """Append `trigger`. Off: the prompt as it is, as trainers send it."""


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: RolloutsOptions, progress: Progress
) -> Answer:
    """All samples of the group in the report, each with what a policy gradient needs; the choice is the one
    with the highest reward.

    For groups as in GRPO (Shao et al. 2024, arXiv 2402.03300): the ``advantage`` of sample i is
    (r_i - mean r) / std r over the samples that finished, 0 where all rewards are equal. Log-probabilities
    are the engine's, of the sampled tokens, in the order of ``token_ids``. What did not finish has none.
    """
    got = await collect(sampler, _with_tokens(sampled(body, options)), options, progress)
    samples = [entry.report(options.return_samples) for entry in got.in_order()]
    for entry, one, advantage in zip(samples, got.in_order(), _advantages(got), strict=True):
        if one.sample.state == "finished":
            entry |= tokens(one.sample) | {"reward": finite(one.sample.mean_logprob), "advantage": advantage}
    chosen = most_confident(got.finished)
    reward = finite(chosen.sample.mean_logprob)
    return await conclude("rollouts", got, chosen, samples=samples, reward=reward)


def _with_tokens(body: Mapping[str, Any]) -> dict[str, Any]:
    """``body`` asking for the ids of all tokens and the log-probabilities of those sampled."""
    wanted: Any = True if "messages" in body else 0
    given = body.get("logprobs")
    return {**body, "return_token_ids": True, "logprobs": wanted if given in (None, False) else given}


def tokens(sample: Sample) -> dict[str, Any]:
    """Token ids and log-probabilities in an OpenAI choice of chat or completions, as vLLM extends it."""
    told = sample.choice.get("logprobs") or {}
    if "content" in told:
        logprobs = [token.get("logprob") for token in told["content"] or ()]
    else:
        logprobs = list(told.get("token_logprobs") or ())
    found = {"token_ids": sample.choice.get("token_ids"), "logprobs": logprobs or None}
    prompt = sample.choice.get("prompt_token_ids")
    return found if prompt is None else {**found, "prompt_token_ids": prompt}


def _advantages(run: Run) -> list[float | None]:
    """Of each ended sample in submission order, None where it has no reward."""
    rewards = [
        finite(one.sample.mean_logprob) if one.sample.state == "finished" else None for one in run.in_order()
    ]
    known = [reward for reward in rewards if reward is not None]
    if not known:
        return rewards
    mean, std = fmean(known), pstdev(known)
    return [None if r is None else round((r - mean) / std, 6) if std > 1e-9 else 0.0 for r in rewards]
