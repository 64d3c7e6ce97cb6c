"""Verifiers behind HTTP: a scoring service, and a reward model's engine. They score sample by sample."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from braid import services
from router.services import Service, ServiceFailed
from router.verifiers import prompts
from router.verifiers.base import Check

if TYPE_CHECKING:
    from router.strategies.run import Run
    from router.strategies.scored import Scored


class _Verdict(msgspec.Struct):
    """What a scoring service replies."""

    score: Annotated[float, msgspec.Meta(ge=0, le=1)] | None
    feedback: Annotated[str, msgspec.Meta(max_length=100_000)] = ""


class HttpVerifier:
    """A :class:`router.verifiers.Critic` by a service of the operator's. A call that fails, or a service that
    replies null, leaves the score unknown."""

    def __init__(self, name: str, service: Service) -> None:
        self.name = name
        self._service = service

    async def score(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[float | None]:
        return [check.score for check in await self.check(run, body, samples)]

    async def check(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[Check]:
        asked = {key: body[key] for key in ("model", "messages", "prompt") if key in body}
        return await asyncio.gather(*(self._one(run, asked, scored) for scored in samples))

    async def _one(self, run: Run, asked: Mapping[str, Any], scored: Scored) -> Check:
        text = prompts.answer(scored.sample.text)
        payload = {**asked, "answer": text, "extracted": scored.answer}
        try:
            told = await self._service.call(payload, _Verdict, run.left_s)
        except ServiceFailed:
            return Check()
        return Check(told.score, told.feedback)


class _Score(msgspec.Struct):
    score: float


class _Scores(msgspec.Struct):
    """Of vLLM's ``/score``."""

    data: Annotated[list[_Score], msgspec.Meta(min_length=1, max_length=1)]


class _Rewards(msgspec.Struct):
    data: Annotated[list[list[float] | float], msgspec.Meta(min_length=1)]


class _Pooled(msgspec.Struct):
    """Of vLLM's ``/pooling``: a vector, or one a token or step."""

    data: Annotated[list[_Rewards], msgspec.Meta(min_length=1, max_length=1)]


class EngineVerifier:
    """A reward model behind an engine's ``/score`` (question and answer as a pair) or ``/pooling`` (the
    conversation), in the shapes of vLLM's :mod:`vllm.entrypoints.pooling`. A call that fails, or a number
    outside 0 to 1, leaves the score unknown."""

    def __init__(self, name: str, service: Service, settings: services.ScoreVerifier) -> None:
        self.name = name
        self._service = service
        self._settings = settings

    async def score(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[float | None]:
        model = {"model": self._settings.model} if self._settings.model else {}
        texts = [prompts.answer(scored.sample.text) for scored in samples]
        if self._settings.api == "score":
            question = prompts.question(body, run)
            payloads: list[dict[str, Any]] = [{"text_1": question, "text_2": text} for text in texts]
        else:
            payloads = [_conversation(body, text) for text in texts]
        return await asyncio.gather(*(self._one({**model, **payload}, run.left_s) for payload in payloads))

    async def _one(self, payload: Mapping[str, Any], limit_s: float) -> float | None:
        try:
            if self._settings.api == "score":
                rewards = [(await self._service.call(payload, _Scores, limit_s)).data[0].score]
            else:
                rewards = _by_step((await self._service.call(payload, _Pooled, limit_s)).data[0].data)
        except ServiceFailed:
            return None
        return self._within(rewards)

    def _within(self, rewards: Sequence[float]) -> float | None:
        """The rewards of the steps as one score."""
        if self._settings.activation == "sigmoid":
            rewards = [1 / (1 + math.exp(-min(max(reward, -700.0), 700.0))) for reward in rewards]
        match self._settings.steps:
            case "min":
                score = min(rewards)
            case "mean":
                score = fmean(rewards)
            case "product":
                score = math.prod(rewards)
            case _:
                score = rewards[-1]
        return score if 0 <= score <= 1 else None


def _conversation(body: Mapping[str, Any], text: str) -> dict[str, Any]:
    """What ``/pooling`` reads: chat messages, or one text."""
    if "messages" in body:
        return {"messages": [*body["messages"], {"role": "assistant", "content": text}]}
    return {"input": prompts.followed(body, text, "")["prompt"].rstrip()}


def _by_step(pooled: Sequence[list[float] | float]) -> list[float]:
    """A reward a step. A vector is one step; of two classes, the second is the good one (as of process
    reward models).

    Raises:
        ServiceFailed: it is no reward: an embedding, for example.
    """
    numbers = [value for value in pooled if isinstance(value, float)]
    rows: list[list[float]] = [numbers] if numbers else [v for v in pooled if isinstance(v, list)]
    if len(numbers) not in (0, len(pooled)) or not all(1 <= len(row) <= 2 for row in rows):
        raise ServiceFailed("malformed")
    return [row[-1] for row in rows]
