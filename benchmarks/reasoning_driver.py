"""Runs other projects' strategies against an OpenAI server, in their own environment.

Started by `benchmarks.reasoning_peers` with the interpreter that has `optillm` and `its_hub`; imports nothing
of this project. A line of stdin is a job in JSON (see `run`), a line of stdout its result: `seconds` from the
call to its return, `text`, and `error` in the words of the peer's exception. The peers are called as
libraries, without the proxy servers they can also run as, which would only add to their time.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 120.0
ANSWER = r"answer is\s*(-?[\d,]+)"
"""What its_hub votes over: its own regex projection, pointed at how the demo model ends an answer."""
VERDICT = re.compile(r"Verification:\s*(Yes|No)")

Job = dict[str, Any]
Method = Callable[[Job], str]


def optillm_methods() -> dict[str, Method]:
    """OptiLLM's approaches. `n` is set where it is a parameter; that of its self_consistency is one of the
    class only (the server always draws 5)."""
    from openai import OpenAI
    from optillm.bon import best_of_n_sampling
    from optillm.plugins import majority_voting_plugin
    from optillm.self_consistency import AdvancedSelfConsistency

    clients: dict[str, Any] = {}

    def client(job: Job) -> Any:
        url = f"{job['url']}/v1"
        if url not in clients:
            clients[url] = OpenAI(base_url=url, api_key="unused", timeout=TIMEOUT_S)
        return clients[url]

    def self_consistency(job: Job) -> str:
        config = {"max_tokens": job["max_tokens"]}
        approach = AdvancedSelfConsistency(client(job), job["model"], job["n"], request_config=config)
        clusters = approach.evaluate(job["system"], job["prompt"])["aggregated_result"]["clusters"]
        return str(clusters[0]["answer"]) if clusters else "No consistent answer found."

    def majority_voting(job: Job) -> str:
        config = {"k": job["n"], "temperature": job["temperature"], "max_tokens": job["max_tokens"]}
        text, _ = majority_voting_plugin.run(job["system"], job["prompt"], client(job), job["model"], config)
        return str(text)

    def best_of_n(job: Job) -> str:
        config = {"max_tokens": job["max_tokens"]}
        text, _ = best_of_n_sampling(
            job["system"], job["prompt"], client(job), job["model"], job["n"], request_config=config
        )
        return str(text)

    return {
        "optillm.self_consistency": self_consistency,
        "optillm.majority_voting": majority_voting,
        "optillm.bon": best_of_n,
    }


def its_hub_methods() -> dict[str, Method]:
    """its_hub's algorithms, all on one event loop, as in an application."""
    from its_hub import BestOfN, LLMJudge, OpenAICompatibleLanguageModel, SelfConsistency
    from its_hub.api import AbstractOutcomeRewardModel, ChatMessage
    from its_hub.core.algorithms.self_consistency import create_regex_projection_function

    loop = asyncio.new_event_loop()
    models: dict[str, Any] = {}

    def model(job: Job) -> Any:
        url, limit = f"{job['url']}/v1", job["max_tokens"]
        key = f"{url} {limit} {job['temperature']}"
        if key not in models:
            models[key] = OpenAICompatibleLanguageModel(
                url, "unused", job["model"], temperature=job["temperature"], max_completion_tokens=limit
            )
        return models[key]

    class DemoVerifier(AbstractOutcomeRewardModel):  # type: ignore[misc]
        """The demo model's own way to verify, `k` chains a candidate: the share that says Yes."""

        def __init__(self, lm: Any, request: str, k: int) -> None:
            self._lm, self._request, self._k = lm, request, k

        def score(self, messages: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        async def ascore(self, messages: Any, orchestrator: Any = None, **kwargs: Any) -> list[float]:
            ask = ChatMessage(role="user", content=self._request)
            turns = [[*conversation, ask] for conversation in messages for _ in range(self._k)]
            replies = await orchestrator.agenerate(self._lm, turns)
            return [_share(replies[i : i + self._k]) for i in range(0, len(replies), self._k)]

    def done(algorithm: Any, job: Job) -> str:
        reply = loop.run_until_complete(algorithm.ainfer(model(job), job["prompt"], budget=job["n"]))
        return str(reply.get("content") or "")

    def self_consistency(job: Job) -> str:
        return done(SelfConsistency(create_regex_projection_function(ANSWER)), job)

    def best_of_n(job: Job) -> str:
        return done(BestOfN(DemoVerifier(model(job), job["verify"], job["k"])), job)

    def best_of_n_judge(job: Job) -> str:
        return done(BestOfN(LLMJudge(model(job))), job)

    return {
        "its_hub.self_consistency": self_consistency,
        "its_hub.best_of_n": best_of_n,
        "its_hub.best_of_n_judge": best_of_n_judge,
    }


def _share(replies: list[dict[str, Any]]) -> float:
    """The share of verdicts that are Yes; 0 where no chain has one."""
    verdicts = [found[-1] for reply in replies if (found := VERDICT.findall(reply.get("content") or ""))]
    return verdicts.count("Yes") / len(verdicts) if verdicts else 0.0


def run(methods: dict[str, Method], job: Job) -> dict[str, Any]:
    """The result of a job: `method`, `url`, `model`, `system`, `prompt`, `n`, `temperature`, `max_tokens`,
    and for a verifier `k` and `verify`."""
    start = time.perf_counter()
    try:
        text, error = methods[job["method"]](job), ""
    except Exception as failure:  # whatever a peer raises is its result
        text, error = "", f"{type(failure).__name__}: {failure}".partition("\n")[0][:300]
    return {"seconds": time.perf_counter() - start, "text": text, "error": error}


def main() -> int:
    """Answer jobs until stdin ends; what the peers print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    methods: dict[str, Method] = {}
    missing = {}
    for name, load in (("optillm", optillm_methods), ("its_hub", its_hub_methods)):
        try:
            methods |= load()
        except ImportError as error:
            missing[name] = str(error)
    print(json.dumps({"methods": list(methods), "missing": missing}), file=replies)
    for line in sys.stdin:
        print(json.dumps(run(methods, json.loads(line))), file=replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
