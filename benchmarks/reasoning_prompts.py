"""Long prompts for the judge, and how many of their tokens sharing leaves to compute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import httpx

from benchmarks.reasoning_methods import Ask, Reply
from demo import tasks


def long_question(client: httpx.Client, model: str, question: str, key: str, least: int) -> str:
    """`question` behind worked examples of its task, at least `least` prompt tokens with its trigger.

    The examples are drawn by `key`, so that prompts of different keys share no prefix. The demo model was
    trained on prompts below 400 tokens: what it answers to this says nothing of it.
    """
    shots: list[str] = []
    for index in count():
        problem = tasks.make_problem("train", _seed(key), index)
        shots.append(f"{problem.question}\n{tasks.solve(problem).text}")
        if index % 4 == 3:
            text = "\n\n".join([*shots, question])
            if tokens(client, model, [user(text + tasks.WORKED_SUFFIX)]) >= least:
                return text
    raise AssertionError("count() ends")


def _seed(key: str) -> int:
    return int.from_bytes(key.encode()[-6:], "big")


def user(text: str) -> dict[str, str]:
    """A user's turn."""
    return {"role": "user", "content": text}


def tokens(client: httpx.Client, model: str, messages: Sequence[dict[str, str]]) -> int:
    """Prompt tokens of a conversation, as the stack's own tokenizer counts them."""
    reply = client.post("/tokenize", json={"model": model, "messages": messages})
    counted: int = reply.raise_for_status().json()["count"]
    return counted


def allowed(client: httpx.Client, model: str, ask: Ask, reply: Reply) -> tuple[int, int | None]:
    """Tokens of the prompt, and of what there is to compute if nothing is computed twice: the prompt, and for
    each continuation its new tokens and 2 more.

    Continuations are the samples (of the prompt, without new tokens) and the verifications of each of them.
    The second is None where the reply doesn't list its samples.
    """
    prompt = [user(ask.question + tasks.WORKED_SUFFIX)]
    length = tokens(client, model, prompt)
    if not reply.samples:
        return length, None
    answers = {one["index"]: one for one in reply.samples if one.get("role") != "verification"}
    new: dict[int, int] = {}
    for index, answer in answers.items():
        turns = [*prompt, {"role": "assistant", "content": answer["text"]}, user(tasks.VERIFY_REQUEST)]
        new[index] = tokens(client, model, turns) - length - answer["tokens"]
    chains: list[Any] = [one for one in reply.samples if "of" in one]  # those that failed are allowed nothing
    return length, length + 2 * len(answers) + sum(new[chain["of"]] + 2 for chain in chains)
