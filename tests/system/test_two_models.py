"""Two models on real engines: each has workers of its own, and a cascade and an ensemble run over both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from deploy.local import Cluster, UpSettings

pytestmark = pytest.mark.system

BOTH = ["demo-small", "demo"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = UpSettings(
        prefill=1,
        decode=1,
        also=("demo-small",),
        port=0,
        run_dir=tmp_path_factory.mktemp("two"),
        start_timeout_s=600,
        drain_s=5,
    )
    with Cluster(settings) as cluster:
        yield cluster.wait_ready()


@pytest.fixture
async def client(two: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=two.url, timeout=120, trust_env=False) as client:
        yield client


async def ask(
    client: httpx.AsyncClient, problem: dict[str, str], model: str, **fields: Any
) -> httpx.Response:
    chat = [{"role": "user", "content": problem["question"]}]
    body = {"model": model, "messages": chat, "max_tokens": 96, "seed": 5, **fields}
    return (await client.post("/v1/chat/completions", json=body)).raise_for_status()


async def test_each_model_answers_on_its_own_workers(
    client: httpx.AsyncClient, problems: list[dict[str, str]]
) -> None:
    state = (await client.get("/cluster")).json()
    assert state["models_ready"] == {"demo": True, "demo-small": True}
    assert [(p["prefill"], p["decode"]) for p in state["pairs"]] == [("prefill-0", "decode-0")]
    large = await ask(client, problems[0], "demo")
    small = await ask(client, problems[0], "demo-small")
    assert (large.headers["x-braid-decode"], large.headers["x-braid-path"]) == ("decode-0", "remote")
    assert (small.headers["x-braid-decode"], small.headers["x-braid-path"]) == ("decode-1", "local")


async def test_a_cascade_accepts_and_goes_on_by_its_threshold(
    client: httpx.AsyncClient, problems: list[dict[str, str]]
) -> None:
    margin = {"strategy": "cascade", "by": "margin", "n": 1}  # the models are those of the launcher's order
    kept = (await ask(client, problems[1], "demo", reasoning={**margin, "threshold": 0.0})).json()
    assert [(m["model"], m["accepted"]) for m in kept["reasoning"]["models"]] == [("demo-small", True)]
    assert list(kept["braid"]["decode"]) == ["decode-1"]
    gone_on = (await ask(client, problems[1], "demo", reasoning={**margin, "threshold": 1.0})).json()
    models = gone_on["reasoning"]["models"]
    assert [(m["model"], m["accepted"]) for m in models] == [("demo-small", False), ("demo", True)]
    assert gone_on["usage"]["completion_tokens"] == sum(m["tokens"] for m in models)
    alone = (await ask(client, problems[1], "demo", temperature=0, reasoning={"strategy": "cot"})).json()
    assert gone_on["choices"][0]["message"]["content"] == alone["choices"][0]["message"]["content"]


async def test_an_ensemble_votes_over_both_models(
    client: httpx.AsyncClient, problems: list[dict[str, str]]
) -> None:
    strategy = {"strategy": "ensemble", "models": BOTH, "n": 3, "early_stop": False}
    reply = (await ask(client, problems[2], "demo", reasoning=strategy)).json()
    models = reply["reasoning"]["models"]
    assert [(m["model"], m["samples"], m["finished"]) for m in models] == [(m, 3, 3) for m in BOTH]
    assert reply["usage"]["completion_tokens"] == sum(m["tokens"] for m in models)
    assert set(reply["braid"]["decode"]) == {"decode-0", "decode-1"}
