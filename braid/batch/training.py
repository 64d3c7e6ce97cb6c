"""Training data out of a batch: accepted pairs of rejection sampling, and groups of rollouts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from braid import jsonl
from braid.batch import results
from braid.batch.requests import Input, Request

PAIRS, ROLLOUTS = "rejection_sampling", "rollouts"
_SUFFIX = re.compile(rf".+\+({PAIRS}|{ROLLOUTS})(:[0-9]+)?")
_OF_A_SAMPLE = ("index", "token_ids", "logprobs", "reward", "advantage", "text")

Maker = Callable[[Request, Mapping[str, Any]], Iterator[dict[str, Any]]]


def with_samples(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """``body`` asking for the text of each sample, if its strategy makes training data and it says nothing
    of ``return_samples``."""
    reasoning = body.get("reasoning", {})
    if not isinstance(reasoning, dict) or "return_samples" in reasoning:
        return body
    by_name = isinstance(body.get("model"), str) and _SUFFIX.fullmatch(body["model"])
    if reasoning.get("strategy") not in (PAIRS, ROLLOUTS) and not by_name:
        return body
    return {**body, "reasoning": {**reasoning, "return_samples": True}}


def pairs(request: Request, reply: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A prompt with each completion that rejection sampling accepted; equal texts once.

    The prompt is the client's: a trigger that the strategy appended is not in it. Of a chat both are lists of
    messages, else both are texts.
    """
    report = reply.get("reasoning") or {}
    if report.get("strategy") != PAIRS:
        return
    texts = {sample["index"]: sample.get("text") for sample in report.get("samples") or ()}
    answers = {sample["index"]: sample.get("answer") for sample in report.get("samples") or ()}
    told = set[str]()
    for index in report.get("accepted") or ():
        text = texts.get(index)
        if text is None and index == report.get("chosen"):
            text = _returned(reply)
        if text and text not in told:
            told.add(text)
            chat = "messages" in request.body
            yield {
                "custom_id": request.custom_id,
                "index": index,
                "prompt": _prompt(request),
                "completion": [{"role": "assistant", "content": text}] if chat else text,
                "answer": answers.get(index),
            }


def rollouts(request: Request, reply: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A prompt with the finished samples of its group."""
    report = reply.get("reasoning") or {}
    if report.get("strategy") != ROLLOUTS:
        return
    finished = [one for one in report.get("samples") or () if one.get("state") == "finished"]
    if not finished:
        return
    group: dict[str, Any] = {"custom_id": request.custom_id, "prompt": _prompt(request)}
    ids = next((one["prompt_token_ids"] for one in finished if one.get("prompt_token_ids")), None)
    group |= {"prompt_token_ids": ids} if ids else {}
    yield {**group, "samples": [{key: one.get(key) for key in _OF_A_SAMPLE} for one in finished]}


def write(path: Path, make: Maker, requests: Input, answers: Path) -> int:
    """Write the file anew from all answers there are; returns its lines.

    Raises:
        CommandFailed: it can't be written.
    """
    written = 0
    places = {row["custom_id"]: offset for _, offset, row in results.read(answers) if results.succeeded(row)}

    def lines() -> Iterator[str]:
        nonlocal written
        for request in requests:
            if request.custom_id in places:
                row = jsonl.at(answers, places[request.custom_id])
                for item in make(request, row["response"]["body"]):
                    written += 1
                    yield json.dumps(item) + "\n"

    jsonl.replace(path, lines())
    return written


def _prompt(request: Request) -> Any:
    return request.body.get("messages", request.body.get("prompt"))


def _returned(reply: Mapping[str, Any]) -> str | None:
    """The text of the reply's only choice."""
    choice = (reply.get("choices") or [{}])[0]
    text = (choice.get("message") or {}).get("content") or choice.get("text")
    return text if isinstance(text, str) else None
